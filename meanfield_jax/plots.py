"""Pictures of predictions and measurements; each function returns a matplotlib Figure."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from meanfield_jax.empirical.density import SpectralDensity

# Okabe & Ito's colours, told apart by colour-blind readers too
COLOR = {"batch": "#0072B2", "frozen": "#D55E00", "wei2019": "#009E73", "vanilla": "#555555"}
LABEL = {
    "batch": "theory, training mode",
    "frozen": "theory, evaluation mode",
    "wei2019": "as published (Wei et al. 2019)",
}
LINE = {"batch": "-", "frozen": "-", "wei2019": "--"}


def plot_validation(dataset: xr.Dataset) -> Figure:
    """lambda_max and eta_max over gamma: theory as curves, measurements as points.

    Args:
        dataset: What :func:`meanfield_jax.validate` returned for several gammas.

    Returns:
        A figure with two panels; error bars are standard errors over the draws.
    """
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    rate = 2 * (1 + dataset.momentum)
    for axes, transform in ((left, lambda value: value), (right, lambda value: rate / value)):
        for name in ("batch", "frozen", "wei2019"):
            values = transform(dataset.curve.sel(statistics=name))
            axes.plot(dataset.curve_gamma, values, LINE[name], color=COLOR[name], label=LABEL[name])
        _vanilla(axes, dataset, transform)
        _points(axes, dataset, transform)
        axes.set(xscale="log", yscale="log", xlabel="scale gamma of BatchNorm")
        gammas = dataset.gamma.values[np.isfinite(dataset.gamma.values)]
        axes.set_xticks(gammas, [f"{gamma:g}" for gamma in gammas])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
    left.set(ylabel="largest eigenvalues of F (mean of the C outliers)")
    right.set(ylabel=f"largest stable learning rate (momentum {dataset.momentum:g})")
    left.legend(fontsize=8, frameon=False)
    return figure


def _points(axes, dataset: xr.Dataset, transform) -> None:
    normalized = dataset.sel(network=np.isfinite(dataset.gamma.values))
    for mode, marker, name in (("batch", "o", "training"), ("frozen", "s", "evaluation")):
        at = normalized.sel(mode=mode)
        value = transform(at.measured_mean)
        # the relative error is the same for the eigenvalue and its inverse
        error = np.nan_to_num(value * at.standard_error / at.measured_mean)
        style = dict(color=COLOR[mode], mfc="white", ms=6, capsize=3, lw=1)
        axes.errorbar(at.gamma, value, error, fmt=marker, label=f"measured, {name} mode", **style)


def _vanilla(axes, dataset: xr.Dataset, transform) -> None:
    if "vanilla" not in dataset.network.values:
        return
    at = dataset.sel(network="vanilla", mode="batch")
    style = dict(color=COLOR["vanilla"])
    predicted = float(transform(at.predicted.sel(statistics="batch")))
    axes.axhline(predicted, ls=":", label="theory, no BatchNorm", **style)
    right = float(dataset.curve_gamma.max())
    value = float(transform(at.measured_mean))
    error = np.nan_to_num(value * float(at.standard_error / at.measured_mean))
    label = "measured, no BatchNorm"
    axes.errorbar(right, value, error, fmt="D", mfc="white", ms=6, capsize=3, label=label, **style)


def plot_spectrum(
    density: SpectralDensity,
    *,
    num_eigenvalues: int,
    predicted: np.ndarray | None = None,
    measured: np.ndarray | None = None,
) -> Figure:
    """The density of the Fisher matrix's spectrum, on logarithmic axes.

    Args:
        density: What :func:`meanfield_jax.spectral_density` returned.
        num_eigenvalues: Number of eigenvalues of the operator: the density is shown as a count.
        predicted: All eigenvalues that theory predicts, shown as a second histogram.
        measured: Eigenvalues to mark with ticks.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.subplots()
    nodes = np.asarray(density.nodes)
    top = nodes.max()
    edges = np.geomspace(max(0.7 * nodes.min(), top * 1e-5), top * 1.3, 46)
    weights = np.asarray(density.weights) / density.weights.shape[0]
    counts, _ = np.histogram(nodes, edges, weights=weights * num_eigenvalues)
    axes.stairs(counts, edges, fill=True, color=COLOR["batch"], alpha=0.35, label="Lanczos density")
    if measured is not None:
        height = np.full(len(measured), 1.0)
        label = "measured top eigenvalues"
        axes.plot(measured, height, "|", color="black", ms=14, label=label)
    if predicted is not None:
        counts, _ = np.histogram(np.maximum(predicted, edges[0]), edges)
        axes.stairs(counts, edges, color=COLOR["frozen"], lw=1.8, label="theory on these inputs")
    axes.set(xscale="log", yscale="log", xlabel="eigenvalue of F", ylim=(0.3, None))
    axes.set(ylabel="eigenvalues per bin (of n C)")
    axes.legend(fontsize=8, frameon=False)
    axes.grid(alpha=0.25)
    return figure
