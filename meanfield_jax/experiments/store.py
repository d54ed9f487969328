"""The store of a sweep: a Zarr group, written chunk by chunk, that survives a killed process.

A store is made at once, with its header, the coordinates and the predicted boundaries; the header
has digests of them all. Results are arrays over the grid's axes; a chunk is a block of them, in one
file per array. When all files of a chunk are on the disk, a digest of its numbers is written to
``digest``, and only then does the chunk count as finished. A chunk that is missing, truncated,
altered or of another place does not match its digest and is computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from meanfield_jax.errors import DataError, problem
from meanfield_jax.experiments.files import Folder, Memory, beside, files_at
from meanfield_jax.experiments.zarr_format import (
    FORMAT,
    HEADER,
    MALFORMED,
    claimed_format,
    digest_of,
    from_bytes,
    identity,
    parsed_array,
    parsed_header,
    to_bytes,
)
from meanfield_jax.memory import memory_of
from meanfield_jax.status import Status

if TYPE_CHECKING:
    import xarray as xr

NO_DIGEST = 0
LIMIT = 2**28
"""The most bytes of a file that is not a result."""

Region = tuple[slice, ...]
Named = dict[str, tuple[tuple[str, ...], np.ndarray, dict[str, Any]]]
"""Dimensions, values and attributes of arrays, as xarray takes them."""


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
        coordinates: Coordinates of the axes.
        spec: Everything that determines the numbers, as data that JSON can hold.
        facts: Other information (versions, machine), which may change when a sweep is resumed.
    """

    axes: dict[str, int]
    chunk: tuple[int, ...]
    variables: dict[str, Variable]
    coordinates: Named
    spec: dict[str, Any]
    facts: dict[str, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a result that is one number per cell."""
        return tuple(self.axes.values())

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of chunks along each axis."""
        return tuple(
            math.ceil(size / step) for size, step in zip(self.shape, self.chunk, strict=True)
        )


class SweepStore:
    """The results of a sweep; see the module's docstring.

    Attributes:
        files: Where they are.
        layout: What it holds.
        extra: Arrays beside the results that are known, the coordinates among them.
    """

    def __init__(self, files: Folder | Memory, layout: Layout, extra: Named):
        self.files, self.layout, self.extra = files, layout, extra
        self._key = identity(layout.spec, layout.chunk)

    @cached_property
    def regions(self) -> list[Region]:
        """The block of the grid that each chunk covers."""
        layout = self.layout
        return [
            tuple(
                slice(index * step, min((index + 1) * step, size))
                for index, step, size in zip(at, layout.chunk, layout.shape, strict=True)
            )
            for at in itertools.product(*map(range, layout.counts))
        ]

    def write(self, number: int, results: Mapping[str, np.ndarray]) -> None:
        """Writes a chunk, which counts as finished once its digest is on the disk.

        Raises:
            OSError: if the store cannot be written; what it holds stays readable.
        """
        files = self.chunk_files(number, results)
        last = dict([files.popitem()])
        try:
            self.files.write(files)
            self.files.write(last)
        except OSError as error:
            cause = f"{error.strerror or error}, after {self.num_finished} of {len(self.regions)}"
            remedy = "finished chunks are kept, so correct the cause and resume the sweep"
            raise OSError(f"store={self.files.name!r}: {cause} chunks; {remedy}") from error

    def chunk_files(self, number: int, results: Mapping[str, np.ndarray]) -> dict[str, bytes]:
        """The files of a chunk, that of its digest last."""
        files, region = {}, self.regions[number]
        for name, variable in sorted(self.layout.variables.items()):
            # a chunk at the edge is stored as one of full size
            whole = np.full((*self.layout.chunk, *variable.shape), variable.missing, variable.dtype)
            whole[tuple(slice(part.stop - part.start) for part in region)] = results[name]
            files[self._file(name, number)] = to_bytes(whole)
        files[f"digest/c/{number}"] = self._digest(number, files.values())
        return files

    def read(self, number: int) -> dict[str, np.ndarray] | None:
        """The results of a finished chunk; None if it is missing or damaged."""
        contents = self.contents_of(number)
        if contents is None:
            return None
        variables = sorted(self.layout.variables.items())
        within = tuple(slice(part.stop - part.start) for part in self.regions[number])
        results = {}
        for (name, variable), content in zip(variables, contents, strict=True):
            shape = (*self.layout.chunk, *variable.shape)
            results[name] = from_bytes(content, np.dtype(variable.dtype), shape)[within]
        return results

    def contents_of(self, number: int) -> list[bytes] | None:
        """The files of results of a finished chunk; None if one is missing or damaged."""
        if (digest := self.files.read(f"digest/c/{number}", 8)) is None:
            return None
        *names, _ = self.names_of(number)
        contents = [
            content for name in names if (content := self.files.read(name, LIMIT)) is not None
        ]
        whole = len(contents) == len(names) and self._digest(number, contents) == digest
        return contents if whole else None

    def names_of(self, number: int) -> list[str]:
        """The files of a chunk, that of its digest last."""
        names = [self._file(name, number) for name in sorted(self.layout.variables)]
        return [*names, f"digest/c/{number}"]

    def pending(self) -> list[int]:
        """The chunks that are missing or damaged; reads all results."""
        return [number for number in range(len(self.regions)) if self.read(number) is None]

    @property
    def num_finished(self) -> int:
        """The number of chunks with a digest; their results are not read."""
        return sum(
            self.files.read(f"digest/c/{number}", 8) is not None
            for number in range(len(self.regions))
        )

    def dataset(self) -> xr.Dataset:
        """All finished results; elsewhere NaN, -2 for ``diverged_at`` and ``Status.NOT_RUN``."""
        import xarray as xr

        layout = self.layout
        data, finished = {}, 0
        for name, variable in layout.variables.items():
            values = np.full((*layout.shape, *variable.shape), variable.missing, variable.dtype)
            tail = ("epoch",) * len(variable.shape)
            data[name] = ((*layout.axes, *tail), values, variable.attributes)
        for number, region in enumerate(self.regions):
            results = self.read(number)
            finished += results is not None
            for name, values in (results or {}).items():
                data[name][1][region] = values
        if "diverged_at" in data:
            data["status"] = (tuple(layout.axes), *_status(data["diverged_at"][1]))
        coordinates, others = {}, {}
        for name, (dims, values, attributes) in self.extra.items():
            kept = {key: value for key, value in attributes.items() if key != "role"}
            chosen = coordinates if attributes.get("role") == "coordinate" else others
            chosen[name] = (dims, values, kept)
        shares = f"{finished} of {len(self.regions)} chunks"
        attributes = dict(layout.facts, spec=json.dumps(layout.spec), finished=shares)
        return xr.Dataset(data | others, coordinates, attributes)

    def _file(self, name: str, number: int) -> str:
        return f"{name}/c/{self._places[number]}" + "/0" * len(self.layout.variables[name].shape)

    @cached_property
    def _places(self) -> list[str]:
        """The place of each chunk among all, as its files are named."""
        return ["/".join(map(str, at)) for at in itertools.product(*map(range, self.layout.counts))]

    def _digest(self, number: int, contents: Any) -> bytes:
        """Eight bytes that say which sweep, which chunk and which numbers; never NO_DIGEST."""
        digest = hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8, key=self._key)
        for content in contents:
            digest.update(content)
        value = int.from_bytes(digest.digest(), "little") or NO_DIGEST + 1
        return value.to_bytes(8, "little")


def _status(diverged_at: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """How each cell ended, and the meaning of the numbers in the form of the CF conventions."""
    values = np.where(diverged_at >= 0, Status.DIVERGED, Status.CONVERGED)
    values = np.where(diverged_at == -2, Status.NOT_RUN, values).astype(np.int32)
    flags = (Status.CONVERGED, Status.DIVERGED, Status.NOT_RUN)
    meanings = " ".join(flag.label for flag in flags)
    said = dict(long_name="how training ended", flag_values=[int(flag) for flag in flags])
    return values, dict(said, flag_meanings=meanings)


def load_sweep(location: str | Path) -> xr.Dataset:
    """The data set of a stored sweep, finished or not.

    Args:
        location: The ``store`` that was passed to :func:`meanfield_jax.sweep`.

    Returns:
        As :func:`meanfield_jax.sweep`; cells that have not been computed yet are NaN.

    Raises:
        DataError: if there is no sweep at this location, or anything but its results is damaged.
        OSError: if it cannot be read.
    """
    store = open_store(files_at(location))
    try:
        return store.dataset()
    except ValueError:
        raise _not_of_a_sweep(store.files.name) from None


def open_store(files: Folder | Memory) -> SweepStore:
    """Opens a stored sweep for reading; raises DataError if anything but its results is damaged."""
    files, attributes = open_header(files)
    contents = {}
    for file, digest in attributes["files"].items():
        content = content_of(files, file)
        if content is None or digest_of(content) != digest:
            raise DamagedFile(files.name, file)
        contents[file] = content
    return opened(files, attributes, contents)


def opened(
    files: Folder | Memory, attributes: dict[str, Any], contents: dict[str, bytes]
) -> SweepStore:
    """The store with this header and these other files; raises DataError if they are no sweep's."""
    try:
        return SweepStore(files, *_stored(attributes, contents, files.name))
    except DataError:
        raise
    except MALFORMED:
        raise _not_of_a_sweep(files.name) from None


def open_header(files: Folder | Memory) -> tuple[Folder | Memory, dict[str, Any]]:
    """The files of a stored sweep, and its header; raises DataError if that is not whole."""
    files, name = existing(files), files.name
    content = _read(files, HEADER)
    attributes = content and parsed_header(content)
    if attributes:
        return files, attributes
    claimed = claimed_format(content)
    if claimed not in (None, "", FORMAT):
        raise of_another_version(name, claimed)
    if claimed == FORMAT or files.read("digest/zarr.json", LIMIT):
        raise DamagedFile(name, HEADER)
    raise _not_of_a_sweep(name)


def existing(files: Folder | Memory) -> Folder | Memory:
    """The files of a store; raises DataError if there are none."""
    name = files.name
    if not files.top() and isinstance(files, Folder):
        # there is another where a process was killed as it exchanged the two
        files = Folder(beside(files, "old"), name)
    if not files.top():
        raise problem(DataError, "store", name, "it does not exist", "use a sweep's store")
    return files


def _not_of_a_sweep(name: str) -> ValueError:
    remedy = "use one that meanfield-jax sweep made"
    return problem(DataError, "store", name, "it is not a sweep's store", remedy)


def _read(files: Folder | Memory, name: str) -> bytes | None:
    try:
        return files.read(name, LIMIT)
    except OSError as error:
        remedy = "check the folder"
        raise OSError(f"store={files.name!r}: {error.strerror or error}; {remedy}") from error


class DamagedFile(DataError):
    """A file of a store is missing or damaged, and it is not one of the results."""

    def __init__(self, store: str, file: str):
        remedy = "resume the sweep with the options it was made with, which writes it again"
        cause = f"its file {file} is missing or damaged"
        super().__init__(*problem(DataError, "store", store, cause, remedy).args)


def of_another_version(name: str, claimed: str) -> ValueError:
    """The error for a store whose format this version does not know."""
    remedy = "use another name, or the version that made it"
    return problem(DataError, "store", name, f"it has the format {claimed}, not {FORMAT}", remedy)


def content_of(files: Folder | Memory, name: str) -> bytes | None:
    """The content of a file that a header names; None if there is none, as for other names."""
    known = re.fullmatch(r"\w+/(zarr\.json|c(/0)*)", name)
    return _read(files, name) if known else None


def _stored(
    attributes: dict[str, Any], contents: dict[str, bytes], name: str
) -> tuple[Layout, Named]:
    """Layout and arrays of a store whose header is whole; raises what is in MALFORMED."""
    spec, chunk = attributes["spec"], tuple(attributes["chunk"])
    axes = {key: len(values) for key, values in spec["grid"].items()}
    variables, extra = {}, {}
    for file, content in contents.items():
        array, _, last = file.rpartition("/")
        if last != "zarr.json" or array == "digest":
            continue
        shape, dtype, dims, said = parsed_array(content)
        if said.get("role") == "result":
            if shape[: len(axes)] != tuple(axes.values()) or len(dims) > len(axes) + 1:
                raise ValueError("a result that does not fit the grid")
            kept = {key: value for key, value in said.items() if key != "role"}
            missing = np.nan if dtype.kind == "f" else -2
            variables[array] = Variable(shape[len(axes) :], dtype, missing, kept)
        else:
            values = contents.get("/".join((array, "c", *("0" for _ in shape))))
            if values is not None:
                extra[array] = (dims, from_bytes(values, dtype, shape), said)
    if len(chunk) != len(axes) or not all(type(step) is int and step > 0 for step in chunk):
        raise ValueError("chunks that do not fit the grid")
    needed = math.prod(axes.values()) * sum(
        4 * math.prod(v.shape) + 500 for v in variables.values()
    )
    if needed > memory_of([]) / 2:
        cause = f"its grid would need {needed:.2g} bytes, more than half of this machine's memory"
        raise problem(DataError, "store", name, cause, "read it on a machine with more memory")
    layout = Layout(axes, chunk, variables, {}, spec, dict(attributes["facts"]))
    return layout, extra
