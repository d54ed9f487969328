"""Results as tables for the terminal, 80 columns wide."""

import numpy as np
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.table import Table

from meanfield_jax.experiments.diagram import best_rate, boundary
from meanfield_jax.experiments.validate import MODES, modes_measured
from meanfield_jax.kernel.kernel import PUBLISHED, STATISTICS
from meanfield_jax.layers.base import abbreviation

COLUMNS = (
    "\nbatch",
    "lambda_max\npredicted",
    "\nmeasured",
    "\nratio",
    "eta_max\npredicted",
    "\nmeasured",
    "best\nrate",
    "train\nloss",
    "test\nloss",
    "test\n%",
)
"""Columns of the comparison, after that of the norm."""


def comparison_table(dataset: xr.Dataset) -> Table:
    """The result of :func:`compare` as a table."""
    outside = bool((dataset.predicted.notnull() & ~dataset.within_domain).any())
    title = f"{dataset.epochs} epochs of {dataset.num_samples} samples, each at its best rate"
    caption = "?: outside the theory's domain, as the bulk may exceed it" if outside else None
    result = Table(
        title=title,
        caption=caption,
        box=SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    result.add_column("\nnorm", no_wrap=True)
    for name in COLUMNS:
        result.add_column(name, justify="right", no_wrap=True)
    for norm in dataset.norm.values:
        for size in dataset.batch_size.values:
            at = dataset.sel(norm=norm, batch_size=size)
            mark = "" if at.within_domain or np.isnan(at.predicted) else "?"
            numbers = (
                f"{float(at.predicted):.4g}{mark}",
                f"{float(at.measured.mean()):.4g}",
                f"{float(at.ratio):.2f}",
                f"{float(at.eta_max):.2g}",
                f"{float(at.eta_max_measured):.2g}",
                f"{float(at.best_rate):.2g}",
                f"{float(at.best_loss):.3f}",
                f"{float(at.best_test_loss):.3f}",
                f"{100 * float(at.best_test_accuracy):.1f}",
            )
            first = size == dataset.batch_size.values[0]
            result.add_row(abbreviation(norm) if first else "", str(size), *numbers)
        result.add_section()
    return result


def sweep_table(dataset: xr.Dataset) -> Table:
    """For each network, the measured boundary, its ratio to the predicted ones, the best rate."""
    measured, best = boundary(dataset), best_rate(dataset)
    result = Table(title="Largest stable learning rate", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in (*measured.dims, "measured", *(f"/ {name}" for name in STATISTICS), "best rate"):
        result.add_column(str(name), justify="right", no_wrap=True)
    result.add_column("/ batch", justify="right", no_wrap=True)
    for index in np.ndindex(*measured.shape):
        at = dict(zip(measured.dims, index, strict=True))
        rate = float(measured.isel(at))
        predicted = [float(_at(dataset[f"eta_max_{name}"], at)) for name in STATISTICS]
        labels = [f"{measured[name].values[i]:g}" for name, i in at.items()]
        top = float(best.isel(at))
        ratios = [f"{rate / value:.2f}" for value in predicted]
        result.add_row(*labels, f"{rate:.4g}", *ratios, f"{top:.4g}", f"{top / predicted[0]:.2f}")
    return result


def spectrum_table(dataset: xr.Dataset) -> Table:
    """The spectra of :func:`validate` as a table, with the theory for the same inputs."""
    result = Table(title=f"F on these inputs, n = {dataset.num_samples}", box=SIMPLE_HEAD)
    for name in ("network", "mode"):
        result.add_column(name, no_wrap=True)
    for name in ("eigenvalue", "predicted", "measured", "+-", "ratio"):
        result.add_column(name, justify="right", no_wrap=True)
    for label, mode in modes_measured(dataset):
        at = dataset.sel(network=label, mode=mode)
        mean = at.spectrum_measured.mean("draw")
        for rank in dataset.eigenvalue.values:
            one = at.sel(eigenvalue=rank)
            numbers = (one.spectrum_predicted, mean.sel(eigenvalue=rank), one.spectrum_error)
            shown = (f"{float(value):.4g}" for value in numbers)
            result.add_row(label, mode, str(rank), *shown, f"{float(one.spectrum_ratio):.3f}")
        trace = (f"{float(value):.4g}" for value in (at.trace_predicted, at.trace_measured.mean()))
        result.add_row(label, mode, "trace", *trace, "", f"{float(at.trace_ratio):.3f}")
    return result


def rates_table(dataset: xr.Dataset) -> Table:
    """The learning rates from a random start that :func:`validate` predicted and measured."""
    reasons = [text for text in dict.fromkeys(map(str, dataset.rate_domain.values)) if text]
    result = Table(
        title=f"Largest learning rates from a random start, {int(dataset.num_steps)} steps",
        caption="\n".join(f"?: {text}" for text in reasons) or None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("gamma", "until"):
        result.add_column(name, no_wrap=True)
    for name in ("predicted", "measured", "from", "to", "ratio"):
        result.add_column(name, justify="right", no_wrap=True)
    for label in dataset.network.values:
        for event, said in dict(no_spike="a spike", bounded="divergence").items():
            at = dataset.sel(network=label, event=event)
            mark = "?" if str(at.rate_domain.values) else ""
            measured = at.rate_measured
            shown = (measured.median(), measured.min(), measured.max())
            numbers = (f"{float(value):.3g}" for value in shown)
            predicted = f"{float(at.rate_predicted):.3g}{mark}"
            name = str(label).removeprefix("gamma=")
            result.add_row(name, said, predicted, *numbers, f"{float(at.rate_ratio):.2f}")
    return result


def validation_table(dataset: xr.Dataset) -> Table:
    """The result of :func:`validate` as a table.

    "predicted" and "measured" are the outliers' mean, "ratio" is predicted / measured, "paper" is
    the prediction of ``"wei2019"``, "top" is the largest measured eigenvalue, and "eta_max" is
    predicted for that of one draw.

    Returns:
        A Rich table with one row for each network in training mode, and one in evaluation mode if
        the measurement differs there.
    """
    title = f"C outliers of the Fisher matrix, n = {dataset.num_samples}, mean and its error"
    result = Table(
        title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False
    )
    for name in ("gamma", "mode"):
        result.add_column(name, no_wrap=True)
    columns = ("predicted", "measured", "+-", "ratio", "paper", "ratio", "top", "eta_max")
    for name in columns:
        result.add_column(name, justify="right", no_wrap=True)
    rows = modes_measured(dataset)
    for label, mode in rows:
        at = dataset.sel(network=label, mode=mode)
        own, published = at.sel(statistics=mode), at.sel(statistics=PUBLISHED)
        numbers = (
            f"{float(own.predicted):.5g}",
            f"{float(at.measured_mean):.5g}",
            f"{float(at.standard_error):.2g}",
            f"{float(own.predicted / at.measured_mean):.2f}",
            f"{float(published.predicted):.4g}",
            f"{float(published.predicted / at.measured_mean):.2f}",
            f"{float(at.lambda_max_measured):.4g}",
            f"{float(own.eta_max):.2g}",
        )
        name = mode if (label, MODES[1]) in rows else ""
        result.add_row(label.removeprefix("gamma="), name, *numbers)
    return result


def _at(array: xr.DataArray, at: dict) -> xr.DataArray:
    return array.isel({name: index for name, index in at.items() if name in array.dims})
