"""What of a store is whole, what can be computed again, and what is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from meanfield_jax.experiments.files import files_at
from meanfield_jax.experiments.store import (
    LIMIT,
    DamagedFile,
    SweepStore,
    content_of,
    open_header,
    opened,
)
from meanfield_jax.experiments.zarr_format import digest_of

RESUME = "resume the sweep, which writes it again"


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
        whole, damaged, missing: Numbers of chunks; the missing ones have not been computed yet. All
            are 0 where it is not known what the store holds.
        faults: What is wrong.
    """

    whole: int
    damaged: int
    missing: int
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
    except DamagedFile:
        remedy = "resume the sweep with the options it was made with, which keeps its results"
        return Check(0, 0, 0, (Fault("zarr.json", "lost", remedy),))
    contents, faults = {}, []
    for file, digest in attributes["files"].items():
        content = content_of(files, file)
        if content is None or digest_of(content) != digest:
            faults.append(Fault(file, "repairable", RESUME))
        else:
            contents[file] = content
    if any(fault.file.endswith("zarr.json") for fault in faults):
        # without these it is not known what the results are
        return Check(0, 0, 0, tuple(faults))
    return _with_chunks(opened(files, attributes, contents), faults)


def _with_chunks(store: SweepStore, faults: list[Fault]) -> Check:
    whole = damaged = 0
    for number in range(len(store.regions)):
        *results, digest = store.names_of(number)
        if store.read(number) is not None:
            whole += 1
        elif (store.files.read(digest, LIMIT)) is not None:
            damaged += 1
            gone = [name for name in results if store.files.read(name, LIMIT) is None]
            file = ", ".join(gone) or f"one of {', '.join((*results, digest))}"
            faults.append(Fault(file, "repairable", "resume the sweep, which runs it again"))
    return Check(whole, damaged, len(store.regions) - whole - damaged, tuple(faults))
