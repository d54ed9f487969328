"""Results of a sweep: where training stops being stable, and which learning rate is best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from meanfield_jax.errors import DataError, problem

if TYPE_CHECKING:
    import xarray as xr


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
    value = value or ("test_loss" if "test_loss" in dataset else "loss")
    if value not in dataset:
        known = ", ".join(
            name for name in ("test_loss", "loss", "test_accuracy") if name in dataset
        )
        raise problem(DataError, "value", value, "this sweep has no such result", f"use {known}")
    last = dataset[value].isel(epoch=-1)
    return last.mean(_seeds(last), skipna=False).where(~diverged(dataset))


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


def _seeds(array: xr.DataArray) -> list[str]:
    return [name for name in ("seed",) if name in array.dims]
