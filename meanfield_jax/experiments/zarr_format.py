"""The bytes of a store: Zarr version 3 without compression, and a header that covers the rest.

Of Zarr's many types and codecs a store uses numbers and plain bytes, so that reading it runs no
codec, unpickles nothing and allocates no more than its files hold. Any reader of Zarr can open it.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

FORMAT = "meanfield_jax.sweep/2"
HEADER = "zarr.json"
DTYPES = ("float32", "float64", "int32", "int64", "uint64")
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, RecursionError)
"""What looking for something in foreign JSON raises where it is not there."""


def array_metadata(
    shape: tuple[int, ...],
    chunk: tuple[int, ...],
    dtype: Any,
    missing: float,
    dims: tuple[str, ...],
    attributes: dict[str, Any],
) -> bytes:
    """The ``zarr.json`` of an array."""
    separator = dict(name="default", configuration=dict(separator="/"))
    regular = dict(name="regular", configuration=dict(chunk_shape=chunk))
    document = dict(
        zarr_format=3,
        node_type="array",
        shape=shape,
        data_type=np.dtype(dtype).name,
        chunk_grid=regular,
        chunk_key_encoding=separator,
        fill_value="NaN" if np.isnan(missing) else missing,
        codecs=[dict(name="bytes", configuration=dict(endian="little"))],
        attributes=attributes,
        dimension_names=dims,
    )
    return _encoded(document)


def array_files(
    name: str, dims: tuple[str, ...], values: Any, attributes: dict[str, Any]
) -> dict[str, bytes]:
    """The files of an array in one chunk."""
    values = np.asarray(values)
    missing = np.nan if values.dtype.kind == "f" else 0
    chunk = tuple(max(size, 1) for size in values.shape)
    metadata = array_metadata(values.shape, chunk, values.dtype, missing, dims, attributes)
    only = "/".join((name, "c", *("0" for _ in dims)))
    return {f"{name}/zarr.json": metadata, only: to_bytes(values)}


def parsed_array(content: bytes) -> tuple[tuple[int, ...], np.dtype, tuple[str, ...], dict]:
    """Shape, type, dimensions and attributes of an array; raises what is in MALFORMED."""
    document = json.loads(content)
    shape, dims = tuple(document["shape"]), tuple(document["dimension_names"])
    attributes, name = dict(document["attributes"]), document["data_type"]
    whole = all(type(size) is int and size >= 0 for size in shape)
    if name not in DTYPES or not whole or [type(dim) for dim in dims] != [str] * len(shape):
        raise ValueError("not an array of a sweep")
    return shape, np.dtype(name), dims, attributes


def to_bytes(values: np.ndarray) -> bytes:
    """An array as it is stored."""
    return np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()


def from_bytes(content: bytes, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of :func:`to_bytes`; raises ValueError if the number of bytes does not fit."""
    return np.frombuffer(content, dtype.newbyteorder("<")).reshape(shape).astype(dtype)


def header(
    spec: dict[str, Any], facts: dict[str, Any], chunk: tuple[int, ...], files: dict[str, bytes]
) -> bytes:
    """The group's ``zarr.json``: what the store is, and digests of all files but the results."""
    attributes = dict(
        format=FORMAT,
        spec=spec,
        facts=facts,
        chunk=chunk,
        files={name: digest_of(content) for name, content in sorted(files.items())},
    )
    attributes["digest"] = digest_of(_encoded(attributes))
    return _encoded(dict(zarr_format=3, node_type="group", attributes=attributes))


def parsed_header(content: bytes) -> dict[str, Any] | None:
    """The group's attributes; None if they are incomplete or altered, or not of a sweep."""
    try:
        document = json.loads(content)
        attributes = dict(document["attributes"])
        kind = (document["zarr_format"], document["node_type"], attributes["format"])
        rest = {key: value for key, value in attributes.items() if key != "digest"}
        if kind != (3, "group", FORMAT) or attributes["digest"] != digest_of(_encoded(rest)):
            return None
        if not all(isinstance(attributes[key], dict) for key in ("spec", "facts", "files")):
            return None
        if not isinstance(attributes["chunk"], list):
            return None
    except MALFORMED:
        return None
    return attributes


def unproven_header(content: bytes | None) -> dict[str, Any] | None:
    """The group's attributes as a damaged header has them; None if they cannot be read."""
    try:
        attributes = dict(json.loads(content or b"")["attributes"])
        whole = isinstance(attributes["spec"]["grid"], dict) and isinstance(
            attributes["chunk"], list
        )
        digests = {str(name): str(digest) for name, digest in attributes["files"].items()}
        return dict(attributes, files=digests, facts={}) if whole else None
    except MALFORMED:
        return None


def claimed_format(content: bytes | None) -> str | None:
    """The format that a header names which is damaged, or of an older version.

    Returns:
        "" if it is not of a sweep; None if there is no header, or the beginning of one.
    """
    try:
        attributes = json.loads(content or b"").get("attributes", {})
        claimed = str(attributes.get("format", ""))
        return None if claimed and "spec" not in attributes else claimed
    except MALFORMED:
        return None


def digest_of(content: bytes) -> str:
    """A digest as text."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def identity(spec: dict[str, Any], chunk: tuple[int, ...]) -> bytes:
    """A key that makes the digests of one sweep's results differ from those of any other."""
    return hashlib.blake2b(_encoded([spec, chunk]), digest_size=32).digest()


def _encoded(document: Any) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()
