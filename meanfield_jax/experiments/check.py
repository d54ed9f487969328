"""What of a store is whole, what can be computed again, and what is lost."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np

from meanfield_jax.errors import DataError
from meanfield_jax.experiments.files import Folder, Memory, files_at
from meanfield_jax.experiments.store import (
    LIMIT,
    DamagedFile,
    content_of,
    existing,
    open_header,
    opened,
)
from meanfield_jax.experiments.zarr_format import (
    HEADER,
    MALFORMED,
    array_metadata,
    digest_of,
    parsed_array,
    unproven_header,
)

RESUME = "resume the sweep, which writes it again"
OPTIONS = "resume the sweep with the options it was made with, which keeps its results"


@dataclasses.dataclass(frozen=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        file: The file, by its path in the store; for a chunk, maybe the files among which it is.
        state: "repairable" or "lost".
        remedy: What to do.
    """

    file: str
    state: str
    remedy: str


@dataclasses.dataclass(frozen=True)
class Check:
    """What :func:`check_store` found.

    Attributes:
        whole, damaged, missing: Numbers of chunks; the missing ones have not been computed yet.
        unknown: Number of chunks that are there, but whose digests cannot be checked because the
            store's header is lost.
        faults: What is wrong.
    """

    whole: int
    damaged: int
    missing: int
    unknown: int
    faults: tuple[Fault, ...]


def check_store(location: str | Path) -> Check:
    """Reads a whole store and compares it with its digests.

    Args:
        location: The ``store`` that was passed to :func:`meanfield_jax.sweep`.

    Returns:
        Numbers of chunks, and what is wrong.

    Raises:
        DataError: if there is no sweep at this location.
        OSError: if it cannot be read.
    """
    files = files_at(location)
    try:
        files, attributes = open_header(files)
        return _checked(files, attributes, [])
    except DamagedFile:
        files = existing(files)
    attributes = unproven_header(files.read(HEADER, LIMIT))
    try:
        first = [Fault(HEADER, "repairable", OPTIONS)]
        found = None if attributes is None else _checked(files, attributes, first)
    except DataError:
        found = None
    # a chunk's digest covers the specification, so that one that is right proves it
    return found if found is not None and found.whole else _without_header(files)


def _checked(files: Folder | Memory, attributes: dict[str, Any], faults: list[Fault]) -> Check:
    """What there is, by the header's digests."""
    contents = {}
    for file, digest in attributes["files"].items():
        content = content_of(files, file)
        if content is None or digest_of(content) != digest:
            faults.append(Fault(file, "repairable", RESUME))
            try:
                content = _stand_in(files, attributes, file)
            except MALFORMED:
                content = None
        if content is not None:
            contents[file] = content
    store = opened(files, attributes, contents)
    whole = damaged = 0
    for number in range(len(store.regions)):
        *results, digest = store.names_of(number)
        if store.contents_of(number) is not None:
            whole += 1
        elif (store.files.read(digest, LIMIT)) is not None:
            damaged += 1
            gone = [name for name in results if store.files.read(name, LIMIT) is None]
            file = ", ".join(gone) or f"one of {', '.join((*results, digest))}"
            faults.append(Fault(file, "repairable", "resume the sweep, which runs it again"))
    return Check(whole, damaged, len(store.regions) - whole - damaged, 0, tuple(faults))


def _stand_in(files: Folder | Memory, attributes: dict[str, Any], file: str) -> bytes | None:
    """Metadata of an array of results, which are all that has no values in the header.

    Whether the array has an axis of epochs is seen from the depth of its folders.

    Returns:
        What is enough to find its files; None for any other file.
    """
    name, _, last = file.rpartition("/")
    values = any(other.startswith(f"{name}/c") for other in attributes["files"])
    if last != "zarr.json" or name == "digest" or values or not re.fullmatch(r"\w+", name):
        return None
    axes = {axis: len(values) for axis, values in attributes["spec"]["grid"].items()}
    found = Path(getattr(files, "path", "")).glob("/".join((name, "c", *("*" for _ in axes))))
    epochs = 0 if any(path.is_file() for path in itertools.islice(found, 1)) else 1
    shape, dims = (*axes.values(), *(1,) * epochs), (*axes, *("epoch",) * epochs)
    return array_metadata(shape, shape, np.float32, np.nan, dims, dict(role="result"))


def _without_header(files: Folder | Memory) -> Check:
    """How many chunks there are, of how many."""
    try:
        (total,), *_ = parsed_array(files.read("digest/zarr.json", LIMIT) or b"")
    except MALFORMED:
        total = 0
    digests = files.path / "digest" / "c" if isinstance(files, Folder) else Path()
    there = sum(path.name.isdigit() for path in digests.iterdir()) if digests.is_dir() else 0
    lost = Fault(HEADER, "lost", OPTIONS)
    return Check(0, 0, max(total - there, 0), there, (lost,))
