"""Gradients of samples and of steps: their tails, their cancellation and their noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.arguments import checked, integers
from meanfield_jax.checks import array, check_labels, function, whole
from meanfield_jax.diagnostics.capture import blocks_around, check_module, repeated_paths, unrolled
from meanfield_jax.empirical.model import Functional, Params, functional, path_name
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.limits import within

if TYPE_CHECKING:
    import xarray as xr

Loss = Callable[[Array, Array], Array]
"""Maps outputs (n, ...) and targets (n, ...) to the losses of the samples, (n,)."""


@checked(loss=function, x=array)
def gradients(model: nnx.Module, loss: Loss, x: Array, y: Array) -> dict[str, Array]:
    """The gradient of the mean loss for each weight; paths are as in :func:`activations`.

    Args:
        model: Any Flax NNX module, used in its current mode.
        loss: Maps outputs and targets to the losses of the samples, (n,), such as
            ``optax.softmax_cross_entropy_with_integer_labels``.
        x: Inputs, (n, ...).
        y: Targets, (n, ...).

    Returns:
        A dictionary from paths such as ``"layers/0/kernel"`` to arrays of the weights' shapes.

    Raises:
        SpecError, DataError: if the loss or the targets do not fit the model and the inputs.

    Example:
        >>> import jax, optax, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> x, y = jax.random.normal(jax.random.key(0), (100, 8)), jax.numpy.arange(100) % 3
        >>> loss = optax.softmax_cross_entropy_with_integer_labels
        >>> sorted(mf.diagnostics.gradients(model, loss, x, y))[:2]
        ['layers/0/bias', 'layers/0/kernel']
    """
    apply, params, x, y = _prepared(model, loss, x, y)
    blocks, axes = repeated_paths(model), _repeated_axes(model, params)
    slope = _gradient(apply, params, loss, x, y)
    return unrolled({name: (slope[name], axes[name]) for name in params}, blocks)


@partial(jax.jit, static_argnames="loss")
def _gradient(apply: Functional, params: Params, loss: Loss, x: Array, y: Array) -> Params:
    return jax.grad(lambda params: loss(apply(params, x), y).mean())(params)


def _repeated_axes(model: nnx.Module, params: Params) -> dict[str, int]:
    """For each weight, how many of its leading axes run over repetitions of a block."""
    blocks = repeated_paths(model)
    return {name: len(blocks_around(name, blocks)) for name in params}


@checked()
def gradient_tails(grads: Any, *, tail_share: float = 0.01) -> xr.Dataset:
    r"""How heavy the tails of the distribution over the entries of each weight's gradient are.

    They are measured by the kurtosis, which is 3 for a Gaussian, and by Hill's estimate of the
    exponent of a power law P(|g| > t) ~ t^-alpha from the k largest of n entries
    |g|_1 >= |g|_2 >= ...:

    .. math::
        \kappa = E(g - \bar g)^4 / Var(g)^2, \quad
        1/\hat\alpha = \frac{1}{k} \sum_{i \le k} \log(|g|_i / |g|_{k+1})

    The smaller alpha is, the heavier the tail. Below 4 there is no fourth moment, and the kurtosis
    only grows with n. For Gaussian entries Hill's estimate is 9.0 at the largest hundredth.

    Args:
        grads: By weight, as :func:`gradients` returns them; any other pytree of arrays will do.
        tail_share: The fraction k / n.

    Returns:
        A dataset over ``weight``: ``kurtosis``, ``tail_index`` (alpha), its ``tail_index_error``
        (alpha / sqrt(k), for independent entries) and ``num_tail`` (k). NaN where all entries are
        equal, or where fewer than k + 1 differ from 0.

    Raises:
        SpecError: if ``tail_share`` is outside (0, 1).

    Accuracy:
        Within 4 standard errors on 10^6 entries of a power law with alpha = 3
        (tests/test_diagnostics.py).

    Example:
        >>> import jax, meanfield_jax as mf
        >>> grads = {"layers/0/kernel": jax.random.normal(jax.random.key(0), (300, 300))}
        >>> print(f"{float(mf.diagnostics.gradient_tails(grads).kurtosis[0]):.1f}")
        3.0

    Source:
        Hill 1975 (Annals of Statistics 3, 1163); heavy tails: Bjorck et al. 2018
        (arXiv:1806.02375), section 3.2.
    """
    import xarray as xr

    if not 0 < tail_share < 1:
        raise problem(SpecError, "tail_share", tail_share, "must be in (0, 1)", "pass e.g. 0.01")
    leaves = jax.tree_util.tree_flatten_with_path(grads)[0]
    rows = {path_name(p).removesuffix("/value"): _tails(leaf, tail_share) for p, leaf in leaves}
    table = np.array(list(rows.values())).reshape(-1, 4)
    names = ("kurtosis", "tail_index", "tail_index_error", "num_tail")
    columns = {name: ("weight", table[:, column]) for column, name in enumerate(names)}
    return xr.Dataset(columns, dict(weight=list(rows)))


def _tails(grad: Array, tail_share: float) -> tuple[float, float, float, int]:
    entries = np.asarray(grad, np.float64).ravel()
    centred = entries - entries.mean()
    variance, fourth = np.mean(centred**2), np.mean(centred**4)
    kurtosis = fourth / variance**2 if variance > 0 else math.nan
    count = max(1, int(tail_share * entries.size))
    largest = np.sort(np.abs(entries))[::-1][: count + 1]
    if len(largest) <= count or largest[-1] == 0 or largest[0] == largest[-1]:
        return kurtosis, math.nan, math.nan, count
    index = 1 / float(np.mean(np.log(largest[:-1] / largest[-1])))
    return kurtosis, index, index / math.sqrt(count), count


@checked(loss=function, x=array)
def input_dependence(model: nnx.Module, loss: Loss, x: Array, y: Array) -> xr.Dataset:
    r"""How far the samples' gradients cancel: 1 where they are equal for all inputs.

    .. math:: \sum_w |\sum_i g_{iw}| \, / \, \sum_w \sum_i |g_{iw}|

    g_i is the gradient of the i-th sample's loss, and w runs over the entries of a weight.
    Unrelated gradients of n samples give about n^(-1/2). In training mode a BatchNorm couples the
    samples; g_i then includes the derivatives through the statistics of the whole batch. A bias in
    front of a BatchNorm has no gradient except for rounding errors.

    Args:
        model: Any Flax NNX module, used in its current mode.
        loss: Maps outputs and targets to the losses of the samples, (n,), such as
            ``optax.softmax_cross_entropy_with_integer_labels``.
        x: Inputs, (n, ...).
        y: Targets, (n, ...).

    Returns:
        A dataset over ``weight``: ``ratio``, its numerator ``of_sum`` and its denominator
        ``of_absolutes``. It takes one backward pass through the batch for each sample, and the
        memory of one sample's gradient.

    Raises:
        SpecError, DataError: if the loss or the targets do not fit the model and the inputs.

    Example:
        >>> import jax, optax, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> x, y = jax.random.normal(jax.random.key(0), (100, 8)), jax.numpy.arange(100) % 3
        >>> loss = optax.softmax_cross_entropy_with_integer_labels
        >>> found = mf.diagnostics.input_dependence(model, loss, x, y)
        >>> bool((found.ratio < 1).all())
        True

    Source:
        Bjorck, Gomes, Selman & Weinberger 2018 (arXiv:1806.02375), section 3.2.

        Departure: the paper also takes absolute values separately for the positions of a
        convolution, here only for samples. With BatchNorm, it splits the batch's gradient by the
        samples whose activations it passes through; here it is split by the samples' losses.
    """
    import xarray as xr

    apply, params, x, y = _prepared(model, loss, x, y)
    blocks, axes = repeated_paths(model), _repeated_axes(model, params)
    sums = _sums(apply, params, loss, tuple(axes.items()), x, y)
    by_weight = [
        unrolled({name: (part[name], axes[name]) for name in params}, blocks) for part in sums
    ]
    names = list(by_weight[0])
    above, below = (np.array([part[name] for name in names], np.float64) for part in by_weight)
    with np.errstate(invalid="ignore"):
        ratio = above / below
    columns = dict(ratio=ratio, of_sum=above, of_absolutes=below)
    data = {name: ("weight", column) for name, column in columns.items()}
    return xr.Dataset(data, dict(weight=names))


@partial(jax.jit, static_argnames=("loss", "axes"))
def _sums(
    apply: Functional,
    params: Params,
    loss: Loss,
    axes: tuple[tuple[str, int], ...],
    x: Array,
    y: Array,
) -> tuple[Params, Params]:
    """For each weight, the sums over its entries of |sum_i g_i| and of sum_i |g_i|."""
    gradient = _pullback(apply, params, loss, x, y)

    def over_entries(gradient: Params) -> Params:
        return {
            name: jnp.abs(gradient[name]).sum(tuple(range(kept, gradient[name].ndim)))
            for name, kept in axes
        }

    def add(total: Params, index: Array) -> tuple[Params, None]:
        own = over_entries(gradient(jnp.zeros(len(x)).at[index].set(1)))
        return jax.tree.map(jnp.add, total, own), None

    zero = jax.tree.map(jnp.zeros_like, over_entries(params))
    of_absolutes, _ = jax.lax.scan(add, zero, jnp.arange(len(x)))
    return over_entries(gradient(jnp.ones(len(x)))), of_absolutes


@checked(loss=function, x=array, batch_size=integers)
def gradient_noise(
    model: nnx.Module,
    loss: Loss,
    x: Array,
    y: Array,
    *,
    learning_rate: float | Array,
    batch_size: int | Array,
    num_batches: int = 100,
    seed: int = 0,
) -> xr.Dataset:
    r"""The noise of a step of SGD: its bound, and its value measured on random batches.

    .. math::
        E |\eta g_B - \eta g|^2 = \frac{\eta^2}{B} C, \quad C = \frac{1}{n} \sum_i |g_i - g|^2

    g_i is the gradient of the i-th sample's loss, g their mean, g_B the mean over a batch of B
    samples drawn with replacement. The equation holds where samples do not interact. With BatchNorm
    in training mode it does not hold: each batch has its own statistics, and the mean of g_B is not
    g.

    Args:
        model: Any Flax NNX module, used in its current mode.
        loss: Maps outputs and targets to the losses of the samples, (n,).
        x: Inputs, (n, ...).
        y: Targets, (n, ...).
        learning_rate: eta, one number or several.
        batch_size: B, one integer or several.
        num_batches: Number of batches of each size.
        seed: Seed of the batches.

    Returns:
        A dataset over ``learning_rate`` and ``batch_size``: ``bound``, the right-hand side,
        ``measured``, the left-hand side, and its ``standard_error``; ``sample_variance`` is C.

    Raises:
        SpecError, DataError: if the loss, the targets or the numbers cannot be used.

    Accuracy:
        Without BatchNorm, ``measured`` equals ``bound`` within 4 standard errors
        (tests/test_diagnostics.py).

    Example:
        >>> import jax, optax, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> x, y = jax.random.normal(jax.random.key(0), (100, 8)), jax.numpy.arange(100) % 3
        >>> loss = optax.softmax_cross_entropy_with_integer_labels
        >>> noise = mf.diagnostics.gradient_noise(
        ...     model, loss, x, y, learning_rate=[0.1, 0.2], batch_size=[4, 16]
        ... )
        >>> print((noise.bound / noise.bound[0, 0]).values)
        [[1.   0.25]
         [4.   1.  ]]

    Source:
        Bjorck et al. 2018 (arXiv:1806.02375), section 2.1.
    """
    import xarray as xr

    apply, params, x, y = _prepared(model, loss, x, y)
    rates = np.atleast_1d(np.asarray(learning_rate, np.float64))
    sizes = np.atleast_1d(np.asarray(batch_size))
    if not np.all(np.isfinite(rates) & (rates >= 0)):
        raise problem(
            SpecError, "learning_rate", rates.tolist(), "must be finite and >= 0", "pass e.g. 0.1"
        )
    for size in sizes.tolist():
        whole("batch_size", size, 1)
    num_batches = whole("num_batches", num_batches, 2)
    within("MEMORY", "num_batches", num_batches, 8 * num_batches * float(sizes.max()))
    mean, variance = _sample_variance(apply, params, loss, x, y)
    spread = []
    for size, key in zip(
        sizes.tolist(), jax.random.split(jax.random.key(seed), len(sizes)), strict=True
    ):
        rows = jax.random.randint(key, (num_batches, size), 0, len(x))
        squares = np.asarray(_deviations(apply, params, loss, x, y, mean, rows), np.float64)
        spread.append((squares.mean(), squares.std(ddof=1) / math.sqrt(num_batches)))
    measured, error = np.array(spread).T
    dims, square = ("learning_rate", "batch_size"), rates[:, None] ** 2
    columns = dict(
        bound=(dims, square * float(variance) / sizes),
        measured=(dims, square * measured),
        standard_error=(dims, square * error),
        sample_variance=((), float(variance)),
    )
    return xr.Dataset(columns, dict(learning_rate=rates, batch_size=sizes))


@partial(jax.jit, static_argnames="loss")
def _sample_variance(apply: Functional, params: Params, loss: Loss, x: Array, y: Array):
    """The mean gradient, and the mean squared distance of the samples' gradients from it."""
    gradient = _pullback(apply, params, loss, x, y)
    mean = gradient(jnp.full(len(x), 1 / len(x)))

    def distance(index: Array) -> Array:
        return _square(gradient(jnp.zeros(len(x)).at[index].set(1)), mean)

    return mean, jax.lax.map(distance, jnp.arange(len(x))).mean()


@partial(jax.jit, static_argnames="loss")
def _deviations(
    apply: Functional, params: Params, loss: Loss, x: Array, y: Array, mean: Params, rows: Array
) -> Array:
    """Squared distances of the batches' gradients from the mean gradient, (batches,)."""

    def distance(rows: Array) -> Array:
        return _square(_gradient(apply, params, loss, x[rows], y[rows]), mean)

    return jax.lax.map(distance, rows)


def _pullback(
    apply: Functional, params: Params, loss: Loss, x: Array, y: Array
) -> Callable[[Array], Params]:
    """The function from weights (n,) of the samples' losses to the gradient of the weighted sum."""
    losses, back = jax.vjp(lambda params: loss(apply(params, x), y), params)
    return lambda weights: back(weights.astype(losses.dtype))[0]


def _square(a: Params, b: Params) -> Array:
    """|a - b|^2 over all weights."""
    squares: Iterator[Array] = (jnp.sum((a[name] - b[name]) ** 2) for name in a)
    return sum(squares, jnp.zeros(()))


def _prepared(
    model: nnx.Module, loss: Loss, x: Array, y: Array
) -> tuple[Functional, Params, Array, Array]:
    """The model as a function, and the data as arrays; raises if they do not fit."""
    check_module(model)
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or len(x) == 0:
        cause = f"the inputs have shape {x.shape}"
        raise problem(DataError, "y.shape", y.shape, cause, "pass one target for each input")
    apply, params = functional(model)
    outputs = jax.eval_shape(apply, params, x)
    if y.ndim == 1 and jnp.issubdtype(y.dtype, jnp.integer) and getattr(outputs, "ndim", 0) == 2:
        check_labels("y", y, max(outputs.shape[1], 2))
    try:
        shape = jax.eval_shape(loss, outputs, y).shape
    except (TypeError, ValueError, AttributeError, LookupError) as error:
        cause = f"cannot be applied to outputs and y ({' '.join(str(error).split())[:200]})"
        remedy = "pass a function such as optax.softmax_cross_entropy_with_integer_labels"
        raise problem(SpecError, "loss", loss, cause, remedy) from error
    if shape != (len(x),):
        remedy = f"return the samples' losses, {(len(x),)}, not their mean"
        raise problem(SpecError, "loss", shape, "the returned shape is wrong", remedy)
    return apply, params, x, y
