"""Structural properties of a model, tested at random parameters and random inputs.

A structural property, such as "one sample's output depends on the others", may not be visible at
the values that a model has: scales of 0, a readout of zeros, two equal samples. At random values
close to them it is visible with probability 1.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.tree_util import tree_leaves_with_path

from meanfield_jax.empirical.model import Functional, path_name

if TYPE_CHECKING:
    from meanfield_jax.empirical.fisher import FisherOperator

SIZE = 0.3
"""Size of the random part, in units of an array's root mean square."""

LEAST_FRACTION = 0.1
"""Fraction of all parameters below which dense layers are not worth the test of their product."""

FACTORS = 1e2, 1e4
"""Factors by which a layer's parameters are multiplied to see whether the outputs grow."""

LEAST_POWER = 0.5
"""Without a normalization, the outputs grow like this power of the factor, or a higher one."""

NUM_SAMPLES = 8
"""Number of samples in the small batch on which layers are tested."""


def _at_once() -> AbstractContextManager[None]:
    """The context in which functions are evaluated even where their caller is being traced."""
    # elsewhere nothing is changed: inside of it, what jit traces is compiled operation by operation
    traced = isinstance(jnp.zeros(()), Tracer)
    return jax.ensure_compile_time_eval() if traced else nullcontext()


def couples_samples(op: "FisherOperator") -> bool | None:
    """Whether one sample's outputs, or their derivatives, depend on the others in its batch.

    Returns:
        None if the outputs are nowhere finite, so that nothing is known.
    """
    return _apart(_response(op, 1), _response(op, 2))


def differ(op: "FisherOperator", other: "FisherOperator") -> bool | None:
    """Whether the outputs of two models, or their derivatives, differ; None if not known."""
    return _apart(_response(op, 1), _response(other, 1))


def _apart(first: list[np.ndarray], second: list[np.ndarray]) -> bool | None:
    """Whether two lists of arrays differ by more than rounding."""
    known = False
    for a, b in zip(first, second, strict=True):
        finite = np.isfinite(a) & np.isfinite(b)
        known |= bool(finite.any())
        size = np.abs(a[finite]).max(initial=0.0)
        if np.any(np.abs(a - b)[finite] > 100 * np.finfo(a.dtype).eps * size):
            return True
    return False if known else None


def _response(op: "FisherOperator", seed: int) -> list[np.ndarray]:
    """The first sample's outputs and a derivative of them; the seed draws the other samples."""
    small = _small(op, 4)
    first, others = (_near_data(small.x, np.random.default_rng(each)) for each in (0, seed))
    x = jax.tree.map(lambda a, b: np.concatenate([a[:1], b[1:]]), first, others)
    rng = np.random.default_rng(0)
    ones = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), small.params)
    near, direction = _near(small.params, rng), _near(ones, rng)
    with _at_once():
        found = _response_to(small.unchecked(params=near, x=x), direction)
        return [np.asarray(part) for part in found]


@jax.jit
def _response_to(op: "FisherOperator", direction: Any) -> tuple[Array, Array]:
    outputs, slope = jax.jvp(lambda p: op.evaluate(p, op.x), (op.params,), (direction,))
    return outputs[0], slope[0]


def dense_layers(op: "FisherOperator") -> tuple[str, ...]:
    """The dense layers whose weight gradient need not be formed, see ``products.outer``.

    These are the ``nnx.Linear`` layers for which this is cheaper (n < 2 N inputs), provided that
    they hold more than a tenth of the parameters and that the product agrees with plain
    differentiation. It does not where weights are tied, masked, quantized, or used inside another
    transformation.

    Returns:
        Their paths.
    """
    model = op.apply
    if not isinstance(model, Functional) or op.batch_size is not None:
        return ()
    try:
        inputs = jax.eval_shape(lambda p, x: model.with_added(p, {}, x)[1], op.params, op.x)
        layers = tuple(
            name
            for name, value in inputs.items()
            if value.ndim == 2 and value.shape[0] < 2 * value.shape[1]
        )
        sizes = {path_name(path): leaf.size for path, leaf in tree_leaves_with_path(op.params)}
        held = sum(sizes[f"{layer}/kernel"] for layer in layers)
        if held <= LEAST_FRACTION * op.num_parameters:
            return ()
        small, rng = _near_operator(op)
        u = rng.standard_normal((NUM_SAMPLES, *op.output_shape[1:])).astype(op.dtype)
        with _at_once():
            found = _products(small.unchecked(dense=layers), u)
            plain, apart = (np.asarray(part, float) for part in found)
    except jax.errors.UnexpectedTracerError:  # used inside a remat, scan or vmap
        return ()
    error, scale = np.abs(plain - apart).max(), np.abs(plain).max()
    # NaN fails as well
    return layers if error < float(jnp.finfo(op.dtype).eps) ** 0.5 * scale else ()


@jax.jit
def _products(op: "FisherOperator", u: Array) -> tuple[Array, Array]:
    """The plain product and the one that treats dense layers apart."""
    from meanfield_jax.empirical.products import outer

    return outer(op.unchecked(dense=()))[1](u), outer(op)[1](u)


def layers_after_norms(op: "FisherOperator") -> tuple[str, ...]:
    """The layers whose parameters no normalization follows.

    If all parameters of a layer are multiplied by a large number, the outputs grow with it, unless
    a normalization (or a saturating function) follows on every path.

    Returns:
        Paths of the layers: the parameters' paths without their last name.
    """
    paths = [path_name(path) for path, _ in tree_leaves_with_path(op.params)]
    small, found = _near_operator(op)[0], []
    for layer in dict.fromkeys(path.rpartition("/")[0] or path for path in paths):
        inside = np.array([path == layer or path.startswith(layer + "/") for path in paths])
        first, last = (float(_size(small, np.where(inside, f, 1.0))) for f in FACTORS)
        # NaN, after overflow, counts as growth
        if not last < first * (FACTORS[1] / FACTORS[0]) ** LEAST_POWER:
            found.append(layer)
    return tuple(found)


@jax.jit
def _size(op: "FisherOperator", factors: Array) -> Array:
    """The outputs' root mean square, with each array of parameters multiplied by a factor."""
    leaves, treedef = jax.tree.flatten(op.params)
    scaled = [
        leaf * factor.astype(leaf.dtype) for leaf, factor in zip(leaves, factors, strict=True)
    ]
    outputs = op.evaluate(treedef.unflatten(scaled), op.x)
    return jnp.sqrt(jnp.mean(outputs**2))


def _small(op: "FisherOperator", num_samples: int) -> "FisherOperator":
    """The operator on a few samples at once; arrays that are being traced become zeros."""
    rows = np.arange(num_samples) % op.num_samples

    def known(leaf: Any) -> Any:
        if not isinstance(leaf, Tracer):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return np.zeros(leaf.shape, np.uint32)  # never read: dropout is off
        return np.zeros(leaf.shape, leaf.dtype)

    def few(leaf: Any) -> Any:
        if isinstance(leaf, Tracer):
            return np.zeros((num_samples, *leaf.shape[1:]), leaf.dtype)
        return leaf[rows]

    def state(leaf: Any) -> Any:
        if isinstance(leaf, Tracer) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.ones(leaf.shape, leaf.dtype)
        return known(leaf)

    return op.unchecked(
        apply=jax.tree.map(state, op.apply),
        params=jax.tree.map(known, op.params),
        x=jax.tree.map(few, op.x),
        batch_size=None,
        mask=None,
        dense=(),
        root=None,
        likelihood="gaussian",
    )


def _near_operator(op: "FisherOperator") -> tuple["FisherOperator", np.random.Generator]:
    """The operator at random parameters and a few random inputs, and where these came from."""
    small, rng = _small(op, NUM_SAMPLES), np.random.default_rng(0)
    near = small.unchecked(params=_near(small.params, rng), x=_near_data(small.x, rng))
    return near, rng


def _near(tree: Any, rng: np.random.Generator) -> Any:
    """Random arrays near those of a tree; where these are 0, of size 1/sqrt(fan-in).

    They are NumPy's, because JAX's random numbers would take seconds to compile.

    Returns:
        A tree of the same structure, shapes and dtypes.
    """

    def moved(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        size = SIZE * np.sqrt(np.mean(np.square(leaf.astype(np.float32))))
        if not size > 0:
            size = max(1, int(np.prod(leaf.shape[:-1]))) ** -0.5
        noise = rng.standard_normal(leaf.shape, np.float32)
        return leaf + (np.float32(size) * noise).astype(leaf.dtype)

    return jax.tree.map(moved, tree)


def _near_data(x: Any, rng: np.random.Generator) -> Any:
    """Random inputs like x: numbers within its range, masks unchanged."""

    def moved(leaf: Any) -> np.ndarray:
        leaf = np.asarray(leaf)
        if leaf.size == 0 or leaf.dtype == bool:
            return leaf
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            low, high = int(leaf.min()), int(leaf.max())
            return rng.integers(low, max(high, low + 1) + 1, leaf.shape).astype(leaf.dtype)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        size = SIZE * leaf.astype(np.float32).std()
        scale = size if size > 0 else np.float32(1)
        noise = rng.standard_normal(leaf.shape, np.float32)
        near = leaf + (scale * noise).astype(leaf.dtype)
        # a model may not be defined outside the range of its data
        return np.clip(near, leaf.min(), leaf.max()) if size > 0 else near

    return jax.tree.map(moved, x)
