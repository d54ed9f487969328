"""Data sets as NumPy arrays: Gaussian noise, scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10.

Files are searched for in `data_dir`, `$MEANFIELD_JAX_DATA` and the user's cache, in this order.
Missing files are downloaded, with known checksums, into the first of these that is given. Every
file is checked before use: its structure, the checksums in it, and, because MNIST and Fashion-MNIST
use the same file names, whether its contents are those of another known file.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import math
import os
import pickle
import pickletools
import tarfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from meanfield_jax.arguments import checked, integer
from meanfield_jax.errors import DataError, problem
from meanfield_jax.limits import within

if TYPE_CHECKING:
    pass

_Pair = tuple[np.ndarray, np.ndarray]

# The shape, the scale of the pixels, and the mean and standard deviation used to standardize them.
_IMAGES = {
    "digits": ((8, 8, 1), 16, (0.3053, 0.3760)),
    "mnist": ((28, 28, 1), 255, (0.1307, 0.3081)),
    "fashion_mnist": ((28, 28, 1), 255, (0.2860, 0.3530)),
    "cifar10": ((32, 32, 3), 255, None),  # measured
}
_GAUSSIAN_SHAPE, _GAUSSIAN_SAMPLES = (784,), 1000

DATASETS = ("gaussian", *_IMAGES)
"""The names that `load` accepts."""

_FASHION_FOLDERS = ("fashion_mnist", "fashion-mnist")
_BATCH_FOLDER, _BATCH_ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"
_NPZ_TRAIN = 4096
_MOST_BYTES = 2**29
"""The most bytes that a file may hold when unpacked: three times the largest that is known."""
_MOST_REFERENCES = 32
"""The most references of a pickled batch to its own values; published ones have none."""
_MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}
# Bytes of the largest of the files as the mirrors serve them.
_LARGEST = {"mnist": 9_912_422, "fashion_mnist": 26_421_880, "cifar10": 170_498_071}
# SHA-256 of the files as the mirrors serve them: images and labels for training, then for testing.
_SHA256 = {
    "mnist": (
        "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    ),
    "fashion_mnist": (
        "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
    ),
    "cifar10": ("6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",),
}
# The first digits of the SHA-256 of the *unpacked* contents: copies are often repacked, so the
# digest of a .gz file does not tell what it contains.
_CONTENTS = {
    "ba891046e6505d7a": "mnist/train-images-idx3-ubyte",
    "65a50cbbf4e906d7": "mnist/train-labels-idx1-ubyte",
    "0fa7898d509279e4": "mnist/t10k-images-idx3-ubyte",
    "ff7bcfd416de3373": "mnist/t10k-labels-idx1-ubyte",
    "c59f468a2f672dc8": "fashion_mnist/train-images-idx3-ubyte",
    "bad3541b69d91243": "fashion_mnist/train-labels-idx1-ubyte",
    "5b4141f0afbad91e": "fashion_mnist/t10k-images-idx3-ubyte",
    "0402a96d92fd2663": "fashion_mnist/t10k-labels-idx1-ubyte",
}


@checked(error=DataError)
def shape_of(name: str) -> tuple[int, ...]:
    """The shape of one sample before flattening, for choosing a network's inputs.

    Args:
        name: One of `DATASETS`.

    Returns:
        (features,) for Gaussian noise, (height, width, channels) for images.

    Raises:
        DataError: if the name is unknown.

    Example:
        >>> shape_of("cifar10")
        (32, 32, 3)
    """
    if not isinstance(name, str) or name not in DATASETS:
        remedy = f"use one of {', '.join(DATASETS)}"
        raise problem(DataError, "name", name, "unknown data set", remedy)
    return _GAUSSIAN_SHAPE if name == "gaussian" else _IMAGES[name][0]


@checked(error=DataError, num_samples=integer)
def load(
    name: str,
    *,
    split: str = "train",
    num_samples: int | None = None,
    flatten: bool = False,
    standardize: bool = True,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
) -> _Pair:
    """Loads the first samples of a data set.

    Images become x = (pixel / scale - mean) / std, with scale 16 for digits and 255 otherwise. Mean
    and std are those of all pixels: (.3053, .3760) for digits, (.1307, .3081) for MNIST and
    (.2860, .3530) for Fashion-MNIST. For CIFAR-10 they are measured per channel over the returned
    samples, so they differ slightly between training and test images; to use the same values for
    both, pass `standardize=False` and standardize the images yourself.

    `split="test"` is the published test set, with two exceptions: for digits it is the last 20 %,
    and a file `cifar10*.npz` (arrays `images`, `labels`) is split into its first 4,096 samples and
    the rest. Such a file is usually a subset, and results measured on it should say so.

    Args:
        name: One of `DATASETS`. "gaussian" draws i.i.d. N(0, 1) inputs and uniform labels.
        split: "train" or "test".
        num_samples: Number of samples, from the start; by default all (Gaussian noise: 1000).
        flatten: Whether to return x as (n, features).
        standardize: False leaves pixels in [0, 1]; Gaussian noise always has mean 0 and variance 1.
        data_dir: Folder with the files, which may also be in a sub-folder `<name>`. Fashion-MNIST
            needs a folder named `fashion_mnist` or `fashion-mnist`, because MNIST uses the same
            file names.
        seed: Seed of the Gaussian draw; train and test differ, and a longer draw extends a shorter
            one.
        shape: Shape of one Gaussian sample, by default (784,).

    Returns:
        x, float32 of shape (n, *shape), and y, int32 labels 0..9 of shape (n,).

    Raises:
        DataError: if an argument cannot be used, or a file is missing, damaged or not what its name
            says. The message is a single line with the file and the remedy.

    Example:
        >>> x, y = load("gaussian", num_samples=4, shape=(8, 8, 1), flatten=True)
        >>> x.shape, y.shape
        ((4, 64), (4,))
    """
    _check_arguments(name, split, num_samples, seed, shape)
    if name == "gaussian":
        count = num_samples or _GAUSSIAN_SAMPLES
        size = count * math.prod(shape or _GAUSSIAN_SHAPE)
        within("MEMORY", "num_samples", count, 8 * size, error=DataError)
        x, labels = _gaussian((count, *(shape or _GAUSSIAN_SHAPE)), [seed, split == "test"])
    else:
        read = {"digits": _read_digits, "cifar10": _read_cifar10}.get(name, _read_mnist)
        pixels, labels = read(name, split == "train", _roots(data_dir))
        count = len(labels) if num_samples is None else num_samples
        if not 0 < count <= len(labels):
            cause = f"the {split} split of {name} holds {len(labels)} samples here"
            raise problem(DataError, "num_samples", num_samples, cause, "pass no more than that")
        x, labels = _scaled(name, pixels[:count], standardize), labels[:count]
    return (x.reshape(len(x), -1) if flatten else x), labels


def _check_arguments(
    name: str, split: str, num_samples: int | None, seed: int, shape: tuple[int, ...] | None
) -> None:
    shape_of(name)
    if not isinstance(split, str) or split not in ("train", "test"):
        raise problem(DataError, "split", split, "unknown split", "use 'train' or 'test'")
    if num_samples is not None and num_samples < 1:
        raise problem(DataError, "num_samples", num_samples, "must be at least 1", "use 1 or more")
    if seed < 0:
        raise problem(DataError, "seed", seed, "must not be negative", "use 0, 1, 2, ...")
    if shape is not None and (name != "gaussian" or min(shape, default=0) < 1):
        cause = "only 'gaussian' takes a shape, and its sizes must be positive"
        raise problem(DataError, "shape", shape, cause, "leave it out or correct it")


def _gaussian(shape: tuple[int, ...], seed: list[int]) -> _Pair:
    # Two random streams, so that a longer draw of inputs does not shift the labels.
    inputs, labels = np.random.default_rng(seed).spawn(2)
    x = inputs.standard_normal(shape, dtype=np.float32)
    return x, labels.integers(10, size=shape[0], dtype=np.int32)


def _scaled(name: str, pixels: np.ndarray, standardize: bool) -> np.ndarray:
    _, scale, moments = _IMAGES[name]
    x = pixels.astype(np.float32)
    x /= scale
    if standardize:
        # Channel by channel: all of CIFAR-10 in float64 would take 1.2 GB.
        measured = ((c.mean(dtype=float), c.std(dtype=float)) for c in np.moveaxis(x, -1, 0))
        mean, std = moments or np.transpose(list(measured))
        if np.min(std) == 0:
            cause = "a channel is constant over the selected images"
            raise problem(DataError, "standardize", True, cause, "pass False or load more images")
        x -= mean
        x /= std
    return x


def _read_digits(name: str, train: bool, _roots: list[Path]) -> _Pair:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        remedy = 'run pip install "meanfield_jax[digits]"'
        raise problem(DataError, "name", name, "needs scikit-learn", remedy) from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, *shape_of(name))
    return _part(images, labels.astype(np.int32), train, len(labels) - len(labels) // 5)


def _part(images: np.ndarray, labels: np.ndarray, train: bool, num_train: int) -> _Pair:
    part = slice(num_train) if train else slice(num_train, None)
    return images[part], labels[part]


def _roots(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    import pooch

    places = (data_dir, os.environ.get("MEANFIELD_JAX_DATA"), pooch.os_cache("meanfield_jax"))
    return [Path(place).expanduser().resolve() for place in places if place]


def _folders(name: str, roots: list[Path]) -> Iterator[Path]:
    """The folders that may contain a data set, in order of preference."""
    fashion = name == "fashion_mnist"
    for root in roots:
        yield from (root / folder for folder in (_FASHION_FOLDERS if fashion else (name,)))
        if (root.name in _FASHION_FOLDERS) == fashion:
            yield root


def _existing(*paths: Path) -> Path | None:
    # os.path.isfile returns False for a forbidden folder, where Path.is_file can raise
    return next((path for path in paths if os.path.isfile(path)), None)


def _bad_file(path: Path, cause: str) -> ValueError:
    remedy = "replace it with an intact copy, or remove it to have it downloaded"
    return problem(DataError, "file", str(path), cause, remedy)


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns any error that a damaged file causes into a single line that names the file."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # gzip, zlib, zipfile, tarfile, pickle have no common base class
        raise _bad_file(path, f"cannot be read ({_short(error)})") from error


def _checked(path: Path, name: str, images: np.ndarray, labels: np.ndarray) -> _Pair:
    """The pair, if the images are bytes of the right shape, each with a label 0..9."""
    shape = shape_of(name)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
        raise _bad_file(path, f"holds {images.dtype} {images.shape}, not uint8 images {shape}")
    if labels.shape != images.shape[:1]:
        raise _bad_file(path, f"holds labels of shape {labels.shape} for {len(images)} images")
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(10)).all():
        raise _bad_file(path, "holds labels other than the integers 0..9")
    return images, labels.astype(np.int32)


def _download(name: str, filename: str, sha256: str, roots: list[Path]) -> Path:
    """Downloads one file into the first root; pooch removes the remains of a failed download."""
    import pooch

    pooch.get_logger().setLevel("WARNING")  # the bar says it

    path, url = roots[0] / name / filename, _MIRRORS[name] + filename
    if os.path.isfile(path):  # pooch would replace a copy that was repacked
        return path
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), DownloadColumn())
    missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            # Any: pooch's type hints do not allow its usage
            bar: Any = _Bar(progress, filename, _LARGEST[name])
            fetch: Any = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16)
            pooch.retrieve(url, sha256, filename, path.parent, downloader=fetch)
    except (OSError, ValueError) as error:  # connection, HTTP status, disk; checksum
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        places = ", ".join(map(str, _folders(name, roots)))
        cause = f"not found in {places}, and the download from {url} failed ({_short(error)})"
        where = "point data_dir (--data-dir) or $MEANFIELD_JAX_DATA to a folder that contains it"
        remedy = f"{where}, or use --data digits or --data gaussian"
        raise problem(DataError, "file", filename, cause, remedy) from error
    return path


class _Bar:
    """A progress bar drawn by rich, with the interface that pooch expects; it ends what has no end.

    Attributes:
        total: The size that the server announced.
    """

    def __init__(self, progress: Progress, label: str, most: int):
        self.total, self._size, self._most = 0, 0, most
        self._progress, self._task = progress, progress.add_task(label, visible=False)

    def update(self, size: int) -> None:
        self._size += size
        if max(self._size, self.total) > self._most:
            raise ValueError(f"the server sends more than {self._most} bytes, the largest file")
        # Visible only now, because pooch prints a line before it starts.
        self._progress.update(self._task, advance=size, total=self.total or None, visible=True)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        """Does nothing: the end of `with Progress` closes the bar, also after an error."""


def _read_mnist(name: str, train: bool, roots: list[Path]) -> _Pair:
    prefix = "train" if train else "t10k"
    stems = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
    # Both from one folder: images of one copy would match the labels of another only by chance.
    for folder in _folders(name, roots):
        paths = [_existing(folder / stem, folder / f"{stem}.gz") for stem in stems]
        if all(paths):
            break
    else:
        digests = _SHA256[name][:2] if train else _SHA256[name][2:]
        known = zip(stems, digests, strict=True)
        paths = [_download(name, f"{stem}.gz", digest, roots) for stem, digest in known]
    images, labels = filter(None, paths)
    pixels = _read_idx(images, f"{name}/{stems[0]}", (28, 28))
    return _checked(labels, name, pixels[..., None], _read_idx(labels, f"{name}/{stems[1]}", ()))


def _read_idx(path: Path, wanted: str, item: tuple[int, ...]) -> np.ndarray:
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
        if size > _MOST_BYTES:
            raise _bad_file(path, f"declares {sizes[0]} items in {size} bytes, too many")
        # one byte more than declared, which is enough to find that there are more
        raw = head + stream.read(size - start + 1)
    if len(raw) != size:
        has = f"{len(raw)}{' or more' * (len(raw) > size)}"
        raise _bad_file(path, f"declares {sizes[0]} items in {size} bytes but has {has}")
    contents = _CONTENTS.get(hashlib.sha256(raw).hexdigest()[:16], wanted)
    if contents != wanted:
        raise _bad_file(path, f"holds {contents}, not {wanted}")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


@contextmanager
def _unzipped(path: Path) -> Iterator[Any]:
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


def _read_cifar10(name: str, train: bool, roots: list[Path]) -> _Pair:
    batches = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    for folder in _folders(name, roots):
        first = _existing(folder / _BATCH_FOLDER / batches[0], folder / batches[0])
        archive = _existing(folder / _BATCH_ARCHIVE)
        if first or archive:
            return _read_batches(first.parent if first else folder / _BATCH_ARCHIVE, batches)
        files = sorted(folder.glob("cifar10*.npz"))
        if len(files) > 1:
            cause = f"holds {len(files)} files cifar10*.npz"
            raise problem(DataError, "folder", str(folder), cause, "keep only the one to use")
        if files:
            return _part(*_read_npz(files[0]), train, _NPZ_TRAIN)
    return _read_batches(_download(name, _BATCH_ARCHIVE, _SHA256[name][0], roots), batches)


def _read_npz(path: Path) -> _Pair:
    with _reading(path), open(path, "rb") as stream:  # np.load leaves a damaged file open
        archive: Any = np.load(stream, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise _bad_file(path, "is not a zip archive of arrays")
        for name in ("images", "labels"):
            # from the header, before the array is allocated, and from the archive's table
            size = _declared_bytes(archive.zip, f"{name}.npy")
            if size > _MOST_BYTES:
                raise _bad_file(path, f"declares {size} bytes of {name}, too many")
        pair = archive["images"], archive["labels"]
    return _checked(path, "cifar10", *pair)


def _declared_bytes(archive: Any, name: str) -> int:
    """The size of an array of a zip archive, by its own header and by the archive's table."""
    with archive.open(name) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    return max(math.prod(shape) * max(1, dtype.itemsize), archive.getinfo(name).file_size)


def _read_batches(source: Path, names: list[str]) -> _Pair:
    """Reads pickled batches from their folder or from the published archive."""
    with _reading(source):
        if source.is_dir():
            raw = [(source / name).read_bytes() for name in names]
        else:
            raw = _unpacked(source, [f"{_BATCH_FOLDER}/{name}" for name in names])
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
            if not member.isreg() or member.issparse() or member.size > _MOST_BYTES:
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
        self._stream, self._left = stream, _MOST_BYTES

    def read(self, size: int) -> bytes:
        """The next bytes; raises ValueError beyond the limit."""
        found = self._stream.read(min(size, self._left + 1))
        self._left -= len(found)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES} bytes")
        return found


def _parse_batch(path: Path, raw: bytes) -> _Pair:
    with _reading(path):
        if raw:
            _check_pickle(raw)
        batch = _BatchUnpickler(io.BytesIO(raw), encoding="bytes").load()
        images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = batch[b"labels"]
        if not (isinstance(labels, list) and all(isinstance(label, int) for label in labels)):
            raise _bad_file(path, "holds labels other than the integers 0..9")
    return _checked(path, "cifar10", images, np.array(labels))


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
    if references > _MOST_REFERENCES:
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
