"""The largest eigenvalues of drawn networks: what one network has where the wide limit has not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice, check_data, whole
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.linearized import loops_on_host, multiply_rows
from meanfield_jax.empirical.mode import MODES
from meanfield_jax.empirical.model import batch_statistics, build, functional, in_mode
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.pytree import pytree
from meanfield_jax.status import Status, first_failure

INSIDE = 0.9
"""The fraction of all draws that ``interval`` is meant to hold."""


Found = tuple[Array, Array, Array]
"""Eigenvalues, number of products and status of a draw."""


class Asked(NamedTuple):
    """What is asked of every draw.

    Attributes:
        shape: Shape of the batch.
        k: The number of eigenvalues.
        layers: Paths of the layers whose parameters count; (): all.
        statistics: ``"batch"`` or ``"frozen"``.
        likelihood: ``"gaussian"`` or ``"categorical"``.
    """

    shape: tuple[int, ...]
    k: int
    layers: tuple[str, ...]
    statistics: str
    likelihood: str


@pytree
class DrawnEigenvalues:
    """The k largest eigenvalues of the Fisher matrices of drawn networks.

    Attributes:
        eigenvalues: (draws, k), descending for each draw.
        num_matvecs: (draws,), the number of products with the Fisher matrix.
        status: (draws,), a :class:`Status` as an integer.
    """

    eigenvalues: Float[Array, "*batch draws k"]
    num_matvecs: Int[Array, "*batch draws"]
    status: Int[Array, "*batch draws"]

    @property
    def lambda_max(self) -> Float[Array, "*batch"]:
        """The largest eigenvalue of the median draw."""
        return jnp.median(self.eigenvalues[..., 0], axis=-1)

    @property
    def interval(self) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
        """Bounds between which ``lambda_max`` of another draw lies in 90 % of the cases.

        For m draws whose logarithms are normal, with mean y and standard deviation s, they are
        exp(y -+ t s sqrt(1 + 1/m)), where t is the 95 % quantile of Student's distribution with
        m - 1 degrees of freedom. For one draw they are NaN.
        """
        import scipy.stats  # here, because it takes a second to import

        logs = jnp.log(self.eigenvalues[..., 0])
        draws = logs.shape[-1]
        quantile = float(scipy.stats.t.ppf((1 + INSIDE) / 2, draws - 1))
        width = quantile * (1 + 1 / draws) ** 0.5 * jnp.std(logs, axis=-1, ddof=1)
        return jnp.exp(logs.mean(-1) - width), jnp.exp(logs.mean(-1) + width)

    def raise_if_failed(self) -> DrawnEigenvalues:
        """Returns itself, or raises for the first draw that failed (host only).

        Raises:
            RuntimeError: if the status is not CONVERGED.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        cause = "a product is not finite: use smaller scales and variances"
        if failed.status != Status.NOT_FINITE:
            cause = "the search has not converged: raise tol"
        raise RuntimeError(f"drawn_eigenvalues{failed.where}: {cause}")


@checked()
def drawn_eigenvalues(
    network: Network,
    data: Array | None = None,
    *,
    num_samples: int | Array | None = None,
    k: int = 1,
    draws: int = 8,
    layers: Sequence[str] = (),
    statistics: str = "batch",
    likelihood: str = "gaussian",
    tol: float = 1e-3,
    seed: int = 0,
) -> DrawnEigenvalues:
    r"""The largest eigenvalues of the Fisher matrix at finite width, by Lanczos on drawn networks.

    Theory is of wide networks. Where they are narrow, deep or convolutional, or where theory takes
    long, this is the answer to the same question: networks of the specification are drawn, and the
    largest eigenvalues of each are computed. Inside ``jax.jit`` and ``jax.vmap`` all draws are one
    program. The eigenvalues can be differentiated in the numbers of the network, such as gamma,
    with the random numbers held constant: the weights are sqrt(weight_var / fan_in) times a
    standard normal draw, and

    .. math:: \frac{d\lambda}{d\gamma} = u^T \frac{dF}{d\gamma} u

    for the eigenvector u.

    Args:
        network: The specification.
        data: A batch, (n, *input_shape). None: standard normal inputs, drawn anew for each network.
        num_samples: The batch size n if there are no data.
        k: The number of eigenvalues.
        draws: The number of networks.
        layers: Paths of layers, such as ``"layers/2"``, all of whose parameters count; (): all.
        statistics: ``"batch"``: as in training; ``"frozen"``: as in evaluation, with the statistics
            of this batch.
        likelihood: ``"gaussian"`` or ``"categorical"`` (with each draw's own softmax), see
            :class:`FisherOperator`.
        tol: Relative accuracy of the eigenvalues.
        seed: Seed of all draws.

    Returns:
        The eigenvalues of each draw, with their median and the interval of another draw.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Accuracy:
        Eigenvalues to ``tol``, in float32. The relative standard error of the median is 1.25 s /
        sqrt(draws), where s is the relative scatter of the draws: 1 % for wide networks, 10 to 30 %
        for narrow ones (see benchmarks/finite_width.py).

    Example:
        >>> import meanfield_jax as mf
        >>> net = mf.mlp([30] * 8, inputs=30, outputs=3, norm=mf.BatchNorm())
        >>> found = mf.drawn_eigenvalues(net, num_samples=50, draws=4)
        >>> low, high = found.interval
        >>> found.eigenvalues.shape, bool(low < found.lambda_max < high)
        ((4, 1), True)
    """
    network.validate()
    check_choice("statistics", statistics, MODES)
    check_choice("likelihood", likelihood, ("gaussian", "categorical"))
    check_draws(draws, data, num_samples)
    if data is None:
        shape = (whole("num_samples", num_samples, 1), *network.input_shape)
        within("MEMORY", "num_samples", num_samples, 4.0 * math.prod(shape))
    else:
        data = check_data(data).astype(jnp.float32)
        shape = data.shape
        if shape[1:] != network.input_shape:
            remedy = f"pass (samples, {', '.join(map(str, network.input_shape))})"
            raise problem(DataError, "data.shape", shape, "does not fit the network", remedy)
    within("MEMORY", "draws", draws, 8.0 * draws * k)
    asked = Asked(shape, k, tuple(layers), statistics, likelihood)
    first = jax.random.key(seed)
    if not loops_on_host(network, data, tol, first):
        keys = jax.vmap(partial(jax.random.fold_in, first))(jnp.arange(draws))
        return DrawnEigenvalues(*_all(network, data, keys, tol, asked))
    each, op = [], None
    for number in range(draws):
        key = jax.random.fold_in(first, number)
        op = _operator(network, data, key, asked, op)
        each.append(_eigenvalues(op, key, tol, asked))
    # jnp.stack, and jnp.asarray, would be compiled for each number of draws
    return DrawnEigenvalues(*(jax.device_put(np.stack(part)) for part in zip(*each, strict=True)))


def check_draws(draws: int, data: Array | None, num_samples: Any) -> None:
    """Raises SpecError if there are no networks to draw, or if the size of the batch is unknown."""
    if draws < 1:
        raise problem(SpecError, "draws", draws, "must be at least 1", "pass a positive integer")
    if data is None and (num_samples is None or isinstance(num_samples, Tracer)):
        cause, remedy = "drawn networks need a batch", "pass a positive integer, or data"
        raise problem(SpecError, "num_samples", None, cause, remedy)


@partial(jax.jit, static_argnames="asked")
def _all(network: Network, data: Array | None, keys: Array, tol: Any, asked: Asked) -> Found:
    """All draws in one program, one after the other, with the memory of one."""

    def one(key: Array) -> Found:
        return _eigenvalues(_operator(network, data, key, asked, None), key, tol, asked)

    return jax.lax.map(one, keys)


def _operator(
    network: Network,
    data: Array | None,
    key: Array,
    asked: Asked,
    like: FisherOperator | None,
) -> FisherOperator:
    """The operator of a draw; what is known of that of another draw is not found out again."""
    weights, inputs = jax.random.split(key)
    x = jax.random.normal(inputs, asked.shape, jnp.float32) if data is None else data
    model = build(network, rngs=nnx.Rngs(weights))
    if asked.statistics == "frozen":
        nnx.update(model, batch_statistics(model, x))
    apply, params = functional(in_mode(model, asked.statistics))
    if like is None:
        op = FisherOperator(apply, params, x, asked.likelihood)
        return op.block(*asked.layers) if asked.layers else op
    return like.unchecked(apply=apply, params=params, x=x, outputs=like.outputs)


def _eigenvalues(op: FisherOperator, key: Array, tol: float | Array, asked: Asked) -> Found:
    """The eigenvalues of one draw, the number of products and the status."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(op))
    fixed = jax.lax.stop_gradient(op) if traced else op  # the search is not differentiated
    tolerance: Any = tol  # a number, or one that is being traced
    found = top_eigenvalues(fixed.dual, asked.k, tol=tolerance, key=key, vectors=traced)
    values = found.eigenvalues
    if found.eigenvectors is not None:  # with the derivatives of u^T A u
        values = jnp.sum(found.eigenvectors * multiply_rows(op.dual, found.eigenvectors), -1)
    return values, found.num_matvecs, found.status
