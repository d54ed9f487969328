"""Theory compared with real networks: predicted and measured spectra of the Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice, check_data, targets
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.model import build, calibrate
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.empirical.trace import trace
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.boundary import measured_boundary
from meanfield_jax.experiments.learning_rate import learning_rate
from meanfield_jax.experiments.progress import PRODUCTS, Stages, seconds_of
from meanfield_jax.experiments.rate_result import LearningRate
from meanfield_jax.kernel.kernel import STATISTICS
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze
from meanfield_jax.theory.learning_rate import stable_rate
from meanfield_jax.variants import has_batch_norm, variants_of, with_gamma

if TYPE_CHECKING:
    import xarray as xr

Mode = Literal["batch", "frozen"]
MODES: tuple[Mode, ...] = ("batch", "frozen")
"""The modes in which a network is measured: training and evaluation."""

RATES = ("no_spike", "bounded")
"""The learning rates that are held against training: names of rates and of events alike."""

CURVE_POINTS = 60
PROBES = 30
PROGRAMS = 4
"""Programs that are compiled for the first measurement of a structure, in each mode."""


@checked()
def validate(
    network: Network,
    x: Array,
    *,
    y: Array | None = None,
    gammas: Sequence[float] = (),
    theory: str = "iid",
    draws: int = 4,
    num_eigenvalues: int | None = None,
    num_steps: int = 200,
    momentum: float = 0.9,
    tol: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Predicts the outliers of a network's Fisher matrix and measures them on random draws.

    Args:
        network: The specification.
        x: Inputs, (n, *input_shape).
        y: Labels (n,) or targets (n, C). With them the networks are trained, too, to find the
            largest learning rates without a spike and with a bounded loss, beside those that
            :func:`learning_rate` predicts. None: no training.
        gammas: Scales to use in every norm; the network without its norms is included as well.
            Empty: the network as it is.
        theory: ``"iid"``: predictions for i.i.d. inputs with unit variance; ``"data"``: for ``x``.
        draws: Number of random draws of each network.
        num_eigenvalues: How many eigenvalues of the kernel to compare with the theory for ``x``; F
            has each of them C times. None: the outliers alone.
        num_steps: Steps over which the loss of a training is followed.
        momentum: Momentum of ``eta_max``, and of the training.
        tol: Relative accuracy of the measured eigenvalues.
        seed: Seed of the first draw.
        progress: Whether to show a progress bar on stderr.

    Returns:
        A data set over ``network`` (its label), ``statistics`` (batch, frozen, wei2019: what the
        theory assumes), ``mode`` (batch, frozen: what was measured), ``draw`` and ``outlier``:
        ``predicted`` (the outliers' mean over draws), ``measured`` (the outliers; NaN where Lanczos
        failed), ``measured_mean`` and ``standard_error`` of their mean over draws, ``ratio`` =
        predicted / measured in the mode that corresponds to the statistics; ``lambda_max`` of one
        draw and ``eta_max`` from it, as :func:`analyze` predicts them, ``lambda_max_measured``
        (median over draws) and ``eta_max_measured``; with gammas also ``curve`` (predicted) and
        ``curve_lambda_max`` over ``curve_gamma``. With
        ``num_eigenvalues``, over ``eigenvalue``: ``spectrum_predicted`` (theory for ``x``),
        ``spectrum_measured`` (by draw, means of C), its ``spectrum_error``, ``spectrum_ratio``, and
        ``trace_predicted``, ``trace_measured``, ``trace_ratio``. With ``y``, over ``event``
        (no_spike, bounded): ``rate_predicted``, ``rate_measured`` (by draw; NaN where
        :func:`measured_boundary` found none), ``rate_ratio`` = predicted / median of the measured,
        ``rate_domain``, why the predictions of a network may be wrong, and ``num_steps``.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> bool(abs(mf.validate(net, x, draws=2).ratio.sel(statistics="batch") - 1) < 0.1)
        True
    """
    x = check_data(x)
    if draws < 1:
        raise problem(SpecError, "draws", draws, "must be at least 1", "pass a positive integer")
    check_choice("theory", theory, ("iid", "data"))
    if num_steps < 1:
        cause, remedy = "must be at least 1", "pass a positive integer"
        raise problem(SpecError, "num_steps", num_steps, cause, remedy)
    if y is not None:
        y = targets("y", y, len(x), network.num_outputs, x.dtype)
    variants = variants_of(network, gammas)
    num_samples = x.shape[0]
    given = dict(data=x) if theory == "data" else dict(num_samples=num_samples)
    if num_eigenvalues is not None and not 1 <= num_eigenvalues <= num_samples:
        cause = f"the kernel has {num_samples} eigenvalues"
        remedy = f"pass a number from 1 to {num_samples}"
        raise problem(SpecError, "num_eigenvalues", num_eigenvalues, cause, remedy)
    k = num_eigenvalues or 1
    shape = (len(variants), len(MODES), draws)
    within("MEMORY", "draws", draws, 16 * math.prod(shape) * k * network.num_outputs)
    measured = np.full((*shape, k * network.num_outputs), np.nan)
    traces = np.full(shape, np.nan)
    seconds = _seconds(variants.values(), num_samples, draws, num_eigenvalues is not None)
    with Stages("Measuring", seconds, progress) as stages:
        predicted = np.empty((2, len(variants), len(STATISTICS)))
        # the theory of a batch has the dtype of the batch
        with jax.enable_x64(theory == "iid"):
            for row, variant in enumerate(variants.values()):
                predicted[:, row] = _predictions(variant, given)
                stages.finished()
            curve = None if theory == "data" else _curve(network, gammas, given)
        for row, variant in enumerate(variants.values()):
            for draw in range(draws):
                measured[row, :, draw] = measure(
                    variant, x, k=k, seed=seed + draw, tol=tol, done=stages.finished
                )
                if num_eigenvalues is not None:
                    traces[row, :, draw] = _in_both_modes(
                        variant, x, seed + draw, lambda op: trace(op).value, stages.finished
                    )
    if gammas and theory == "data":
        # each point costs seconds here, so the curve connects those already computed
        coords = dict(curve_gamma=list(map(float, gammas)), statistics=list(STATISTICS))
        curve = _as_curve(predicted[:, 1:], coords).sortby("curve_gamma")
    outliers = measured[..., : network.num_outputs]
    labels = list(variants)
    dataset = _dataset(labels, predicted, outliers, curve, momentum, num_samples, network)
    if num_eigenvalues is not None:
        dataset = dataset.assign(_spectra(variants.values(), x, measured, traces, num_eigenvalues))
    if y is None:
        return dataset
    options: dict[str, Any] = dict(draws=draws, num_steps=num_steps, seed=seed, progress=progress)
    trained = {
        event: measured_boundary(
            network, x, y, gammas=gammas, momentum=momentum, event=event, **options
        ).boundary.values
        for event in RATES
    }
    options = dict(num_samples=given.get("num_samples"), momentum=momentum)
    rates = [learning_rate(each, given.get("data"), **options) for each in variants.values()]
    return dataset.assign(_trained(rates, trained)).assign(num_steps=num_steps)


def _trained(rates: Sequence[LearningRate], trained: dict[str, np.ndarray]) -> xr.Dataset:
    """The rates that were predicted and measured, by network and event."""
    import xarray as xr

    predicted = np.array([[float(getattr(rate, event)) for event in trained] for rate in rates])
    measured = np.stack(list(trained.values()), 1)
    data = dict(
        rate_predicted=(("network", "event"), predicted),
        rate_measured=(("network", "event", "draw"), measured),
        rate_ratio=(("network", "event"), predicted / np.median(measured, -1)),
        rate_domain=("network", [rate.domain for rate in rates]),
    )
    return xr.Dataset(data, dict(event=list(trained)))


def _seconds(
    variants: Collection[Network], num_samples: int, draws: int, traces: bool
) -> Iterator[float]:
    """Yields an estimate of the time of the theory of each network, and of each measurement.

    Networks of one structure share their programs, which are compiled for the first of them.
    """
    structures = [jax.tree.structure(variant) for variant in variants]
    first = [structure not in structures[:row] for row, structure in enumerate(structures)]
    for variant, new in zip(variants, first, strict=True):
        yield seconds_of(variant, num_samples, 1, programs=len(STATISTICS) * new)
    for variant, new in zip(variants, first, strict=True):
        for draw in range(draws):
            for _ in range((1 + has_batch_norm(variant)) * (1 + traces)):
                programs = PROGRAMS * (new and draw == 0)
                yield seconds_of(variant, num_samples, PRODUCTS, programs)


def _spectra(variants, x: Array, measured, traces, k: int) -> dict[str, xr.DataArray]:
    """The k largest eigenvalues, by the theory for these inputs and measured as means of C."""
    import xarray as xr

    fishers = [
        [analyze(variant, data=x, statistics=mode).fisher for mode in MODES] for variant in variants
    ]
    predicted = np.array(
        [[np.asarray(fisher.eigenvalues)[:k] for fisher in row] for row in fishers]
    )
    trace = np.array([[float(fisher.trace) for fisher in row] for row in fishers])
    means = measured.reshape(*measured.shape[:-1], k, -1).mean(-1)
    coords = dict(eigenvalue=np.arange(1, k + 1))
    dims = ("network", "mode", "eigenvalue")
    values = dict(
        spectrum_predicted=xr.DataArray(predicted, coords, dims),
        spectrum_measured=xr.DataArray(means, coords, ("network", "mode", "draw", "eigenvalue")),
        spectrum_error=xr.DataArray(standard_error(means, 2), coords, dims),
        trace_predicted=xr.DataArray(trace, dims=dims[:2]),
        trace_measured=xr.DataArray(traces, dims=("network", "mode", "draw")),
    )
    for name in ("spectrum", "trace"):
        mean = values[f"{name}_measured"].mean("draw")
        values[f"{name}_ratio"] = values[f"{name}_predicted"] / mean
    return values


def standard_error(values: np.ndarray, axis: int) -> np.ndarray:
    """The standard error of the mean along the axis of draws; NaN for one draw."""
    draws = values.shape[axis]
    if draws == 1:
        return np.full(np.delete(values.shape, axis), np.nan)
    return values.std(axis, ddof=1) / np.sqrt(draws)


def measure(
    network: Network,
    x: Array,
    *,
    k: int = 1,
    seed: int = 0,
    tol: float = 1e-3,
    done: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """The k C largest eigenvalues of one random draw's Fisher matrix, in both modes.

    Args:
        network: The specification, with C outputs.
        x: Inputs, (n, *input_shape).
        k: Number of eigenvalues of the kernel; F has each of them about C times.
        seed: Seed of the draw.
        tol: Relative accuracy.
        done: Called after each mode that is measured.

    Returns:
        (2, k C), descending: in training mode and in evaluation mode (with the statistics of ``x``
        as running statistics); NaN where Lanczos failed. Without BatchNorm the two are the same.
    """

    def top(op: FisherOperator) -> np.ndarray:
        count = min(k * network.num_outputs, op.dual.shape[0])
        result = top_eigenvalues(op, count, tol=tol, key=jax.random.key(seed))
        return np.where(result.status == 0, result.eigenvalues, np.nan)

    return _in_both_modes(network, x, seed, top, done)


def _in_both_modes(
    network: Network, x: Array, seed: int, statistic: Callable, done: Callable[[], None]
) -> np.ndarray:
    """A statistic of the Fisher operator of one draw, in training and in evaluation mode."""
    model = build(network, rngs=nnx.Rngs(seed))
    batch = statistic(fisher_operator(model, x, statistics="batch"))
    done()
    if not has_batch_norm(network):
        return np.stack([batch, batch])
    calibrate(model, x)
    frozen = statistic(fisher_operator(model, x, statistics="frozen"))
    done()
    return np.stack([batch, frozen])


def _predictions(network: Network, given: dict[str, Any]) -> np.ndarray:
    """The outliers' mean and the largest eigenvalue of one draw, (2, statistics)."""
    fishers = [analyze(network, statistics=name, **given).fisher for name in STATISTICS]
    found = [[float(fisher.outlier), float(fisher.lambda_max)] for fisher in fishers]
    return np.array(found).T


def _as_curve(values: np.ndarray, coords: dict[str, Any]) -> xr.Dataset:
    """What :func:`_predictions` returns for several gammas, (2, curve_gamma, statistics)."""
    import xarray as xr

    dims = ("curve_gamma", "statistics")
    return xr.Dataset(dict(curve=(dims, values[0]), curve_lambda_max=(dims, values[1])), coords)


def _curve(network: Network, gammas: Sequence[float], given: dict[str, Any]) -> xr.Dataset | None:
    """Predictions on a finer grid of gamma."""
    if not gammas:
        return None
    low, high = min(map(abs, gammas)), max(map(abs, gammas))
    grid = np.geomspace(max(low, 1e-3) * 0.8, max(high, 1e-3) * 1.25, CURVE_POINTS)
    values = [_predictions(with_gamma(network, float(gamma)), given) for gamma in grid]
    coords = dict(curve_gamma=grid, statistics=list(STATISTICS))
    return _as_curve(np.stack(values, 1), coords)


def _dataset(labels, predictions, measured, curve, momentum, num_samples, network) -> xr.Dataset:
    import xarray as xr

    means = measured.mean(-1)
    mean = means.mean(-1)
    predicted, lambda_max = predictions
    spoken_of = [MODES.index("batch" if name == "batch" else "frozen") for name in STATISTICS]
    largest = np.median(measured.max(-1), axis=-1)
    data = dict(
        predicted=(("network", "statistics"), predicted),
        lambda_max=(("network", "statistics"), lambda_max),
        eta_max=(("network", "statistics"), stable_rate(jnp.asarray(lambda_max), momentum)),
        ratio=(("network", "statistics"), predicted / mean[:, spoken_of]),
        measured=(("network", "mode", "draw", "outlier"), measured),
        measured_mean=(("network", "mode"), mean),
        standard_error=(("network", "mode"), standard_error(means, 2)),
        lambda_max_measured=(("network", "mode"), largest),
        eta_max_measured=(("network", "mode"), stable_rate(jnp.asarray(largest), momentum)),
    )
    gammas = [float(name.partition("=")[2] or "nan") for name in labels]
    coords = dict(
        network=labels,
        gamma=("network", gammas),
        statistics=list(STATISTICS),
        mode=list(MODES),
    )
    attributes = dict(num_samples=num_samples, momentum=momentum, spec=network.to_json(indent=None))
    dataset = xr.Dataset(data, coords, attributes)
    return dataset if curve is None else dataset.assign(curve)


def modes_measured(dataset: xr.Dataset) -> list[tuple[str, Mode]]:
    """Label and mode of every row of results; one mode only for networks without BatchNorm."""
    return [
        (str(label), mode)
        for label in dataset.network.values
        for mode in MODES
        if mode == MODES[0]
        or not np.array_equal(*dataset.measured.sel(network=label).values, equal_nan=True)
    ]
