"""The grid of a sweep: its axes, and how it is divided into chunks that fit the memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from meanfield_jax.checks import native
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.in_turn import IN_TURN
from meanfield_jax.experiments.store import Region
from meanfield_jax.experiments.train import bytes_of_cell
from meanfield_jax.memory import memory_of
from meanfield_jax.network import Network
from meanfield_jax.variants import with_depth, with_width

AXES = {
    "batch_size": "samples per step",
    "depth": "hidden blocks",
    "width": "units or channels of every hidden layer",
    "gamma": "initial scale of every norm",
    "weight_var": "variance of a weight times the fan-in",
    "learning_rate": "learning rate",
    "momentum": "momentum of the heavy ball",
    "seed": "seed of the draw and of the order of the samples",
}
"""Axes that a grid may have, with a description of each."""

STRUCTURE = ("batch_size", "depth", "width")
"""Axes along which the computation is compiled again for every value."""

WHOLE = (*STRUCTURE, "seed")
"""Axes whose values are integers."""

DEFAULTS = dict(batch_size=100, learning_rate=0.1, momentum=0.9, seed=0)

CELLS_ON_CPU, CELLS_ELSEWHERE = 16, 1024
"""The most cells of a chunk, on CPU in all and elsewhere for each device: little is lost when a
small chunk is interrupted."""


def split_grid(grid: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The axes, and the numbers that are the same for all cells."""
    axes, fixed = {}, {name: np.asarray(value) for name, value in DEFAULTS.items()}
    for name, given in grid.items():
        if name not in AXES:
            raise problem(SpecError, "grid", name, "unknown axis", f"use {', '.join(AXES)}")
        values = native(np.asarray(list(given) if isinstance(given, range) else given))
        if name in WHOLE and values.dtype.kind not in "iu":
            remedy = "pass integers"
            raise problem(SpecError, f"grid[{name!r}]", values.tolist(), "must be integers", remedy)
        if values.dtype.kind not in "iuf" or values.ndim > 1 or values.size == 0:
            cause, remedy = "must be numbers", "pass a number or a non-empty sequence of numbers"
            raise problem(SpecError, f"grid[{name!r}]", given, cause, remedy)
        if len(np.unique(values)) < values.size:
            remedy = "pass each value once"
            raise problem(SpecError, f"grid[{name!r}]", values.tolist(), "values repeat", remedy)
        if name not in WHOLE:
            values = values.astype(np.float64)
        if values.ndim == 1:
            axes[name] = values
            fixed.pop(name, None)
        else:
            fixed[name] = values
    if not axes:
        remedy = "pass a sequence of values for at least one axis"
        raise problem(SpecError, "grid", dict(grid), "it has no axis", remedy)
    return axes, fixed


def structures(axes: dict, fixed: dict) -> Iterator[dict[str, Any]]:
    """Yields every combination of the values that need separate compilation."""
    choices = {
        name: np.atleast_1d((axes | fixed)[name]) for name in STRUCTURE if name in axes | fixed
    }
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def structure_key(numbers: Mapping[str, Any]) -> tuple:
    """The values of the axes in ``STRUCTURE``."""
    return tuple(int(numbers[name]) for name in STRUCTURE if name in numbers)


def restructured(network: Network, structure: dict[str, Any]) -> Network:
    """The network with the depth and the width of a point of the grid."""
    if "depth" in structure:
        network = with_depth(network, int(structure["depth"]))
    if "width" in structure:
        network = with_width(network, int(structure["width"]))
    return network


def coordinates_of(axes: dict, fixed: dict, epochs: int) -> dict[str, Any]:
    """Coordinates of the data set, as xarray takes them."""
    coordinates = {
        name: ((name,) if name in axes else (), values, dict(long_name=AXES[name], units="1"))
        for name, values in (axes | fixed).items()
    }
    return coordinates | dict(epoch=(("epoch",), np.arange(1, epochs + 1), {}))


def chunk_shape(axes: dict[str, int], cells: int) -> tuple[int, ...]:
    """The extent of a chunk along each axis: whole last axes, then equal parts of one axis."""
    sizes = []
    for name, size in reversed(axes.items()):
        most = 1 if name in STRUCTURE else min(size, max(cells, 1))
        sizes.append(math.ceil(size / math.ceil(size / most)))
        cells //= sizes[-1]
    return tuple(reversed(sizes))


def shape_of(region: Region) -> tuple[int, ...]:
    """The number of values on each axis of a block of the grid."""
    return tuple(part.stop - part.start for part in region)


def cells_in_memory(recipes: Any, devices: list[Any]) -> int:
    """Cells per chunk: as many as fit into half of the devices' memory, and few on CPU."""
    if devices[0].platform in IN_TURN:
        return max(CELLS_ON_CPU, len(devices))
    memory = memory_of(devices) / len(devices) / 2
    each = max(bytes_of_cell(recipe) for recipe in recipes)
    return max(1, int(min(CELLS_ELSEWHERE, memory / each))) * len(devices)
