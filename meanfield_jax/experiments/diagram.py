"""Results of a sweep: where training stops being stable, which learning rate is best, what to draw.

What the pictures have in common is here: plots.py, page.py and watch.py draw it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from meanfield_jax.errors import DataError, problem

if TYPE_CHECKING:
    import xarray as xr

RESULTS = ("test_loss", "loss", "test_accuracy")
"""Results of a sweep, the one to show first."""


def results_of(dataset: xr.Dataset) -> list[str]:
    """The results that a sweep has, the one to show first."""
    return [name for name in RESULTS if name in dataset]


def averaged(dataset: xr.Dataset, value: str | None = None) -> xr.DataArray:
    """A result after the last epoch, averaged over seeds; NaN where any seed diverged.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.
        value: test_loss, loss or test_accuracy; None: test_loss if there is one, else loss.

    Returns:
        The result over the grid's axes without "seed".

    Raises:
        DataError: if the data set has no such result.
    """
    known = results_of(dataset)
    value = value or known[0]
    if value not in known:
        remedy = f"use {', '.join(known)}"
        raise problem(DataError, "value", value, "this sweep has no such result", remedy)
    last = dataset[value].isel(epoch=-1)
    return last.mean(_seeds(last), skipna=False).where(~diverged(dataset))


def last_of(dataset: xr.Dataset, value: str | None = None) -> xr.DataArray:
    """As :func:`averaged`, but where seeds are the axis that is drawn, of each seed."""
    if axes_of(dataset)[0] != "seed":
        return averaged(dataset, value)
    last = dataset[value or results_of(dataset)[0]].isel(epoch=-1)
    return last.where(dataset.diverged_at < 0)


def diverged(dataset: xr.Dataset) -> xr.DataArray:
    """Whether any seed diverged, over the grid's axes without "seed"."""
    return (dataset.diverged_at >= 0).any(_seeds(dataset.diverged_at))


def boundary(dataset: xr.Dataset) -> xr.DataArray:
    """The boundary of stability: the middle of the last rate without divergence and the next one.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned, with several learning rates.

    Returns:
        The boundary over the other axes without "seed", accurate to half a step of the grid; NaN if
        no run diverged, if all did, or if cells are missing below it.

    Raises:
        DataError: if the data set has no axis of learning rates.
    """
    import xarray as xr

    if "learning_rate" not in dataset.dims:
        remedy = "sweep over several learning rates"
        cause = "it has no learning rates"
        raise problem(DataError, "dataset", list(dataset.dims), cause, remedy)
    ordered = dataset.diverged_at.sortby("learning_rate")
    stable = (ordered == -1).all(_seeds(ordered))
    missing = (ordered == -2).any(_seeds(ordered))
    count = stable.cumprod("learning_rate").sum("learning_rate")
    rates = ordered.learning_rate.values
    middles = np.full(len(rates) + 1, np.nan)
    middles[1:-1] = np.sqrt(rates[1:] * rates[:-1])
    found = xr.DataArray(middles[count], count.coords, count.dims)
    # a cell that is not computed yet has not diverged
    next_one = missing.isel(learning_rate=count.clip(max=len(rates) - 1))
    return found.where(~next_one).drop_vars("learning_rate", errors="ignore")


def best_rate(dataset: xr.Dataset, value: str | None = None) -> xr.DataArray:
    """The learning rate of the lowest loss (highest accuracy), over the axes other than "seed"."""
    found = averaged(dataset, value)
    signed = -found if value == "test_accuracy" else found
    return signed.idxmin("learning_rate")


def axes_of(dataset: xr.Dataset) -> tuple[str, str | None, list[str]]:
    """The axes of a picture of a sweep.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.

    Returns:
        The horizontal axis, the vertical one (None: there is none, or no axis of learning rates, so
        that a line is drawn), and the others but the seed.
    """
    others = [
        str(name) for name in dataset.diverged_at.dims if name not in ("learning_rate", "seed")
    ]
    if "learning_rate" not in dataset.dims:
        across = (others or ["seed"])[0]
        return across, None, others[1:]
    if not others:
        return "learning_rate", None, []
    vertical = "gamma" if "gamma" in others else others[0]
    others.remove(vertical)
    return "learning_rate", vertical, others


def points_of(dataset: xr.Dataset, names: Sequence[str]) -> list[dict[str, float]]:
    """Every combination of the values of these axes."""
    values = itertools.product(*(dataset[name].values for name in names))
    return [dict(zip(names, at, strict=True)) for at in values]


def text_of(at: dict[str, float]) -> str:
    """A point of the grid, for people."""
    return ", ".join(f"{name} = {value:g}" for name, value in at.items())


def color_range(values: np.ndarray) -> tuple[float, float] | None:
    """The ends of a logarithmic colour scale; None if no value is positive and finite."""
    shown = values[np.isfinite(values) & (values > 0)]
    # otherwise a few runs just below the boundary would use up the colour scale
    return (float(shown.min()), float(np.quantile(shown, 0.98))) if shown.size else None


def edges_of(centers: np.ndarray) -> np.ndarray:
    """Borders of the cells around these values, halfway between them on a logarithmic axis."""
    positive = centers.min() > 0
    at = np.log(centers) if positive else np.asarray(centers, float)
    if len(at) == 1:
        at = np.array([at[0] - 0.5, at[0] + 0.5])
        return np.exp(at) if positive else at
    inner = (at[1:] + at[:-1]) / 2
    edges = np.concatenate([[2 * at[0] - inner[0]], inner, [2 * at[-1] - inner[-1]]])
    return np.exp(edges) if positive else edges


def _seeds(array: xr.DataArray) -> list[str]:
    return [name for name in ("seed",) if name in array.dims]
