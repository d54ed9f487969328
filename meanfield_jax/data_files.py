"""Files of images: idx, NumPy archives and pickled batches, read or refused in one line.

Every file is checked before it is used: its size, its structure, the checksums in it, and, because
MNIST and Fashion-MNIST use the same file names, whether its contents are those of another file.
"""

import contextlib
import gzip
import hashlib
import io
import math
import pickle
import pickletools
import tarfile
import textwrap
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from meanfield_jax.errors import DataError, problem

Pair = tuple[np.ndarray, np.ndarray]
"""Images and their labels."""

CIFAR_SHAPE = (32, 32, 3)

BATCH_FOLDER = "cifar-10-batches-py"
"""The folder of the pickled batches of CIFAR-10, in the archive and after unpacking."""

MOST_BYTES = 2**29
"""The most bytes that a file may hold when unpacked: three times the largest that is known."""
MOST_REFERENCES = 32
"""The most references of a pickled batch to its own values; published ones have none."""

# The first digits of the SHA-256 of the *unpacked* contents: copies are often repacked, so the
# digest of a .gz file does not tell what it contains.
CONTENTS = {
    "ba891046e6505d7a": "mnist/train-images-idx3-ubyte",
    "65a50cbbf4e906d7": "mnist/train-labels-idx1-ubyte",
    "0fa7898d509279e4": "mnist/t10k-images-idx3-ubyte",
    "ff7bcfd416de3373": "mnist/t10k-labels-idx1-ubyte",
    "c59f468a2f672dc8": "fashion_mnist/train-images-idx3-ubyte",
    "bad3541b69d91243": "fashion_mnist/train-labels-idx1-ubyte",
    "5b4141f0afbad91e": "fashion_mnist/t10k-images-idx3-ubyte",
    "0402a96d92fd2663": "fashion_mnist/t10k-labels-idx1-ubyte",
}


def _bad_file(path: Path, cause: str) -> ValueError:
    remedy = "replace it with an intact copy, or remove it to have it downloaded"
    return problem(DataError, "file", str(path), cause, remedy)


def short(error: Exception) -> str:
    """An error of another library as a short text of one line."""
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")


@contextmanager
def _reading(path: Path) -> Generator[None]:
    """Turns any error that a damaged file causes into a single line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # gzip, zlib, zipfile, tarfile, pickle have no common base class
        raise _bad_file(path, f"cannot be read ({short(error)})") from error


def checked_pair(
    path: Path, shape: tuple[int, ...], images: np.ndarray, labels: np.ndarray
) -> Pair:
    """The pair, if the images are bytes of this shape, each with a label 0..9."""
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise _bad_file(path, f"holds {images.dtype} {images.shape}, not uint8 images {shape}")
    if labels.shape != images.shape[:1]:
        raise _bad_file(path, f"holds labels of shape {labels.shape} for {len(images)} images")
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(10)).all():
        raise _bad_file(path, "holds labels other than the integers 0..9")
    return images, labels.astype(np.int32)


def read_idx(path: Path, wanted: str, item: tuple[int, ...]) -> np.ndarray:
    """Reads a file of big-endian numbers (2049 + dimensions of an item, sizes), then bytes."""
    start, expected = 4 * (2 + len(item)), 2049 + len(item)
    with _reading(path), _unzipped(path) as stream:
        head = stream.read(start)
        magic, *sizes = (int.from_bytes(head[i : i + 4], "big") for i in range(0, start, 4))
        if magic != expected:
            kind = {2049: ", that of labels", 2051: ", that of images"}.get(magic, "")
            raise _bad_file(path, f"has the magic number {magic}{kind}, not {expected}")
        if tuple(sizes[1:]) != item:
            raise _bad_file(path, f"declares items of shape {tuple(sizes[1:])}, not {item}")
        size = start + math.prod(sizes)
        if size > MOST_BYTES:
            raise _bad_file(path, f"declares {sizes[0]} items in {size} bytes, too many")
        # one byte more than declared, which is enough to find that there are more
        raw = head + stream.read(size - start + 1)
    if len(raw) != size:
        has = f"{len(raw)}{' or more' * (len(raw) > size)}"
        raise _bad_file(path, f"declares {sizes[0]} items in {size} bytes but has {has}")
    contents = CONTENTS.get(hashlib.sha256(raw).hexdigest()[:16], wanted)
    if contents != wanted:
        raise _bad_file(path, f"holds {contents}, not {wanted}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


@contextmanager
def _unzipped(path: Path) -> Generator[Any]:
    """The file as a stream of bytes, unpacked if it is packed."""
    with open(path, "rb") as stream:
        # not by name: browsers unpack files but keep the .gz
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            yield stream
            return
        with gzip.open(stream) as unpacked:
            yield unpacked


def read_npz(path: Path) -> Pair:
    """Reads a NumPy archive with arrays ``images`` and ``labels``."""
    with _reading(path), open(path, "rb") as stream:  # np.load leaves a damaged file open
        archive: Any = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise _bad_file(path, "is not a zip archive of arrays")
        for name in ("images", "labels"):
            # from the header, before the array is allocated, and from the archive's table
            size = _declared_bytes(archive.zip, f"{name}.npy")
            if size > MOST_BYTES:
                raise _bad_file(path, f"declares {size} bytes of {name}, too many")
        pair = archive["images"], archive["labels"]
    return checked_pair(path, CIFAR_SHAPE, *pair)


def _declared_bytes(archive: Any, name: str) -> int:
    """The size of an array of a zip archive, by its own header and by the archive's table."""
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return max(math.prod(shape) * max(1, dtype.itemsize), archive.getinfo(name).file_size)


def read_batches(source: Path, names: list[str]) -> Pair:
    """Reads pickled batches from their folder or from the published archive."""
    with _reading(source):
        if source.is_dir():
            raw = [(source / name).read_bytes() for name in names]
        else:
            raw = _unpacked(source, [f"{BATCH_FOLDER}/{name}" for name in names])
    pairs = [_parse_batch(source / name, batch) for name, batch in zip(names, raw, strict=True)]
    images, labels = zip(*pairs, strict=True)
    return np.concatenate(images), np.concatenate(labels)


def _unpacked(path: Path, names: list[str]) -> list[bytes]:
    found = {}
    with contextlib.ExitStack() as stack:
        bounded: Any = _Bounded(stack.enter_context(gzip.open(path)))
        archive = stack.enter_context(tarfile.open(fileobj=bounded, mode="r|"))
        # In the archive's order: looking up members by name would unpack it once for each.
        for member in archive:
            if member.name not in names:
                continue
            if not member.isreg() or member.issparse() or member.size > MOST_BYTES:
                raise _bad_file(path, f"holds {member.name} as something other than a file")
            content = archive.extractfile(member)
            found[member.name] = content.read() if content else b""
        while bounded.read(1 << 20):  # to the end, where gzip verifies its checksum
            pass
    missing = [name for name in names if not found.get(name)]
    if missing:
        raise _bad_file(path, f"lacks {', '.join(missing)}")
    return [found[name] for name in names]


class _Bounded:
    """A stream that may be read to a limit of bytes."""

    def __init__(self, stream: Any):
        self._stream, self._left = stream, MOST_BYTES

    def read(self, size: int) -> bytes:
        """The next bytes; raises ValueError beyond the limit."""
        found = self._stream.read(min(size, self._left + 1))
        self._left -= len(found)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {MOST_BYTES} bytes")
        return found


def _parse_batch(path: Path, raw: bytes) -> Pair:
    with _reading(path):
        if raw:
            _check_pickle(raw)
        batch = _BatchUnpickler(io.BytesIO(raw), encoding="bytes").load()
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = batch[b"labels"]
        if not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
            raise _bad_file(path, "holds labels other than the integers 0..9")
    return checked_pair(path, CIFAR_SHAPE, images, np.array(labels))


def _check_pickle(raw: bytes) -> None:
    """Refuses what would take a reader of pickles more memory or time than the file is long.

    These are places in its memory far beyond the number of values, which the reader would allocate,
    and tuples of tuples named many times over, whose hash takes forever.
    """
    references = 0
    for code, argument, _ in pickletools.genops(raw):
        if "PUT" in code.name and argument is not None and argument > len(raw):
            raise pickle.UnpicklingError(f"place {argument} is beyond the end of the file")
        references += code.name in ("GET", "BINGET", "LONG_BINGET", "DUP")
    if references > MOST_REFERENCES:
        raise pickle.UnpicklingError(f"a CIFAR-10 batch does not need {references} references")


class _BatchUnpickler(pickle.Unpickler):
    """Rebuilds only arrays of bytes and plain containers; refuses every other name in a pickle."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _PICKLE_NAMES:
            raise pickle.UnpicklingError(f"a CIFAR-10 batch does not need {module}.{name}")
        return _PICKLE_NAMES[module, name]


def _uint8(code: bytes, *_flags: object) -> np.dtype:
    # Replaces numpy.dtype, which in NumPy 2.4.0 to 2.4.4 warns about the flags in these files.
    if code != b"u1":
        raise pickle.UnpicklingError(f"a CIFAR-10 batch does not need arrays of type {code!r}")
    return np.dtype(np.uint8)


def _empty_array(*_given: object) -> np.ndarray:
    # What follows in the pickle sets shape and contents; the shape given here may be anything.
    return np.empty(0, np.uint8)


_PICKLE_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): "numpy.ndarray",  # only ever an argument of the function above
    ("numpy", "dtype"): _uint8,
}
