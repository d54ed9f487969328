"""The store of a sweep: a Zarr group, written chunk by chunk, that survives a killed process.

Results are arrays over the grid's axes; a chunk is a block of them, in one file per array. When all
files of a chunk have been written, a checksum of its numbers is written to ``digest``, and only
then does the chunk count as finished. A chunk that is missing, truncated or altered does not match
its checksum and is computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import zlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meanfield_jax.errors import DataError, SpecError, problem

if TYPE_CHECKING:
    import xarray as xr
    import zarr
    from zarr.storage import MemoryStore

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None

FORMAT = "meanfield_jax.sweep/1"
NO_DIGEST = 0
UNREADABLE = (OSError, RuntimeError, ValueError, KeyError, TypeError)
"""Exceptions that Zarr and its codecs raise for missing or damaged files."""

Region = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Variable:
    """A result that each cell has.

    Attributes:
        shape: Shape of one cell's result, () or (epochs,).
        dtype: Type of the result.
        missing: The value for cells that have not been computed.
        attributes: Units and description.
    """

    shape: tuple[int, ...]
    dtype: Any
    missing: Any
    attributes: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a store holds.

    Attributes:
        axes: Number of values on every axis of the grid, first to last.
        chunk: Number of values on each axis within a chunk.
        variables: Results of each cell, by name; an axis in their shape is "epoch".
        coordinates: Dimensions, values and attributes of each coordinate, as xarray takes them.
        spec: Everything that determines the numbers, as data that JSON can hold.
        facts: Other information (versions, machine), which may change when a sweep is resumed.
    """

    axes: dict[str, int]
    chunk: tuple[int, ...]
    variables: dict[str, Variable]
    coordinates: dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]]
    spec: dict[str, Any]
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a result that is one number per cell."""
        return tuple(self.axes.values())


class SweepStore:
    """The results of a sweep in one Zarr group; see the module's docstring.

    Attributes:
        layout: What it holds; the chunks are those with which it was created.
        name: Its location, for messages.
    """

    def __init__(self, group: zarr.Group, layout: Layout, name: str):
        self._group = group
        self.name = name
        chunk = tuple(group.attrs["chunk"])  # pyright: ignore[reportArgumentType]
        self.layout = dataclasses.replace(layout, chunk=chunk)

    @cached_property
    def regions(self) -> list[Region]:
        """The block of the grid that each chunk covers."""
        starts = (
            range(0, size, step)
            for size, step in zip(self.layout.shape, self.layout.chunk, strict=True)
        )
        return [
            tuple(
                slice(start, min(start + step, size))
                for start, step, size in zip(at, self.layout.chunk, self.layout.shape, strict=True)
            )
            for at in itertools.product(*starts)
        ]

    def write(self, number: int, results: dict[str, np.ndarray]) -> None:
        """Writes a chunk, which counts as finished once its checksum has been written.

        Raises:
            OSError: if the store cannot be written; what it holds stays readable.
        """
        region = self.regions[number]
        ordered = {
            name: np.ascontiguousarray(results[name], variable.dtype)
            for name, variable in self.layout.variables.items()
        }
        try:
            for name, values in ordered.items():
                self._array(name)[region] = values
            self._array("digest")[number] = _digest(ordered)
        except OSError as error:
            cause = f"{error.strerror or error}, after {self.num_finished} of {len(self.regions)}"
            remedy = "finished chunks are kept, so correct the cause and resume the sweep"
            raise OSError(f"store={self.name!r}: {cause} chunks; {remedy}") from error

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """The results of a finished chunk; None if it is missing or damaged."""
        region = self.regions[number]
        if (expected := self._digest_of(number)) == NO_DIGEST:
            return None
        try:
            results = {
                name: np.ascontiguousarray(self._array(name)[region])
                for name in self.layout.variables
            }
        except UNREADABLE:
            return None
        return results if _digest(results) == expected else None

    def pending(self) -> list[int]:
        """The chunks that are missing or damaged; reads all results."""
        return [number for number in range(len(self.regions)) if self.read(number) is None]

    @property
    def num_finished(self) -> int:
        """The number of chunks with a checksum; their results are not read."""
        return sum(self._digest_of(number) != NO_DIGEST for number in range(len(self.regions)))

    def add(self, name: str, dims: tuple[str, ...], values: np.ndarray, attributes: dict) -> None:
        """Stores a small array beside the results, in one piece."""
        _put(self._group, name, dims, values, dict(attributes, role="beside"))

    def has(self, name: str) -> bool:
        """Whether such an array exists and is complete."""
        with contextlib.suppress(*UNREADABLE):
            return bool(np.all(np.isfinite(self._array(name)[...])))
        return False

    def dataset(self) -> xr.Dataset:
        """All finished results; NaN (and -2 for ``diverged_at``) elsewhere."""
        import xarray as xr

        dims = tuple(self.layout.axes)
        data = {}
        for name, variable in self.layout.variables.items():
            values = np.full((*self.layout.shape, *variable.shape), variable.missing)
            tail = ("epoch",) * len(variable.shape)
            data[name] = ((*dims, *tail), values.astype(variable.dtype), variable.attributes)
        finished = 0
        for number, region in enumerate(self.regions):
            results = self.read(number)
            finished += results is not None
            for name, values in (results or {}).items():
                data[name][1][region] = values
        coords = {}
        for name, array in sorted(self._group.arrays()):
            attributes = dict(array.attrs)
            if (role := attributes.pop("role", None)) not in ("coordinate", "beside"):
                continue
            dims = array.metadata.dimension_names or ()  # pyright: ignore[reportAttributeAccessIssue]
            (coords if role == "coordinate" else data)[name] = (dims, array[...], attributes)
        shares = f"{finished} of {len(self.regions)} chunks"
        attributes = dict(self.layout.facts, spec=json.dumps(self.layout.spec), finished=shares)
        return xr.Dataset(data, coords, attributes)

    def _digest_of(self, number: int) -> int:
        try:
            return int(self._array("digest")[number])
        except UNREADABLE:
            return NO_DIGEST

    def _array(self, name: str) -> Any:
        return self._group[name]


def create(location: str | Path | None, layout: Layout, *, resume: bool) -> SweepStore:
    """Creates a store, or opens one in order to continue it.

    Args:
        location: A folder, or anything else that Zarr opens by name; None: memory.
        layout: What the store is to hold.
        resume: Whether the store may exist already.

    Returns:
        The store.

    Raises:
        SpecError: if the store exists and ``resume`` is False, or belongs to another sweep.
        DataError: if something that is not a sweep exists there.
        OSError: if the store cannot be written.
    """
    from zarr.storage import MemoryStore

    group = _open(MemoryStore() if location is None else location, "a")
    name = "memory" if location is None else str(location)
    if "format" in group.attrs:
        if not resume:
            remedy = "resume it (resume=True, --resume) or use another name"
            raise problem(SpecError, "store", name, "it exists already", remedy)
        _check_same(name, group, layout)
    elif list(group.keys()):
        raise problem(DataError, "store", name, "it is not a sweep's store", "use another name")
    try:
        # everything below can be repeated, so a process killed here can be resumed
        if "format" not in group.attrs:
            group.attrs.update(
                dict(format=FORMAT, spec=layout.spec, facts=layout.facts, chunk=layout.chunk)
            )
        store = SweepStore(group, layout, name)
        _make_arrays(group, store)
    except OSError as error:
        remedy = "use a location that can be written"
        raise OSError(f"store={name!r}: {error.strerror or error}; {remedy}") from error
    return store


def load_sweep(location: str | Path) -> xr.Dataset:
    """The data set of a stored sweep, finished or not.

    Args:
        location: The ``store`` that was passed to :func:`meanfield_jax.sweep`.

    Returns:
        As :func:`meanfield_jax.sweep`; cells that have not been computed yet are NaN.

    Raises:
        DataError: if there is no sweep at this location.
    """
    if "://" not in str(location) and not Path(location).exists():
        raise problem(DataError, "store", str(location), "it does not exist", "use a sweep's store")
    return open_store(location).dataset()


def open_store(location: str | Path) -> SweepStore:
    """Opens a stored sweep for reading."""
    group = _open(location, "r")
    if group.attrs.get("format") != FORMAT:
        remedy = "use one that meanfield-jax sweep made"
        raise problem(DataError, "store", str(location), "it is not a sweep's store", remedy)
    attrs: dict[str, Any] = dict(group.attrs)
    variables = {}
    grid = attrs["spec"]["grid"]
    for name, array in group.arrays():
        if array.attrs.get("role") == "result":
            attributes = {key: value for key, value in array.attrs.items() if key != "role"}
            tail = array.shape[len(grid) :]
            variables[name] = Variable(tail, array.dtype, array.fill_value, attributes)
    axes = {name: len(values) for name, values in grid.items()}
    layout = Layout(axes, tuple(attrs["chunk"]), variables, {}, attrs["spec"], attrs["facts"])
    return SweepStore(group, layout, str(location))


@contextlib.contextmanager
def locked(location: str | Path | None) -> Iterator[None]:
    """Keeps a second sweep out of a local store; the lock ends with the process that holds it."""
    path = Path(str(location)) / "zarr.json"
    if fcntl is None or location is None or not path.exists():
        yield
        return
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            cause, remedy = "another sweep is writing to it", "wait for it, or use another name"
            raise problem(SpecError, "store", str(location), cause, remedy) from None
        yield


def _open(location: str | Path | MemoryStore, mode: Any) -> zarr.Group:
    import zarr

    try:
        return zarr.open_group(location, mode=mode, zarr_format=3)
    except OSError as error:
        remedy = "use a folder that can be written" if mode == "a" else "check the folder"
        raise OSError(f"store={str(location)!r}: {error.strerror or error}; {remedy}") from error
    except (*UNREADABLE, ImportError) as error:
        raise problem(DataError, "store", str(location), str(error), "check the folder") from error


def _make_arrays(group: zarr.Group, store: SweepStore) -> None:
    """Creates all arrays that do not exist yet, with empty results."""
    layout = store.layout
    dims = tuple(layout.axes)
    present = set(group.keys())
    for name, variable in layout.variables.items():
        if name not in present:
            group.create_array(
                name,
                shape=(*layout.shape, *variable.shape),
                chunks=(*layout.chunk, *variable.shape),
                dtype=variable.dtype,
                fill_value=variable.missing,
                dimension_names=(*dims, *("epoch",) * len(variable.shape)),
                attributes=dict(variable.attributes, role="result"),
            )
    if "digest" not in present:
        count = len(store.regions)
        group.create_array(
            "digest",
            shape=(count,),
            chunks=(1,),
            dtype="uint64",
            fill_value=NO_DIGEST,
            dimension_names=("chunk",),
            attributes=dict(long_name="checksum of a chunk's results; 0: not finished"),
        )
    for name, (dims, values, attributes) in layout.coordinates.items():
        _put(group, name, dims, values, dict(attributes, role="coordinate"))


def _put(group: zarr.Group, name: str, dims, values: np.ndarray, attributes) -> None:
    values = np.asarray(values)
    if name in group:
        array: Any = group[name]
    else:
        array = group.create_array(
            name,
            shape=values.shape,
            chunks=tuple(max(size, 1) for size in values.shape),
            dtype=values.dtype,
            fill_value=np.nan if values.dtype.kind == "f" else 0,
            dimension_names=dims,
            attributes=attributes,
        )
    array[...] = values


def _digest(results: dict[str, np.ndarray]) -> int:
    """A checksum of the numbers, which is never NO_DIGEST."""
    total = 0
    for name in sorted(results):
        total = zlib.crc32(results[name].tobytes(), total)
    return total + 1


def _check_same(name: str, group: zarr.Group, layout: Layout) -> None:
    """Raises SpecError, with the differences, if a store belongs to another sweep."""
    if group.attrs.get("format") != FORMAT:
        raise problem(DataError, "store", name, "it is not a sweep's store", "use another name")
    # as it is read from a file, where tuples have become lists
    wanted = json.loads(json.dumps(layout.spec))
    found = list(_differences(group.attrs["spec"], wanted, ""))
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        cause = f"it was made with another specification: {'; '.join(found[:5])}{more}"
        remedy = "use another name, or the specification it was made with"
        raise problem(SpecError, "store", name, cause, remedy)


def _differences(stored: Any, now: Any, path: str) -> Iterator[str]:
    """Yields the differences between two pieces of JSON data, one line each."""
    if isinstance(stored, dict) and isinstance(now, dict):
        for key in {**stored, **now}:
            yield from _differences(stored.get(key), now.get(key), f"{path}/{key}".lstrip("/"))
    elif (
        isinstance(stored, list)
        and isinstance(now, list)
        and len(stored) == len(now)
        and any(isinstance(item, (dict, list)) for item in (*stored, *now))
    ):
        for index, pair in enumerate(zip(stored, now, strict=True)):
            yield from _differences(*pair, f"{path}/{index}")
    elif stored != now and not (_is_nan(stored) and _is_nan(now)):
        yield f"{path} {_short(stored)} in the store, {_short(now)} now"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:45]}... ({len(text)} characters)"
