"""A sweep as one HTML page that shows each run; page.html is the page, without the data."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meanfield_jax.arguments import as_given, checked, dataset_of
from meanfield_jax.checks import check_choice
from meanfield_jax.experiments.diagram import (
    axes_of,
    color_range,
    edges_of,
    last_of,
    points_of,
    results_of,
    text_of,
)
from meanfield_jax.plot_style import COLOR, LABEL, LINE, NORM_COLORS

if TYPE_CHECKING:
    import xarray as xr

MOST_NUMBERS = 300_000
"""Numbers of all learning curves together; of longer curves some epochs are left out."""

PLACE = "{{data}}"
"""Where the data are in page.html."""


@checked(value=as_given, dataset=dataset_of("mf.sweep", "diverged_at"))
def sweep_page(dataset: xr.Dataset, *, value: str | None = None) -> str:
    """A phase diagram of training as one HTML page, which needs no other file and no connection.

    The page shows a result over learning rate and scale, as :func:`plot_sweep` does, and the
    learning curves of the cell that is chosen by mouse or by arrow keys.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.
        value: The result to show first; None: test_loss if there is one, else loss.

    Returns:
        The page. Numbers are rounded to four digits; of all learning curves together it has at most
        300,000, evenly spaced epochs and the last one, or the last one alone.

    Raises:
        SpecError: if the data set does not have this result.

    Example:
        >>> import meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> result = mf.sweep(net, (x, labels), dict(learning_rate=[0.01, 0.1]), epochs=1)
        >>> mf.sweep_page(result).startswith("<!DOCTYPE html>")
        True
    """
    if value is not None:
        check_choice("value", value, results_of(dataset))
    data = json.dumps(page_data(dataset, value), separators=(",", ":"), allow_nan=False)
    for letter in "<>&":
        data = data.replace(letter, f"\\u{ord(letter):04x}")
    page = importlib.resources.files("meanfield_jax").joinpath("page.html")
    return page.read_text(encoding="utf-8").replace(PLACE, data)


def page_data(dataset: xr.Dataset, value: str | None = None) -> dict[str, Any]:
    """What the page shows.

    Args:
        dataset: What :func:`meanfield_jax.sweep` returned.
        value: The result to show first.

    Returns:
        Data that JSON can hold. Arrays are over slices (combinations of the axes that are not
        drawn), the vertical axis, the horizontal axis, seeds and epochs, as far as they depend on
        them; rates that do not depend on the horizontal axis have 1 value along it.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    across, upwards, others = axes_of(dataset)
    drawn = [across] if upwards is None else [across, upwards]
    dataset = dataset.sortby(drawn)
    # the names of axes that are not there do not matter
    cell = [*others, upwards or "row", across]
    run = [*cell, "run" if across == "seed" else "seed"]
    known = results_of(dataset)
    epochs = _epochs(dataset.sizes["epoch"], dataset.diverged_at.size * len(known))
    results = {}
    for name in sorted(known, key=lambda name: name != value):
        shown = dataset[name]
        last = last_of(dataset, name)
        ends = None if name == "test_accuracy" else color_range(last.values)
        results[name] = dict(
            label=f"{shown.attrs.get('long_name', name)} after {dataset.sizes['epoch']} epochs",
            log=ends is not None,
            range=_rounded(ends or _ends(last.values)),
            last=_rounded(_over(last, cell, len(others))),
            curves=_rounded(_over(shown.isel(epoch=epochs), [*run, "epoch"], len(others))),
        )
    predicted = {}
    for name, label in LABEL.items():
        rates = dataset[f"eta_max_{name}"]
        for axis in [*others, *drawn]:
            if axis not in (*rates.dims, "learning_rate"):
                rates = rates.expand_dims({axis: dataset[axis].values})
        table = _rounded(_over(rates, cell, len(others)))
        predicted[name] = dict(label=label, color=COLOR[name], line=LINE[name], rates=table)
    return dict(
        x=_axis(dataset, across),
        y=upwards and _axis(dataset, upwards),
        slices=[text_of(at) for at in points_of(dataset, others)],
        seeds=dataset.seed.values.tolist() if "seed" in dataset.dims and across != "seed" else [],
        epochs=[epoch + 1 for epoch in epochs],
        results=results,
        diverged_at=_over(dataset.diverged_at, run, len(others)).tolist(),
        predicted=predicted,
        colors=[to_hex(colormaps["viridis"](level)) for level in np.linspace(0, 1, 16)],
        seed_colors=NORM_COLORS,
        facts={str(name): _parsed(fact) for name, fact in dataset.attrs.items()},
    )


def _over(array: xr.DataArray, dims: Sequence[str], num_others: int) -> np.ndarray:
    """The values over these dimensions, 1 of those that the array lacks, the first ones as one."""
    whole = array.expand_dims([name for name in dims if name not in array.dims])
    values = whole.transpose(*dims).values
    return values.reshape(-1, *values.shape[num_others:])


def _ends(values: np.ndarray) -> list[float]:
    """The ends of a scale of equal steps."""
    finite = values[np.isfinite(values)]
    return [float(finite.min()), float(finite.max())] if finite.size else [0.0, 1.0]


def _epochs(count: int, curves: int) -> list[int]:
    """The epochs of the learning curves, counted from 0."""
    kept = max(1, min(count, MOST_NUMBERS // curves))
    return sorted({count - 1 - int(index * count / kept) for index in range(kept)})


def _axis(dataset: xr.Dataset, name: str) -> dict[str, Any]:
    """An axis: its name, values, the borders of the cells, and whether it is logarithmic."""
    values = dataset[name].values
    return dict(
        name=name,
        label=dataset[name].attrs.get("long_name", name),
        values=_rounded(values),
        edges=_rounded(edges_of(values), 8),
        log=bool(values.min() > 0),
    )


def _rounded(values: Any, digits: int = 4) -> Any:
    """Numbers of so many digits in nested lists; null for NaN, texts for infinities."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
    if isinstance(values, (list, tuple)):
        return [_rounded(value, digits) for value in values]
    if isinstance(values, int):
        return values
    if values != values:
        return None
    if values in (np.inf, -np.inf):
        return "Infinity" if values > 0 else "-Infinity"
    short = float(f"{values:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short


def _parsed(fact: Any) -> Any:
    """A fact of the store, which may be JSON itself."""
    try:
        return json.loads(fact, parse_constant=str)
    except (TypeError, ValueError):
        return str(fact)
