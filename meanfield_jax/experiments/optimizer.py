"""The optimizer that follows from a spectrum: predicted of a specification, measured of a model."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.empirical.fisher import FisherOperator, fisher_operator
from meanfield_jax.empirical.generic import couples_samples
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.model import path_name
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.network import Network
from meanfield_jax.theory.fisher import MARGIN, Fisher
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.propagate import analyze


def optimizer(
    network: Network,
    momentum: float = 0.9,
    fraction: float = 0.5,
    *,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | None = None,
    per_layer: bool = False,
) -> optax.GradientTransformation:
    r"""Heavy-ball gradient descent at a share of the largest stable learning rate of a network.

    .. math:: \eta = \mathrm{fraction} \cdot 2 (1 + \mu) / \lambda_{max}

    With a rate eta_l for each layer the step is D = diag(eta_l) times the gradient: heavy ball at
    rate 1 on D^{1/2} F D^{1/2}, stable if and only if that matrix' largest eigenvalue is below
    2 (1 + mu). Its dual is sum_l eta_l Theta_l / n, Theta_l the layer's part of the tangent kernel.
    For i.i.d. inputs and a wide network all Theta_l have the same eigenvectors, so eigenvalues are
    linear in the rates: sum_l eta_l f_l (outliers) and sum_l eta_l b_l (bulk), f_l and b_l the
    layer's shares. ``per_layer`` gives the layers equal parts, whichever they have more of,

    .. math:: \eta_l = \frac{a}{\max(f_l, 2 b_l)}, \quad
        \max\Big(\sum_l \eta_l f_l, 2 \sum_l \eta_l b_l\Big) = \mathrm{fraction} \cdot 2 (1 + \mu)

    (a from the second equation; a layer that the outliers do not see is bounded by the bulk). The
    bulk counts twice since finite width lifts its edge: 1.3 to 2.2 times, see ``Fisher.bulk_high``.

    Args:
        network: The specification; the optimizer is for the parameters of what
            :func:`meanfield_jax.build` makes of it.
        momentum: mu of the heavy ball.
        fraction: Of the largest stable rate.
        data: A batch to be trained on, as in :func:`meanfield_jax.analyze`. On data b_l are scaled
            up from the mean of what is no outlier to the kernel's second eigenvalue.
        statistics: As there.
        num_samples: As there, the batch size for i.i.d. inputs; None: the limit of large batches.
        per_layer: Whether every layer with parameters has a rate of its own; a BatchNorm's scale
            and offset count as one. Needs ``data`` or ``num_samples``.

    Returns:
        An optax transformation, for ``mf.train(optimizer=...)``, ``nnx.Optimizer``, or
        ``apply`` and ``params`` of :func:`meanfield_jax.functional`.

    Raises:
        SpecError, DataError: for inputs that make no sense.

    Accuracy:
        That of ``theory.eta_max()``, in its domain (``theory.fisher.outlier_limited``); for the
        squared loss only. The layers' shares: tests/test_optimizer.py.

    Example:
        >>> import meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rule = mf.optimizer(net, data=x[:100], per_layer=True)
        >>> run = mf.train(net, (x, labels), optimizer=rule, epochs=5)
        >>> bool(run.loss[-1] < 0.2 * run.loss[0])
        True

    Source:
        Polyak 1964; Wei, Stokes & Schwab 2019 (arXiv:1903.02606), equation 6; the rates by layer
        are derived above.
    """
    _check_fraction(fraction)
    theory = analyze(network, data=data, statistics=statistics, num_samples=num_samples)
    if not isinstance(theory.status, Tracer):
        theory.raise_if_failed()
    if not per_layer:
        return optax.sgd(fraction * theory.eta_max(momentum), momentum)
    if data is None and num_samples is None:
        cause = "large batches have no bulk, which bounds the layers that the outliers do not see"
        raise problem(SpecError, "num_samples", None, cause, "give the batch size, or data")
    rates = fraction * eta_max(1.0, momentum) * _equal_parts(theory.fisher)
    return optax.chain(optax.trace(momentum), _scaled(_by_path(theory.fisher.shares.layers, rates)))


def _equal_parts(fisher: Fisher) -> Array:
    """Rates with which the largest eigenvalue is 1, to which layers add alike, (layers,)."""
    outlier = fisher.outlier_high_shares
    rest = MARGIN * fisher.bulk_high_shares * (fisher.rest_high / fisher.bulk_high)
    parts = 1 / jnp.maximum(outlier, rest)
    return parts / jnp.maximum(jnp.sum(parts * outlier), jnp.sum(parts * rest))


def learning_rate_for(
    model: nnx.Module | Callable[..., Array],
    x: Array,
    *,
    params: Any = None,
    momentum: float = 0.9,
    fraction: float = 0.5,
    statistics: str = "batch",
) -> Array:
    r"""A share of the largest stable learning rate of any model, from its measured spectrum.

    .. math:: \eta = \mathrm{fraction} \cdot 2 (1 + \mu) / \lambda_{max}(F)

    F is the Fisher matrix of the present parameters on one batch, its largest eigenvalue found by
    Lanczos: a dozen gradients' work. For the squared loss (1/2n) sum ||f(x) - y||^2, summed over
    outputs. With cross-entropy it is no bound: the curvature is smaller, and changes as it learns.

    Args:
        model: A Flax NNX model, or a pure function ``apply(params, x)``.
        x: A batch as it is trained on, (n, ...); as large, too, since small batches have larger
            eigenvalues.
        params: Of ``apply``, any pytree; None for an NNX model, which has its own.
        momentum: mu of the heavy ball; 0 for plain gradient descent.
        fraction: Of the largest stable rate.
        statistics: Of a model's BatchNorms, as in :func:`meanfield_jax.fisher_operator`. A pure
            function has the mode that it has: "frozen" refuses one that normalizes by the batch.

    Returns:
        The learning rate, (), of the outputs' dtype.

    Raises:
        SpecError, DataError: for inputs that make no sense.
        RuntimeError: if the search for the eigenvalue failed, such as at NaN parameters.

    Accuracy:
        1e-4 of lambda_max, see :func:`meanfield_jax.top_eigenvalues`.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> model = mf.build(net, rngs=nnx.Rngs(0))  # or any other Flax model
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> bool(0.1 < mf.learning_rate_for(model, x) < 10)
        True

    Source:
        Polyak 1964; Karakida, Akaho & Amari 2019 (arXiv:1806.01316), section 4.
    """
    _check_fraction(fraction)
    if params is None:
        operator = fisher_operator(model, x, statistics=statistics)  # pyright: ignore[reportArgumentType]
    else:
        operator = FisherOperator(model, params, x)
        if statistics == "frozen" and couples_samples(operator):
            cause = "the function normalizes by the batch"
            remedy = "give the function in evaluation mode, or statistics='batch'"
            raise problem(SpecError, "statistics", statistics, cause, remedy)
    found = top_eigenvalues(operator).raise_if_failed()
    return fraction * eta_max(found.eigenvalues[0], momentum)


def _check_fraction(fraction: float) -> None:
    if not isinstance(fraction, Tracer) and not 0 < fraction < np.inf:
        raise problem(SpecError, "fraction", fraction, "not a number above 0", "give e.g. 0.5")


def _by_path(labels: tuple[str, ...], rates: Array) -> dict[str, Array]:
    """The rates by module; of a Repeat, "layers/1/block[2]/layers/0", as one array over the [2]."""
    rows: dict[str, list[int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for row, label in enumerate(labels):
        path = re.sub(r"\[\d+\]", "", label)
        rows.setdefault(path, []).append(row)
        # labels count up, so that the last one says how many there are
        shapes[path] = tuple(int(index) + 1 for index in re.findall(r"\[(\d+)\]", label))
    return {path: rates[np.array(rows[path])].reshape(shapes[path]) for path in rows}


def _scaled(rates: dict[str, Array]) -> optax.GradientTransformation:
    """Minus the module's rate times each update; leading axes of the rate are the parameter's."""

    def scale(key_path: tuple, update: Array) -> Array:
        name = path_name(key_path).removesuffix("/value")
        rate = rates.get(name.rpartition("/")[0])
        if rate is None or update.shape[: rate.ndim] != rate.shape:
            cause, remedy = "not of the network", "give the one that was built"
            raise problem(SpecError, "parameters", name, cause, remedy)
        aligned = rate.reshape(rate.shape + (1,) * (update.ndim - rate.ndim))
        return -aligned.astype(update.dtype) * update

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
