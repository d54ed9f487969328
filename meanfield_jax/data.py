"""Data sets as NumPy arrays: Gaussian noise, scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10.

Files are searched for in `data_dir`, `$MEANFIELD_JAX_DATA` and the user's cache, in this order.
Missing files are downloaded, with known checksums, into the first of these that is given. How a
file is read and checked is in data_files.py.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import DownloadColumn, Progress

from meanfield_jax.arguments import checked, integer
from meanfield_jax.data_files import (
    BATCH_FOLDER,
    CIFAR_SHAPE,
    Pair,
    checked_pair,
    read_batches,
    read_idx,
    read_npz,
    short,
)
from meanfield_jax.errors import DataError, problem
from meanfield_jax.limits import within

# The shape, the scale of the pixels, and the mean and standard deviation used to standardize them.
_IMAGES = {
    "digits": ((8, 8, 1), 16, (0.3053, 0.3760)),
    "mnist": ((28, 28, 1), 255, (0.1307, 0.3081)),
    "fashion_mnist": ((28, 28, 1), 255, (0.2860, 0.3530)),
    "cifar10": (CIFAR_SHAPE, 255, None),  # measured
}
_GAUSSIAN_SHAPE, _GAUSSIAN_SAMPLES = (784,), 1000

DATASETS = ("gaussian", *_IMAGES)
"""The names that `load` accepts."""

_FASHION_FOLDERS = ("fashion_mnist", "fashion-mnist")
_BATCH_ARCHIVE = "cifar-10-python.tar.gz"
_NPZ_TRAIN = 4096
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
) -> Pair:
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


def _gaussian(shape: tuple[int, ...], seed: list[int]) -> Pair:
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


def _read_digits(name: str, train: bool, _roots: list[Path]) -> Pair:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        remedy = 'run pip install "meanfield_jax[digits]"'
        raise problem(DataError, "name", name, "needs scikit-learn", remedy) from error
    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    images = pixels.reshape(-1, *shape_of(name))
    return _part(images, labels.astype(np.int32), train, len(labels) - len(labels) // 5)


def _part(images: np.ndarray, labels: np.ndarray, train: bool, num_train: int) -> Pair:
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
        cause = f"not found in {places}, and the download from {url} failed ({short(error)})"
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


def _read_mnist(name: str, train: bool, roots: list[Path]) -> Pair:
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
    pixels = read_idx(images, f"{name}/{stems[0]}", (28, 28))
    numbers = read_idx(labels, f"{name}/{stems[1]}", ())
    return checked_pair(labels, shape_of(name), pixels[..., None], numbers)


def _read_cifar10(name: str, train: bool, roots: list[Path]) -> Pair:
    batches = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
    for folder in _folders(name, roots):
        first = _existing(folder / BATCH_FOLDER / batches[0], folder / batches[0])
        archive = _existing(folder / _BATCH_ARCHIVE)
        if first or archive:
            return read_batches(first.parent if first else folder / _BATCH_ARCHIVE, batches)
        files = sorted(folder.glob("cifar10*.npz"))
        if len(files) > 1:
            cause = f"holds {len(files)} files cifar10*.npz"
            raise problem(DataError, "folder", str(folder), cause, "keep only the one to use")
        if files:
            return _part(*read_npz(files[0]), train, _NPZ_TRAIN)
    return read_batches(_download(name, _BATCH_ARCHIVE, _SHA256[name][0], roots), batches)
