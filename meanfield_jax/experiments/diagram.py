"""What a sweep says: where training stops being stable, and which learning rate is best."""

import numpy as np
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.table import Table

from meanfield_jax.errors import DataError, problem
from meanfield_jax.kernel.state import STATISTICS


def averaged(dataset: xr.Dataset, value: str | None = None) -> xr.DataArray:
    """A result after the last epoch, mean over seeds; NaN where any seed diverged.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.
        value: test_loss, loss or test_accuracy; None: test_loss where there is one, else loss.

    Returns:
        Over the grid's axes without "seed".

    Raises:
        DataError: where the data set has no such result.
    """
    value = value or ("test_loss" if "test_loss" in dataset else "loss")
    if value not in dataset:
        known = ", ".join(
            name for name in ("test_loss", "loss", "test_accuracy") if name in dataset
        )
        raise problem(DataError, "value", value, "not in this sweep", f"use {known}")
    last = dataset[value].isel(epoch=-1)
    return last.mean(_seeds(last), skipna=False).where(~diverged(dataset))


def diverged(dataset: xr.Dataset) -> xr.DataArray:
    """Whether any seed diverged, over the grid's axes without "seed"."""
    return (dataset.diverged_at >= 0).any(_seeds(dataset.diverged_at))


def boundary(dataset: xr.Dataset) -> xr.DataArray:
    """Up to which learning rate no run diverged: the middle of that rate and the next one.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned, with several learning rates.

    Returns:
        Over the other axes without "seed", accurate to half a step of the grid; NaN where none or
        all diverged, or cells are missing below.

    Raises:
        DataError: without an axis of learning rates.
    """
    if "learning_rate" not in dataset.dims:
        remedy = "sweep over several learning rates"
        raise problem(DataError, "dataset", list(dataset.dims), "no learning rates in it", remedy)
    ordered = dataset.diverged_at.sortby("learning_rate")
    stable = (ordered == -1).all(_seeds(ordered))
    missing = (ordered == -2).any(_seeds(ordered))
    count = stable.cumprod("learning_rate").sum("learning_rate")
    rates = ordered.learning_rate.values
    middles = np.full(len(rates) + 1, np.nan)
    middles[1:-1] = np.sqrt(rates[1:] * rates[:-1])
    found = xr.DataArray(middles[count], count.coords, count.dims)
    # a cell that is not computed yet is not one that diverged
    next_one = missing.isel(learning_rate=count.clip(max=len(rates) - 1))
    return found.where(~next_one).drop_vars("learning_rate", errors="ignore")


def best_rate(dataset: xr.Dataset, value: str | None = None) -> xr.DataArray:
    """The learning rate of the lowest loss (highest accuracy), over the axes other than "seed"."""
    found = averaged(dataset, value)
    signed = -found if value == "test_accuracy" else found
    return signed.idxmin("learning_rate")


def table(dataset: xr.Dataset) -> Table:
    """Measured boundary over the predicted ones, and the best rate, for each network."""
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


def _seeds(array: xr.DataArray) -> list[str]:
    return [name for name in ("seed",) if name in array.dims]


def _at(array: xr.DataArray, at: dict) -> xr.DataArray:
    return array.isel({name: index for name, index in at.items() if name in array.dims})
