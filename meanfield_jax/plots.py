"""Pictures of predictions and measurements; each function returns a matplotlib Figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from meanfield_jax.arguments import checked, dataset_of
from meanfield_jax.checks import whole
from meanfield_jax.empirical.density import SpectralDensity
from meanfield_jax.layers.base import abbreviation
from meanfield_jax.plot_style import (
    COLOR,
    ETA_MAX,
    GAMMA,
    LABEL,
    LAMBDA_MAX,
    LINE,
    POINT,
    cased,
    letters,
    picture,
    scale_of,
    styles_of_norms,
)
from meanfield_jax.theory.analyze import Theory
from meanfield_jax.theory.learning_rate import stable_rate
from meanfield_jax.tuning import Tuning

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

NO_NORM = 1.5
"""The networks without norms stand this factor to the right of the largest gamma."""


@checked(dataset=dataset_of("mf.validate", "predicted", "measured", "curve_lambda_max"))
def plot_validation(dataset: xr.Dataset) -> Figure:
    """The outliers and learning rates over gamma: theory as curves, measurements as points.

    Args:
        dataset: What :func:`meanfield_jax.validate` returned for several gammas.

    Returns:
        A figure with two panels, the outliers and eta_max, where error bars are standard errors
        over the draws; if the networks were trained, with a third one, the largest rates without a
        spike and with a bounded loss, where bars go from the smallest draw to the largest.
    """
    count = 3 if "rate_measured" in dataset else 2
    figure = picture(5.25 * count, 4.4)
    panels = figure.subplots(1, count)
    draw_validation(panels[:2], dataset)
    if count == 3:
        _draw_trained(panels[2], dataset)
    letters(panels)
    return figure


def draw_validation(panels, dataset: xr.Dataset, title: str = "") -> None:
    """Draws :func:`plot_validation` into two matplotlib axes."""
    left, right = panels
    for axes, shown in ((left, _outliers(dataset)), (right, _stable_rates(dataset))):
        for name in ("batch", "frozen", "wei2019"):
            values = shown.curve.sel(statistics=name)
            axes.plot(shown.curve_gamma, values, LINE[name], color=COLOR[name], label=LABEL[name])
        _vanilla(axes, shown)
        _points(axes, shown)
        _over_gamma(axes, dataset, title)
    left.set(ylabel="largest eigenvalues of F (mean of the C outliers)")
    right.set(ylabel=f"{ETA_MAX}, of {LAMBDA_MAX} (momentum {dataset.momentum:g})")
    left.legend(fontsize=8, frameon=False)


def _draw_trained(axes, dataset: xr.Dataset) -> None:
    """The learning rates from a random start, predicted and measured by training."""
    gammas = dataset.gamma.fillna(_place_without_norms(dataset))
    scaled = np.isfinite(dataset.gamma.values)
    kinds = (("no_spike", COLOR["batch"], "a spike"), ("bounded", COLOR["frozen"], "divergence"))
    for event, color, name in kinds:
        at = dataset.sel(event=event)
        order = at.isel(network=scaled).sortby("gamma")
        axes.plot(order.gamma, order.rate_predicted, color=color, label=f"predicted, until {name}")
        measured = at.rate_measured
        middle = measured.median("draw")
        bars = np.stack([middle - measured.min("draw"), measured.max("draw") - middle])
        style = POINT | dict(color=color, capsize=3, lw=1)
        axes.errorbar(gammas, middle, bars, fmt="o", label=f"measured, until {name}", **style)
        if not scaled.all():
            alone = at.rate_predicted.values[~scaled]
            label = f"predicted, until {name}, no BatchNorm"
            axes.plot(gammas[~scaled], alone, "x", color=color, ms=8, label=label)
    _over_gamma(axes, dataset, "")
    axes.set(ylabel=f"largest rate from a random start (momentum {dataset.momentum:g})")
    axes.legend(fontsize=8, frameon=False)


def _outliers(dataset: xr.Dataset) -> xr.Dataset:
    """The outliers' mean: ``curve``, ``predicted``, ``measured``, and ``error`` over draws."""
    return dataset[["curve", "predicted"]].assign(
        measured=dataset.measured_mean, error=dataset.standard_error
    )


def _stable_rates(dataset: xr.Dataset) -> xr.Dataset:
    """The largest stable learning rate, in the same form."""
    largest, draws = dataset.measured.max("outlier"), dataset.sizes["draw"]
    # the relative error is the same for the eigenvalue and its inverse
    error = largest.std("draw", ddof=1) / largest.mean("draw") / draws**0.5 if draws > 1 else np.nan
    rate = float(stable_rate(1.0, dataset.momentum))
    return dataset[[]].assign(
        curve=rate / dataset.curve_lambda_max,
        predicted=dataset.eta_max,
        measured=dataset.eta_max_measured,
        error=dataset.eta_max_measured * error,
    )


def _over_gamma(axes, dataset: xr.Dataset, title: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=f"scale {GAMMA} of BatchNorm", title=title)
    gammas = np.unique(dataset.gamma.values[np.isfinite(dataset.gamma.values)])
    names = [f"{gamma:g}" for gamma in gammas]
    if "vanilla" in dataset.network.values:
        gammas, names = np.append(gammas, _place_without_norms(dataset)), [*names, "none"]
    axes.set_xticks(gammas, names)
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)


def _place_without_norms(dataset: xr.Dataset) -> float:
    """Where networks without norms, which have no gamma, stand on the axis of gamma."""
    return NO_NORM * float(dataset.curve_gamma.max())


def _points(axes, shown: xr.Dataset) -> None:
    normalized = shown.sel(network=np.isfinite(shown.gamma.values))
    for mode, marker, name in (("batch", "o", "training"), ("frozen", "s", "evaluation")):
        at = normalized.sel(mode=mode)
        style = POINT | dict(color=COLOR[mode], capsize=3, lw=1)
        label = f"measured, {name} mode"
        error = np.nan_to_num(at.error)
        axes.errorbar(at.gamma, at.measured, error, fmt=marker, label=label, **style)


def _vanilla(axes, shown: xr.Dataset) -> None:
    if "vanilla" not in shown.network.values:
        return
    at = shown.sel(network="vanilla", mode="batch")
    style = dict(color=COLOR["vanilla"])
    predicted = float(at.predicted.sel(statistics="batch"))
    axes.axhline(predicted, ls=":", label="theory, no BatchNorm", **style)
    place, error = _place_without_norms(shown), np.nan_to_num(float(at.error))
    style |= POINT | dict(fmt="D", capsize=3)
    axes.errorbar(place, float(at.measured), error, label="measured, no BatchNorm", **style)


@checked()
def plot_spectrum(
    density: SpectralDensity,
    *,
    num_eigenvalues: int,
    predicted: np.ndarray | None = None,
    measured: np.ndarray | None = None,
) -> Figure:
    """The spectral density of the Fisher matrix, on logarithmic axes.

    Args:
        density: What :func:`meanfield_jax.spectral_density` returned.
        num_eigenvalues: Number of eigenvalues of the operator, to show the density as counts.
        predicted: All eigenvalues that the theory predicts, shown as a second histogram.
        measured: Measured eigenvalues, marked by ticks.

    Returns:
        The figure.
    """
    num_eigenvalues = whole("num_eigenvalues", num_eigenvalues, 1)
    figure = picture(8, 4.4)
    axes = figure.subplots()
    nodes = np.asarray(density.nodes)
    top = nodes.max()
    edges = np.geomspace(max(0.7 * nodes.min(), top * 1e-5), top * 1.3, 46)
    values, counts = _broadened(density, edges)
    label, color = "Lanczos density", COLOR["batch"]
    axes.fill_between(values, num_eigenvalues * counts, color=color, alpha=0.35, label=label)
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


def _broadened(density: SpectralDensity, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The density as a curve.

    Each node of Lanczos is broadened on the logarithmic axis to a Gaussian as wide as a bin. Where
    nodes are further apart than that, bins would be empty though the density is not.

    Returns:
        Eigenvalues, and at each of them the fraction of all eigenvalues per bin.
    """
    nodes = np.asarray(density.nodes).ravel()
    weights = np.asarray(density.weights).ravel() / density.weights.shape[0]
    width = np.log(edges[1] / edges[0])
    values = np.geomspace(edges[0], edges[-1], 8 * len(edges))
    shown = nodes >= edges[0]
    distances = np.log(values[:, None] / nodes[shown]) / width
    return values, np.exp(-(distances**2) / 2) @ weights[shown] / np.sqrt(2 * np.pi)


@checked(dataset=dataset_of("mf.phase_diagram", "xi_c", "chi_1", "critical_weight_var"))
def plot_phase_diagram(dataset: xr.Dataset) -> Figure:
    """Depth scale of correlations over the variances of weights and biases, in logarithmic colours.

    Args:
        dataset: What :func:`meanfield_jax.phase_diagram` returned.

    Returns:
        A figure that is white where there is no fixed point, with a line where chi_1 = 1.
    """
    from matplotlib.colors import LogNorm

    figure = picture(6.6, 4.8)
    axes = figure.subplots()
    norm = LogNorm(0.3, 300, clip=True)
    shown = dataset.xi_c.transpose("weight_var", "bias_var")
    where = (dataset.bias_var, dataset.weight_var, shown)
    mesh = axes.pcolormesh(*where, norm=norm, cmap="viridis", shading="nearest", rasterized=True)
    label = r"depth scale of correlations $\xi_c$ (blocks)"
    figure.colorbar(mesh, ax=axes, label=label, extend="both")
    line = _critical_line(dataset)
    marker = "o" if len(line[0]) == 1 else None  # for ReLU it is a single point
    style = dict(color="black", marker=marker, ms=4, clip_on=False, label=r"$\chi_1 = 1$")
    axes.plot(*line, **style, **cased(1.2))
    for phase, name in ((dataset.chi_1 < 1, "ordered"), (dataset.chi_1 > 1, "chaotic")):
        if phase.any():
            rows, columns = np.nonzero(phase.transpose("weight_var", "bias_var").values)
            at = (dataset.bias_var.values[columns].mean(), dataset.weight_var.values[rows].mean())
            box = dict(fc="black", alpha=0.35, lw=0)
            axes.text(*at, name, color="white", ha="center", va="center", fontsize=12, bbox=box)
    axes.set(xlabel=r"variance of biases $\sigma_b^2$", ylabel=r"variance of weights $\sigma_w^2$")
    if np.isfinite(dataset.critical_weight_var).any():
        axes.legend(fontsize=8, loc="lower right")
    return figure


def _critical_line(dataset: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """A smooth line through the points where chi_1 = 1.

    Near bias_var = 0 it is smooth in the square root of bias_var, over which it is interpolated.

    Returns:
        bias_var and weight_var of its points.
    """
    from scipy.interpolate import PchipInterpolator

    values = dataset.critical_weight_var.sortby("bias_var").dropna("bias_var")
    roots = np.sqrt(values.bias_var.values)
    if len(roots) < 3:
        return roots**2, values.values
    between = np.linspace(roots[0], roots[-1], 400)
    return between**2, PchipInterpolator(roots, values.values)(between)


@checked()
def plot_tuning(tuning: Tuning) -> Figure:
    """The tuned numbers before and after, by layer, with each layer's share of lambda_max.

    Args:
        tuning: What :func:`meanfield_jax.tune` returned.

    Returns:
        A figure with a panel for each tuned field, one for the shares and one for the descent.
    """
    ends = tuning.history.isel(step=[0, -1])
    fields = [str(name) for name in ends.data_vars if "layer" in ends[name].dims]
    figure = picture(3.7 * (len(fields) + 2), 3.6)
    *panels, shares, descent = figure.subplots(1, len(fields) + 2)
    for axes, field in zip(panels, fields, strict=True):
        values = ends[field].dropna("layer")
        for at, style in zip(values.values, TUNING, strict=True):
            axes.plot(np.arange(1, values.layer.size + 1), at, **style)
        positive = field != "beta" and values.max() > 5 * values.min()
        axes.set(yscale="log" if positive else "linear", ylabel=field, title=f"{field} by layer")
        _count(axes, "layer")
    both = [_shares(theory) for theory in (tuning.before, tuning.after)]
    for share, style in zip(both, TUNING, strict=True):
        shares.plot(np.arange(1, len(share) + 1), share, **style)
    shares.set(ylabel=f"share of {LAMBDA_MAX}", title="weights and biases by layer", ylim=(0, None))
    _count(shares, "layer")
    shares.legend(fontsize=8, frameon=False)
    history = tuning.history
    descent.plot(history.step, history.eta_max, color=COLOR["batch"])
    descent.set(ylabel="largest stable learning rate", title="descent")
    _count(descent, "step")
    letters((*panels, shares, descent))
    figure.suptitle(f"{history.objective.long_name}: {tuning.status.label.replace('_', ' ')}")
    return figure


TUNING = (
    dict(color=COLOR["vanilla"], marker="o", ms=8, mfc="white", ls=":", label="before"),
    dict(color=COLOR["batch"], marker="o", ms=4, label="after"),
)


def _shares(theory: Theory) -> np.ndarray:
    """The share of each layer of weights in the outlier."""
    shares = theory.fisher.contributions
    total = np.asarray(shares.weights + shares.biases + shares.norm)
    return total[np.isin(shares.layers, theory.order_parameters.layers)] / total.sum()


@checked(dataset=dataset_of("mf.compare", "best_rate", "measured"))
def plot_comparison(dataset: xr.Dataset) -> Figure:
    """The norms side by side: stability over batch size, and training loss and test accuracy.

    Args:
        dataset: What :func:`meanfield_jax.compare` returned.

    Returns:
        A figure with four panels: lambda_max, with eta_max on the right axis, over batch size
        (lines: theory, points: measured, with standard errors over draws); training loss over
        learning rate at the middle batch size (ticks at the top: predicted eta_max); and over batch
        size the training loss and the test accuracy at the best learning rate of each norm. Points
        are missing where all runs diverged.
    """
    figure = picture(11.5, 8.4)
    (stability, rates), (loss, accuracy) = figure.subplots(2, 2)
    sizes = dataset.batch_size.values
    middle = sizes[len(sizes) // 2]
    for norm, style in zip(dataset.norm.values, styles_of_norms(dataset.norm.values), strict=True):
        color, points = style["color"], POINT | style | dict(lw=1.2)
        at = dataset.sel(norm=norm)
        stability.plot(sizes, at.predicted, color=color, lw=1.2)
        measured = (sizes, at.measured.mean("draw"), np.nan_to_num(at.standard_error))
        stability.errorbar(*measured, capsize=3, **(points | dict(ls="")))
        row = at.sel(batch_size=middle)
        losses = row.loss.mean("seed", skipna=False)
        rates.plot(dataset.learning_rate, losses, label=abbreviation(norm), **points)
        rates.plot(
            row.eta_max, 0.97, "|", color=color, ms=14, mew=2, transform=rates.get_xaxis_transform()
        )
        loss.plot(sizes, at.best_loss, **points)
        accuracy.plot(sizes, 100 * at.best_test_accuracy, **points)
    for axes in (stability, loss, accuracy):
        axes.set(xlabel="batch size", xscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xticks([], minor=True)
    stability.set(yscale=scale_of(dataset.measured, dataset.predicted))
    stability.set(ylabel=f"{LAMBDA_MAX} of F (lines: theory, points: measured)")
    handles = rates.get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=10, fontsize=9, frameon=False)

    def stable(value: np.ndarray) -> np.ndarray:
        """From lambda_max to eta_max, or back."""
        return np.asarray(stable_rate(jnp.asarray(value), dataset.momentum))

    stability.secondary_yaxis("right", functions=(stable, stable)).set_ylabel(ETA_MAX)
    rates.set(xscale=scale_of(dataset.learning_rate))
    rates.set(xlabel=f"learning rate (batch size {middle}; top: predicted {ETA_MAX})")
    rates.set(yscale=scale_of(dataset.loss.sel(batch_size=middle)))
    rates.set(ylabel=f"training loss after {dataset.epochs} epochs")
    loss.set(
        yscale=scale_of(dataset.best_loss), ylabel="training loss at the best rate of each norm"
    )
    accuracy.set(ylabel="test accuracy at the same rate, %")
    letters((stability, rates, loss, accuracy))
    for axes in (stability, rates, loss, accuracy):
        axes.grid(alpha=0.25)
    return figure


def _count(axes, name: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel(name)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
