"""Sweeps that grow: more values on the axes, or more epochs, in a store that has results already.

The larger store is made in a hidden folder next to the old one, and takes its place when it is
complete; until then the old store is not touched. Cells of the old store are copied, and only the
others are trained. With more epochs, cells that diverged are copied and the others are trained anew
from the start, because a store holds curves and not parameters, which are a thousand times larger.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import numpy as np

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.birth import differences
from meanfield_jax.experiments.files import Folder, Memory, beside, synchronize
from meanfield_jax.experiments.store import Layout, SweepStore, open_store

if TYPE_CHECKING:
    import xarray as xr


def store_to_extend(files: Folder | Memory, layout: Layout, *, settle: bool) -> SweepStore | None:
    """The store from which one of this layout can grow.

    Args:
        files: Where it is.
        layout: That of the larger store.
        settle: Whether to undo or complete an exchange in which a process was killed, with a lock.

    Returns:
        None if there is none, or if it is that of the layout itself.

    Raises:
        SpecError: if the layout does not contain the stored sweep.
        DataError: if anything but the results of the store is damaged.
    """
    if isinstance(files, Folder) and settle:
        _settle(files)
    if not files.top():
        return None
    stored = open_store(files)
    if not differences(stored.layout.spec, layout.spec):
        return None
    found = list(_what_does_not_grow(stored.layout.spec, layout.spec))
    if found:
        cause = f"the new sweep does not contain it: {'; '.join(found[:5])}"
        remedy = "keep all values and change nothing but the grid and the number of epochs"
        raise problem(SpecError, "store", files.name, cause, remedy)
    return stored


def known_cells(old: xr.Dataset, layout: Layout) -> dict[str, np.ndarray]:
    """The results of an old sweep on a larger grid, with missing values elsewhere."""
    spec = layout.spec
    results = old[list(layout.variables)]
    for name in spec["grid"]:
        if name not in results.dims:
            results = results.expand_dims(name)
    results = results.squeeze([name for name in old.diverged_at.dims if name not in spec["grid"]])
    if spec["epochs"] != old.sizes["epoch"]:
        results = results.where(results.diverged_at >= 0)
    epochs = np.arange(1, spec["epochs"] + 1)
    results = results.reindex(dict(spec["grid"], epoch=epochs))
    return {
        name: results[name]
        .transpose(*spec["grid"], *("epoch",) * len(variable.shape))
        .fillna(variable.missing)
        .values.astype(variable.dtype)
        for name, variable in layout.variables.items()
    }


def grown(files: Folder | Memory) -> Folder | Memory:
    """Where the larger store is made."""
    return Folder(beside(files, "grown")) if isinstance(files, Folder) else Memory()


def exchange(files: Folder | Memory) -> None:
    """Puts the larger store in the place of the old one; the caller holds the lock."""
    assert isinstance(files, Folder)
    old = beside(files, "old")
    files.path.rename(old)
    beside(files, "grown").rename(files.path)
    synchronize(files.path.parent)
    shutil.rmtree(old)


def _settle(files: Folder) -> None:
    old = beside(files, "old")
    if files.path.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        old.rename(files.path)


def _what_does_not_grow(stored: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Differences that are not more values or epochs."""
    grows = ("grid", "fixed", "epochs")
    rest = ({key: spec[key] for key in spec if key not in grows} for spec in (stored, now))
    found = differences(*rest)
    if now["epochs"] < stored["epochs"]:
        found.append(f"epochs {stored['epochs']} in the store, {now['epochs']} now")
    before, after = _values(stored), _values(now)
    for name in {**before, **after}:
        if name not in before or name not in after:
            where = "now" if name in before else "in the store"
            found.append(f"{name} is as the network specifies {where}")
        elif lost := [value for value in before[name] if value not in after[name]]:
            found.append(f"{name} {lost[0]} of the store is not in the grid")
    return found


def _values(spec: dict[str, Any]) -> dict[str, list]:
    return {name: [value] for name, value in spec["fixed"].items()} | spec["grid"]
