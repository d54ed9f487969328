"""The birth of a store: all of it at once; and its repair, when a sweep is resumed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.experiments.files import UNFINISHED, Folder, Memory
from meanfield_jax.experiments.store import (
    LIMIT,
    NO_DIGEST,
    Layout,
    Named,
    SweepStore,
    content_of,
    of_another_version,
    opened,
)
from meanfield_jax.experiments.zarr_format import (
    FORMAT,
    HEADER,
    array_files,
    array_metadata,
    claimed_format,
    digest_of,
    header,
    parsed_header,
)


def create(
    files: Folder | Memory,
    layout: Layout,
    *,
    resume: bool,
    predict: Callable[[], Named] = dict,
    known: Mapping[str, np.ndarray] | None = None,
) -> SweepStore:
    """Creates a store, or opens one in order to continue it; the caller holds the lock.

    Args:
        files: Where it is to be.
        layout: What the store is to hold.
        resume: Whether the store may exist already.
        predict: Computes what is stored beside the results, where that is not there yet.
        known: Results of the whole grid that are known, with missing values elsewhere.

    Returns:
        The store.

    Raises:
        SpecError: if the store exists and ``resume`` is False, or belongs to another sweep.
        DataError: if something that is not a sweep exists there, or cannot be repaired.
        OSError: if the store cannot be written.
    """
    try:
        if (content := files.read(HEADER, LIMIT)) is not None and parsed_header(content):
            if not resume:
                raise _exists(files)
            return _continued(files, layout, predict)
        if not _begun(files, layout, content):
            return _born(files, layout, predict, known)
        if not resume:
            raise _exists(files)
        return _repaired(files, layout, predict)
    except OSError as error:
        if str(error).startswith("store="):
            raise
        remedy = "use a location that can be written"
        raise OSError(f"store={files.name!r}: {error.strerror or error}; {remedy}") from error


def _exists(files: Folder | Memory) -> ValueError:
    remedy = "resume it (resume=True, --resume) or use another name"
    return problem(SpecError, "store", files.name, "it exists already", remedy)


def _born(
    files: Folder | Memory, layout: Layout, predict: Callable[[], Named], known: Any
) -> SweepStore:
    """Makes the store with all that is known at once."""
    extra = _with_role(layout.coordinates, "coordinate") | _with_role(predict(), "beside")
    contents = _contents(layout, extra)
    store = SweepStore(files, layout, extra)
    results = {}
    for number, region in enumerate(store.regions if known else ()):
        part = {key: values[region] for key, values in (known or {}).items()}
        if np.all(part["diverged_at"] != -2):
            results |= store.chunk_files(number, part)
    first = header(layout.spec, layout.facts, layout.chunk, contents)
    files.create(contents | results | {HEADER: first})
    return store


def _continued(files: Folder | Memory, layout: Layout, predict: Callable[[], Named]) -> SweepStore:
    """Opens a store whose header is whole, and writes again what is damaged."""
    attributes = parsed_header(files.read(HEADER, LIMIT) or b"") or {}
    _check_same(files.name, attributes["spec"], layout)
    layout = dataclasses.replace(layout, chunk=tuple(attributes["chunk"]))
    found = {file: content_of(files, file) for file in attributes["files"]}
    bad = {
        file
        for file, digest in attributes["files"].items()
        if (content := found[file]) is None or digest_of(content) != digest
    }
    whole = {file: content for file, content in found.items() if content and file not in bad}
    coordinates = _with_role(layout.coordinates, "coordinate")
    plain = _contents(layout, coordinates)
    if not bad:
        return opened(files, attributes, whole)
    again = {file: content for file, content in plain.items() if file in bad}
    if bad - set(plain):
        again |= _contents(layout, _with_role(predict(), "beside"))
        again = {file: content for file, content in again.items() if file not in whole}
    files.write(again)
    whole |= again
    # another machine may predict the boundaries with other last digits
    files.write({HEADER: header(layout.spec, attributes["facts"], layout.chunk, whole)})
    return opened(files, attributes, whole)


def _repaired(files: Folder | Memory, layout: Layout, predict: Callable[[], Named]) -> SweepStore:
    """Writes all but the results again, beside results that are known to be those of the layout."""
    extra = _with_role(layout.coordinates, "coordinate") | _with_role(predict(), "beside")
    contents = _contents(layout, extra)
    files.write(contents)
    files.write({HEADER: header(layout.spec, layout.facts, layout.chunk, contents)})
    return SweepStore(files, layout, extra)


def _begun(files: Folder | Memory, layout: Layout, content: bytes | None) -> bool:
    """Whether a folder without a complete header has results of this layout.

    Returns:
        False if it has none at all, so that it may be replaced.

    Raises:
        DataError: if it has results of another one, or files that are not of a sweep.
    """
    claimed = claimed_format(content)
    if claimed not in (None, "", FORMAT):
        raise of_another_version(files.name, claimed)
    if isinstance(files, Folder) and files.path.exists() and not files.path.is_dir():
        raise problem(DataError, "store", files.name, "it is not a folder", "use another name")
    known = {HEADER, "digest", *layout.variables, *layout.coordinates}
    found = {top for top in files.top() if not top.endswith(UNFINISHED)}
    foreign = {top for top in found - known if not top.startswith("eta_max_")}
    store = SweepStore(files, layout, {})
    if any(store.read(number) is not None for number in range(len(store.regions))):
        return True
    if foreign or (claimed == "" and found - {HEADER}):
        cause = f"it is not a sweep's store, but has {min(foreign or found)}"
        raise problem(DataError, "store", files.name, cause, "use another name")
    if isinstance(files, Folder) and any((files.path / "digest" / "c").glob("[0-9]*")):
        cause = f"its file {HEADER} is damaged, and no result is known to be of this sweep"
        remedy = "pass the options with which it was made, or use another name"
        raise problem(DataError, "store", files.name, cause, remedy)
    return False


def _with_role(arrays: Named, role: str) -> Named:
    return {
        name: (dims, np.asarray(values), dict(attributes, role=role))
        for name, (dims, values, attributes) in arrays.items()
    }


def _contents(layout: Layout, extra: Named) -> dict[str, bytes]:
    """All files of a store but the header and the results."""
    contents = {}
    dims = tuple(layout.axes)
    for name, variable in layout.variables.items():
        contents[f"{name}/zarr.json"] = array_metadata(
            (*layout.shape, *variable.shape),
            (*layout.chunk, *variable.shape),
            variable.dtype,
            variable.missing,
            (*dims, *("epoch",) * len(variable.shape)),
            dict(variable.attributes, role="result"),
        )
    said = dict(long_name="digest of a chunk's results; 0: not finished")
    counts = (math.prod(layout.counts),)
    contents["digest/zarr.json"] = array_metadata(
        counts, (1,), np.uint64, NO_DIGEST, ("chunk",), said
    )
    for name, (dims, values, attributes) in extra.items():
        contents |= array_files(name, dims, values, attributes)
    return contents


def _check_same(name: str, stored: dict[str, Any], layout: Layout) -> None:
    """Raises SpecError, with the differences, if a store belongs to another sweep."""
    found = differences(stored, layout.spec)
    orders = [", ".join(spec["grid"]) for spec in (stored, layout.spec)]
    if not found and orders[0] != orders[1]:
        found.append(f"axes in the order {orders[0]} in the store, {orders[1]} now")
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        cause = f"it was made with another specification: {'; '.join(found[:5])}{more}"
        remedy = "use another name, or the specification it was made with"
        raise problem(SpecError, "store", name, cause, remedy)


def differences(stored: Any, now: Any) -> list[str]:
    """The differences between two pieces of JSON data, one line each."""
    # as it is read from a file, where tuples have become lists
    return list(_differences(stored, json.loads(json.dumps(now)), ""))


def _differences(stored: Any, now: Any, path: str) -> Iterator[str]:
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
