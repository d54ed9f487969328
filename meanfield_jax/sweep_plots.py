"""Pictures of sweeps: phase diagrams of training, and lines over one axis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from meanfield_jax.arguments import as_given, checked, dataset_of
from meanfield_jax.checks import check_choice
from meanfield_jax.experiments.diagram import (
    averaged,
    axes_of,
    color_range,
    edges_of,
    points_of,
    results_of,
    text_of,
)
from meanfield_jax.plot_style import (
    COLOR,
    LABEL,
    LINE,
    NORM_COLORS,
    cased,
    letters,
    picture,
    scale_of,
    smooth,
)

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

MOST_TICKS = 12


@checked(value=as_given, dataset=dataset_of("mf.sweep", "diverged_at"))
def plot_sweep(dataset: xr.Dataset, *, value: str | None = None) -> Figure:
    """A phase diagram of training: a result over learning rate and scale, with the boundaries.

    Without a second axis beside the learning rate, or without learning rates, it is a plot of lines
    over one axis.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.
        value: The result to show, after the last epoch and averaged over seeds: test_loss, loss or
            test_accuracy; None: test_loss if there is one, else loss.

    Returns:
        A figure with one panel for each combination of further axes: white where any seed
        diverged, with lines at the boundaries that the theory predicts. Lines are means over seeds,
        with a point for each run and a cross above where any seed diverged; the boundaries are
        vertical lines, or curves over the axis in a panel of their own, beside the rate in use.

    Raises:
        SpecError: if the data set does not have this result.
    """
    if value is not None:
        check_choice("value", value, results_of(dataset))
    across, vertical, others = axes_of(dataset)
    if vertical is None:
        return _line_plot(dataset, across, value)
    panels = points_of(dataset, others)
    figure = picture(1.5 + 4.6 * len(panels), 4.4)
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for index, (axes, at) in enumerate(zip(row, panels, strict=True)):
        title = text_of(at)
        draw_sweep(axes, dataset.sel(at), vertical, value=value, title=title, legend=index == 0)
    letters(row)
    return figure


def _line_plot(dataset: xr.Dataset, along: str, value: str | None) -> Figure:
    """A result over one axis, with a line for every combination of the others but the seed."""
    dataset = dataset.sortby(along)
    others = [str(name) for name in dataset.diverged_at.dims if name not in (along, "seed")]
    figure = picture(6.6, 4.4 if along == "learning_rate" else 7)
    panels = figure.subplots(1 if along == "learning_rate" else 2, sharex=True, squeeze=False)[:, 0]
    for index, at in enumerate(points_of(dataset, others)):
        _draw_line(panels[0], dataset.sel(at), along, value, NORM_COLORS[index % 10], text_of(at))
    if along == "learning_rate":
        _draw_rates(panels[0], dataset)
    else:
        _draw_curves(panels[1], dataset, along, others)
    values = dataset[along].values
    if along != "seed" and values.min() > 0 and values.max() > 3 * values.min():
        panels[-1].set_xscale("log")
    if along != "learning_rate" and len(values) <= MOST_TICKS:
        panels[-1].set_xticks(values, [f"{number:g}" for number in values])
        panels[-1].set_xticks([], minor=True)
    panels[-1].set_xlabel(str(dataset[along].attrs.get("long_name", along)))
    letters(panels)
    for axes in panels:
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=7)
    return figure


def _draw_line(
    axes, dataset: xr.Dataset, along: str, value: str | None, color: str, label: str
) -> None:
    """The mean over seeds, the single runs, and where any run diverged."""
    result = dataset[value or results_of(dataset)[0]]
    runs = result.isel(epoch=-1).where(dataset.diverged_at == -1)
    x, gone = dataset[along].values, dataset.diverged_at >= 0
    if "seed" in runs.dims and along != "seed":
        axes.plot(x, runs.transpose(along, "seed"), ".", color=color, alpha=0.4, ms=4)
        gone, runs = gone.any("seed"), runs.mean("seed", skipna=False)
    axes.plot(
        x, runs, "-o" if along != "seed" else "o", color=color, mfc="white", ms=5, label=label
    )
    style = dict(color=color, transform=axes.get_xaxis_transform(), clip_on=False)
    if gone.any():
        known = "diverged" in axes.get_legend_handles_labels()[1]
        mark = None if known else "diverged"
        axes.plot(x[gone.values], np.full(int(gone.sum()), 0.97), "x", label=mark, **style)
    axes.set_ylabel(f"{result.long_name} after {dataset.sizes['epoch']} epochs")
    if value != "test_accuracy":
        axes.set_yscale(scale_of(runs))


def _draw_rates(axes, dataset: xr.Dataset) -> None:
    """The predicted boundaries as vertical lines, on an axis of learning rates."""
    for name in ("batch", "frozen", "wei2019"):
        rate = float(dataset[f"eta_max_{name}"])
        style = dict(color=COLOR[name], lw=1.6)
        if np.isfinite(rate):
            axes.axvline(rate, ls=LINE[name], label=LABEL[name], **style)
            if name == "batch":
                axes.axvline(rate / 2, ls=":", label="half of it", **style)


def _draw_curves(axes, dataset: xr.Dataset, along: str, others: list[str]) -> None:
    """The predicted boundaries over another axis, and the learning rate that was used."""
    x = dataset[along]
    for index, at in enumerate(points_of(dataset, others)):
        for name in ("batch",) if others else ("batch", "frozen", "wei2019"):
            rates = dataset[f"eta_max_{name}"].sel(at).broadcast_like(x)
            color, label = (NORM_COLORS[index % 10], text_of(at)) if others else (COLOR[name], "")
            axes.plot(x, rates, LINE[name], color=color, label=label or LABEL[name])
    axes.axhline(float(dataset.learning_rate), color="black", ls=":", label="rate in use")
    axes.set(yscale="log", ylabel="largest stable learning rate")


def draw_sweep(
    axes, dataset: xr.Dataset, vertical: str = "gamma", *, value=None, title="", legend=True
) -> None:
    """Draws one panel of :func:`plot_sweep` into matplotlib axes."""
    from matplotlib.colors import LogNorm

    shown = averaged(dataset, value).transpose(vertical, "learning_rate")
    values = shown.values
    ends = None if value == "test_accuracy" else color_range(values)
    norm = LogNorm(*ends) if ends else None
    edges = [edges_of(shown[name].values) for name in ("learning_rate", vertical)]
    mesh = axes.pcolormesh(*edges, values, norm=norm, cmap="viridis", rasterized=True)
    result = dataset[value or results_of(dataset)[0]]
    label = f"{result.long_name} after {dataset.sizes['epoch']} epochs (white: diverged)"
    axes.figure.colorbar(mesh, ax=axes, label=label, extend="max" if norm else "neither")
    heights = dataset[vertical]
    for name in ("batch", "frozen", "wei2019"):
        y, x = smooth(heights.values, dataset[f"eta_max_{name}"].broadcast_like(heights).values)
        style = dict(color=COLOR[name]) | cased(2)
        axes.plot(x, y, LINE[name], label=LABEL[name], **style)
        if name == "batch":
            axes.plot(x / 2, y, ":", label="half of it", **style)
    axes.set(xscale="log", xlabel="learning rate", ylabel=str(dataset[vertical].long_name))
    axes.set(xlim=edges[0][[0, -1]], ylim=edges[1][[0, -1]], title=title)
    if heights.values.min() > 0:
        axes.set_yscale("log")
        axes.set_yticks(heights.values, [f"{height:g}" for height in heights.values])
        axes.set_yticks([], minor=True)
    if legend:
        figure, handles = axes.figure, axes.get_legend_handles_labels()
        columns = max(2, int(figure.get_figwidth() / 3))
        place = dict(loc="outside lower center", ncols=columns)
        figure.legend(*handles, fontsize=8, frameon=False, **place)
