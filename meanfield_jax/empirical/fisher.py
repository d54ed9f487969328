"""The Fisher information matrix of a network as a linear operator, in output space.

F = (1/n) J^T J on P parameters and its dual (1/n) J J^T on n C outputs have the same non-zero
eigenvalues. The dual's vectors are small (n C = 10^4 where P = 3 10^6), its dot products exact
enough in float32, and re-orthogonalisation costs nothing.

A product needs one backward and one forward pass through the network linearized once. A dense
layer with inputs H (n x N) is treated apart: J_l J_l^T delta = (H H^T + 1) delta, so its weights'
gradient is never formed; for n < 2N that is cheaper.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.tree_util import Partial

from meanfield_jax import precise
from meanfield_jax.empirical.model import (
    Functional,
    check_mode,
    couples_samples,
    functional,
    has_batch_statistics,
    in_mode,
    path_name,
)
from meanfield_jax.errors import SpecError, check_choice, check_data, problem
from meanfield_jax.theory.likelihood import LIKELIHOODS

Product = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherOperator:
    """(1/n) Lambda^{1/2} J J^T Lambda^{1/2}, the Fisher matrix's dual, of any ``apply(params, x)``.

    J is the (n C) x P Jacobian; Lambda is 1 for the Gaussian likelihood (squared loss) and
    diag(p) - p p^T per sample, p = softmax(f), for the categorical one (cross-entropy).

    Args:
        apply: A pure function of parameters and inputs, (samples, C). Linen: ``module.apply``.
        params: Any pytree of floating-point arrays.
        x: Inputs, (n, ...).
        likelihood: ``"gaussian"`` or ``"categorical"``.
        batch_size: Samples linearized at a time, so that memory stays bounded; the network is then
            evaluated anew in every product. None: all at once.
        only: Path of the parameters that count, others held constant; see :meth:`block`.

    Raises:
        SpecError: for options that cannot be met; DataError for inputs that cannot be used.

    Example:
        >>> import jax, jax.numpy as jnp, meanfield_jax as mf
        >>> apply = lambda params, x: jnp.tanh(x @ params["w"])
        >>> x = jax.random.normal(jax.random.key(0), (50, 4))
        >>> op = mf.FisherOperator(apply, {"w": jnp.ones((4, 3))}, x)
        >>> op.shape
        (50, 3)
    """

    apply: Callable[..., Array]
    params: Any
    x: Array
    likelihood: str = dataclasses.field(default="gaussian", metadata=dict(static=True))
    batch_size: int | None = dataclasses.field(default=None, metadata=dict(static=True))
    only: str | None = dataclasses.field(default=None, metadata=dict(static=True))

    def __post_init__(self):
        if not isinstance(self.apply, (Functional, Partial)) and callable(self.apply):
            object.__setattr__(self, "apply", Partial(self.apply))
        check_choice("likelihood", self.likelihood, LIKELIHOODS)
        if isinstance(self.x, (np.ndarray, jax.Array)) and not isinstance(self.x, Tracer):
            object.__setattr__(self, "x", check_data(self.x))
            self._check_batch_size()

    def _check_batch_size(self) -> None:
        if self.batch_size is None:
            return
        if self.batch_size < 1:
            cause, remedy = "not a number of samples", "give a whole number >= 1, or None"
            raise problem(SpecError, "batch_size", self.batch_size, cause, remedy)
        if self.x.shape[0] >= 2 and couples_samples(self.apply, self.params, self.x):
            cause = "the outputs depend on the whole batch (BatchNorm in training)"
            remedy = "leave batch_size out, or measure with statistics='frozen'"
            raise problem(SpecError, "batch_size", self.batch_size, cause, remedy)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, C): the shape of the vectors the operator acts on."""
        return self._outputs.shape  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the vectors."""
        return self._outputs.dtype

    @functools.cached_property
    def _outputs(self) -> jax.ShapeDtypeStruct:
        # tracing the network costs milliseconds, and a search asks more than once
        return jax.eval_shape(self.apply, self.params, self.x)

    def evaluate(self, params: Any, x: Array) -> Array:
        """The outputs, with products in full precision wherever the model asks for none."""
        with precise.by_default():
            return self.apply(params, x)

    @property
    def paths(self) -> list[str]:
        """Names of the parameters; any prefix up to a "/" is a block."""
        return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(self.params)]

    def block(self, path: str) -> Self:
        """The operator of one layer's (or one array's) parameters, the others held constant.

        Args:
            path: Such as ``"layers/2"`` or ``"layers/2/kernel"``; see :attr:`paths`.

        Returns:
            An operator on the same batch, for the block of F that belongs to these parameters.

        Raises:
            SpecError: if no parameter is below the path.
        """
        if not any(_below(path, name) for name in self.paths):
            remedy = f"use one of {', '.join(self.paths)}, or what stands before a /"
            raise problem(SpecError, "path", path, "no parameters there", remedy)
        return dataclasses.replace(self, only=path)

    def linearize(self) -> Product:
        """Evaluates the network once; returns u -> F u, (n, C) to (n, C)."""
        if self.batch_size is None:
            outputs, jacobian_product = _whole(self)
        else:
            outputs, jacobian_product = _in_batches(self, self.batch_size)
        factor, transposed = _likelihood_factor(self.likelihood, outputs)
        return lambda u: transposed(jacobian_product(factor(u))) / self.x.shape[0]

    def parameter_product(self, vector: Any) -> Any:
        """F v in parameter space, for a pytree like ``params``: J^T Lambda J v / n."""
        outputs, pushforward = jax.linearize(lambda p: self.evaluate(p, self.x), self.params)
        factor, transposed = _likelihood_factor(self.likelihood, outputs)
        (product,) = jax.linear_transpose(pushforward, self.params)(
            factor(transposed(pushforward(vector)))
        )
        return jax.tree.map(lambda leaf: leaf / self.x.shape[0], product)


def fisher_operator(
    model: nnx.Module,
    x: Array,
    *,
    statistics: str = "batch",
    likelihood: str = "gaussian",
    batch_size: int | None = None,
) -> FisherOperator:
    """The Fisher information matrix of a Flax NNX model on a batch, as an operator.

    Args:
        model: Any NNX model, of this package or not; its own mode does not matter.
        x: Inputs, (n, *input_shape).
        statistics: ``"batch"``: BatchNorm normalizes by the batch and the statistics' derivatives
            count, as in training. ``"frozen"``: it uses its running statistics, as constants; set
            them by training or :func:`calibrate`.
        likelihood: ``"gaussian"`` (squared loss) or ``"categorical"`` (cross-entropy).
        batch_size: Samples at a time; only where samples are independent.

    Returns:
        The operator, to be given to :func:`top_eigenvalues` or :func:`spectral_density`.

    Raises:
        SpecError: where the model would silently be measured in another mode than asked for, or
            an option cannot be met. DataError: for inputs that cannot be used.

    Accuracy:
        Products in full float32 precision; against the dense matrix in tests/test_operator.py.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> op = mf.fisher_operator(mf.build(net, rngs=nnx.Rngs(0)), x)
        >>> mf.top_eigenvalues(op, k=3).eigenvalues.shape
        (3,)
    """
    if not isinstance(model, nnx.Module):
        remedy = "give an nnx.Module, or use FisherOperator(apply, params, x)"
        raise problem(SpecError, "model", type(model).__name__, "not a Flax NNX model", remedy)
    if statistics not in ("batch", "frozen"):
        cause, remedy = "not a mode of a network", "use 'batch' or 'frozen'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    x = check_data(x)
    model = in_mode(model, statistics)
    if has_batch_statistics(model):
        check_mode(model, x, statistics)
    apply, params = functional(model)
    return FisherOperator(apply, params, x, likelihood, batch_size)


def _below(path: str | None, name: str) -> bool:
    return path is None or name == path or name.startswith(path + "/")


def _whole(op: FisherOperator) -> tuple[Array, Product]:
    """Outputs and u -> J J^T u, with dense layers treated apart where that is cheaper."""
    named, treedef = jax.tree_util.tree_flatten_with_path(op.params)
    params = {path_name(path): value for path, value in named}
    taps, grams = _dense_layers(op, params)
    tapped = {f"{layer}/{kind}" for layer in taps for kind in ("kernel", "bias")}
    active = {k: v for k, v in params.items() if k not in tapped and _below(op.only, k)}

    def outputs_of(active, taps) -> Array:
        full = jax.tree.unflatten(treedef, (params | active).values())
        if isinstance(op.apply, Functional):
            with precise.by_default():
                return op.apply.with_taps(full, taps, op.x)[0]
        return op.evaluate(full, op.x)

    outputs, pushforward = jax.linearize(outputs_of, active, taps)
    pullback = jax.linear_transpose(pushforward, active, taps)

    def product(u: Array) -> Array:
        gradient, deltas = pullback(u)
        moved = {name: precise.matmul(grams[name], deltas[name]) for name in deltas}
        return pushforward(gradient, moved)

    return outputs, product


def _dense_layers(op: FisherOperator, params: dict[str, Array]) -> tuple[dict, dict]:
    """Zero taps and input Gram matrices (n, n) of the Linear layers worth it, by path."""
    if not isinstance(op.apply, Functional):
        return {}, {}
    with precise.by_default():
        _, inputs = op.apply.with_taps(params, {}, op.x)
    taps, grams = {}, {}
    for name, values in inputs.items():
        kernel, bias = (_below(op.only, f"{name}/{kind}") for kind in ("kernel", "bias"))
        has_bias = f"{name}/bias" in params
        worth_it = values.ndim == 2 and values.shape[0] < 2 * values.shape[1]
        if worth_it and (kernel or (bias and has_bias)):
            gram = jnp.full((values.shape[0],) * 2, float(bias and has_bias), values.dtype)
            if kernel:
                gram += precise.matmul(values, values.T)
            grams[name] = gram
            width = params[f"{name}/kernel"].shape[1]
            taps[name] = jnp.zeros((values.shape[0], width), values.dtype)
    return taps, grams


def _in_batches(op: FisherOperator, batch_size: int) -> tuple[Array, Product]:
    """The same a batch at a time; the last batch is filled up with zeros that count for nothing."""
    num_samples = op.x.shape[0]
    missing = -num_samples % batch_size
    select = jax.tree_util.tree_map_with_path
    params = op.params

    def split(array: Array) -> Array:
        padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(-1, batch_size, *array.shape[1:])

    def join(batches: Array) -> Array:
        return batches.reshape(-1, *batches.shape[2:])[:num_samples]

    def masked(gradient):
        return select(
            lambda path, leaf: leaf if _below(op.only, path_name(path)) else 0 * leaf, gradient
        )

    batches = split(op.x)

    def product(u: Array) -> Array:
        def add_gradient(total, batch):
            x, part = batch
            (gradient,) = jax.vjp(lambda p: op.evaluate(p, x), params)[1](part)
            return jax.tree.map(jnp.add, total, gradient), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        gradient, _ = jax.lax.scan(add_gradient, zeros, (batches, split(u)))
        gradient = masked(gradient)
        forward = lambda x: jax.jvp(lambda p: op.evaluate(p, x), (params,), (gradient,))[1]  # noqa: E731
        return join(jax.lax.map(forward, batches))

    return join(jax.lax.map(lambda x: op.evaluate(params, x), batches)), product


def _likelihood_factor(likelihood: str, outputs: Array) -> tuple[Product, Product]:
    """B and B^T with B B^T = Lambda for every sample: B = diag(s) (1 - s s^T), s = sqrt(p)."""
    if likelihood == "gaussian":
        return (lambda u: u), (lambda u: u)
    root = jnp.sqrt(jax.nn.softmax(outputs, axis=-1))

    def project(u: Array) -> Array:
        return u - root * jnp.sum(root * u, axis=-1, keepdims=True)

    return (lambda u: root * project(u)), (lambda u: project(root * u))
