"""Data sets: generated files cover every reader, real files are checked where they are present."""

import gc
import gzip
import hashlib
import io
import os
import pickle
import struct
import sys
import tarfile
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pooch
import pytest

from meanfield_jax import data, data_files
from meanfield_jax.errors import DataError

PREFIX = {"train": "train", "test": "t10k"}
TRAIN_BATCHES = [f"data_batch_{i}" for i in range(1, 6)]


def real_data_dir() -> Path | None:
    """The folder of real images: $MEANFIELD_JAX_DATA, or shared/data beside the repository."""
    given = os.environ.get("MEANFIELD_JAX_DATA")
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(given) if given else beside if beside.is_dir() else None


REAL_DIR = real_data_dir()
# Real files by the data set they belong to; digits come with scikit-learn and are always there.
REAL_PATTERNS = {
    "mnist": "mnist/train-images*",
    "fashion_mnist": "fashion[-_]mnist/train-images*",
    "cifar10": "cifar10*.npz",
}
REAL = [name for name, glob in REAL_PATTERNS.items() if REAL_DIR and list(REAL_DIR.glob(glob))]


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No test sees the user's files or cache, or reaches a public mirror."""
    monkeypatch.delenv("MEANFIELD_JAX_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    for name in data._MIRRORS:
        monkeypatch.setitem(data._MIRRORS, name, "http://127.0.0.1:9/")


def refusal(*args, **kwargs) -> str:
    """The one line with which `load` refuses."""
    with pytest.raises(DataError) as info:
        data.load(*args, **kwargs)
    message = str(info.value)
    assert "\n" not in message
    assert message.count("; ") >= 1  # cause; remedy
    return message


def random_pair(count, shape, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(256, size=(count, *shape), dtype=np.uint8)
    return images, rng.integers(10, size=count, dtype=np.uint8)


def idx_bytes(array):
    header = [2048 + array.ndim, *array.shape]
    return struct.pack(f">{len(header)}I", *header) + array.tobytes()


def write_idx(folder, split="train", count=6, seed=0, pack=gzip.compress):
    """Writes a pair of IDX files and returns the images and labels in them."""
    images, labels = random_pair(count, (28, 28), seed)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".gz" if pack is gzip.compress else ""
    for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
        path = folder / f"{PREFIX[split]}-{kind}-ubyte{suffix}"
        path.write_bytes(pack(idx_bytes(array)))
    return images, labels


def batch_bytes(images, labels):
    """A CIFAR-10 batch as Python 2 pickled it: the opcodes and flags of the published files."""
    rows = images.transpose(0, 3, 1, 2).tobytes()
    return (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x04fakeq\x03U\x06labelsq\x04]q\x05("
        + b"".join(b"K" + bytes([label]) for label in labels)
        + b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08"
        + b"K\x00\x85U\x01b\x87Rq\x09(K\x01M"
        + struct.pack("<H", len(images))
        + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(rows))
        + rows
        + b"tbu."
    )


def cifar_files(count=4):
    """All batches as {file name: bytes}, and the training and test pairs in them."""
    names = [*TRAIN_BATCHES, "test_batch"]
    pairs = [random_pair(count, (32, 32, 3), seed) for seed in range(6)]
    files = {name: batch_bytes(*pair) for name, pair in zip(names, pairs, strict=True)}
    train = tuple(np.concatenate(part) for part in zip(*pairs[:5], strict=True))
    return files, {"train": train, "test": pairs[5]}


def tar_bytes(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_npz(path, count=8, **changes):
    images, labels = random_pair(count, (32, 32, 3))
    np.savez(path, **({"images": images, "labels": labels} | changes))
    return images, labels


# Arguments


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gaussian", (784,)),
        ("digits", (8, 8, 1)),
        ("mnist", (28, 28, 1)),
        ("fashion_mnist", (28, 28, 1)),
        ("cifar10", (32, 32, 3)),
    ],
)
def test_shape_of(name, shape):
    assert name in data.DATASETS
    assert data.shape_of(name) == shape


def test_unknown_name_lists_the_names():
    for ask in (data.shape_of, data.load):
        with pytest.raises(DataError, match=r"name='imagenet'.*gaussian, digits, mnist"):
            ask("imagenet")


@pytest.mark.parametrize(
    ("argument", "value"),
    [("split", "validation"), ("num_samples", 0), ("num_samples", -3), ("seed", -1)],
)
@pytest.mark.parametrize("name", ["gaussian", "digits"])
def test_arguments_are_checked(name, argument, value):
    assert refusal(name, **{argument: value}).startswith(f"{argument}={value!r}")


@pytest.mark.parametrize(
    ("name", "shape"), [("digits", (64,)), ("gaussian", (3, 0)), ("gaussian", ())]
)
def test_shape_is_for_gaussian_noise_and_positive(name, shape):
    assert refusal(name, shape=shape).startswith(f"shape={shape!r}")


# Gaussian noise


def test_gaussian_moments():
    x, y = data.load("gaussian", num_samples=2000, shape=(50,))
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    standard_error = 1 / np.sqrt(x.size)
    assert abs(x.mean()) < 4 * standard_error
    assert abs(x.var() - 1) < 4 * np.sqrt(2) * standard_error
    counts = np.bincount(y, minlength=10)
    assert counts.size == 10
    assert np.all(np.abs(counts - 200) < 5 * np.sqrt(200 * 0.9))


def test_gaussian_shapes():
    assert data.load("gaussian")[0].shape == (1000, 784)
    assert data.load("gaussian", num_samples=3, shape=(4, 4, 2))[0].shape == (3, 4, 4, 2)
    assert data.load("gaussian", num_samples=3, shape=(4, 4, 2), flatten=True)[0].shape == (3, 32)


def test_gaussian_depends_on_seed_and_split_only():
    x, y = data.load("gaussian", num_samples=20, seed=3)
    longer, longer_y = data.load("gaussian", num_samples=50, seed=3)
    np.testing.assert_array_equal(x, longer[:20])
    np.testing.assert_array_equal(y, longer_y[:20])
    for other in ({"seed": 4}, {"seed": 3, "split": "test"}):
        assert not np.any(x == data.load("gaussian", num_samples=20, **other)[0])


# Digits


def test_digits_splits_are_the_whole_set():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    parts = [data.load("digits", split=split, standardize=False) for split in ("train", "test")]
    assert [len(y) for _, y in parts] == [1438, 359]
    x = np.concatenate([x for x, _ in parts])
    assert x.shape == (1797, 8, 8, 1)
    np.testing.assert_array_equal(x.reshape(1797, 64), images / 16)
    np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), labels)


def test_digits_are_standardized_over_all_pixels():
    x = np.concatenate([data.load("digits", split=split)[0] for split in ("train", "test")])
    # the constants have four decimals
    assert abs(x.mean()) < 0.5e-4 / 0.376 + 1e-5
    assert abs(x.std() - 1) < 0.5e-4 / 0.376 + 1e-5


def test_too_many_samples_names_the_number():
    assert "holds 359 samples" in refusal("digits", split="test", num_samples=360)


def test_digits_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert 'pip install "meanfield_jax[digits]"' in refusal("digits")


# MNIST and Fashion-MNIST


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzip", "plain"])
@pytest.mark.parametrize(
    ("name", "folder", "moments"),
    [
        ("mnist", ".", (0.1307, 0.3081)),
        ("mnist", "mnist", (0.1307, 0.3081)),
        ("fashion_mnist", "fashion_mnist", (0.2860, 0.3530)),
        ("fashion_mnist", "fashion-mnist", (0.2860, 0.3530)),
    ],
)
def test_idx_pixels(tmp_path, name, folder, moments, pack, split):
    images, labels = write_idx(tmp_path / folder, split, pack=pack)
    x, y = data.load(name, split=split, data_dir=tmp_path)
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    expected = (images[..., None] / 255 - moments[0]) / moments[1]
    np.testing.assert_allclose(x, expected, rtol=0, atol=8 * np.finfo(np.float32).eps)
    np.testing.assert_array_equal(y, labels)
    raw, few = data.load(
        name, split=split, data_dir=str(tmp_path), num_samples=2, flatten=True, standardize=False
    )
    np.testing.assert_allclose(raw, images[:2].reshape(2, 784) / 255, rtol=1e-6)
    assert few.shape == (2,)


def test_folder_named_after_fashion_mnist_is_enough(tmp_path):
    _, labels = write_idx(tmp_path / "fashion-mnist")
    y = data.load("fashion_mnist", data_dir=tmp_path / "fashion-mnist")[1]
    np.testing.assert_array_equal(y, labels)


def test_flat_folder_is_not_taken_for_fashion_mnist(tmp_path):
    write_idx(tmp_path)
    assert "download" in refusal("fashion_mnist", data_dir=tmp_path)


def test_fashion_folder_is_not_taken_for_mnist(tmp_path):
    write_idx(tmp_path / "fashion-mnist")
    assert "download" in refusal("mnist", data_dir=tmp_path / "fashion-mnist")


def test_sub_folder_comes_first(tmp_path):
    write_idx(tmp_path, seed=1)
    _, labels = write_idx(tmp_path / "mnist", seed=2)
    np.testing.assert_array_equal(data.load("mnist", data_dir=tmp_path)[1], labels)


def test_data_dir_then_environment_then_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEANFIELD_JAX_DATA", str(tmp_path / "environment"))
    places = ("cache/meanfield_jax/mnist", "environment/mnist", "given/mnist")
    for count, place in enumerate(places, start=1):
        write_idx(tmp_path / place, count=count)
        assert len(data.load("mnist", data_dir=tmp_path / "given")[1]) == count


def test_images_and_labels_come_from_one_folder(tmp_path):
    write_idx(tmp_path / "mnist", count=3)
    (tmp_path / "mnist/train-labels-idx1-ubyte.gz").unlink()
    write_idx(tmp_path, count=5)
    assert data.load("mnist", data_dir=tmp_path)[0].shape == (5, 28, 28, 1)


IMAGES, LABELS = random_pair(6, (28, 28))


@pytest.mark.parametrize(
    ("damaged", "content", "cause"),
    [
        (
            "images",
            gzip.compress(idx_bytes(LABELS), mtime=0),
            "magic number 2049, that of labels, not 2051",
        ),
        (
            "labels",
            gzip.compress(idx_bytes(IMAGES), mtime=0),
            "magic number 2051, that of images, not 2049",
        ),
        ("images", idx_bytes(IMAGES)[:-1], "declares 6 items in 4720 bytes but has 4719"),
        ("images", idx_bytes(IMAGES) + b"x", "has 4721"),
        ("images", b"", "magic number 0"),
        ("images", idx_bytes(IMAGES)[:7], "items of shape"),
        ("images", b"<html>not found</html>", "magic number"),
        ("images", gzip.compress(idx_bytes(IMAGES), mtime=0)[:-20], "EOFError"),
        ("images", gzip.compress(idx_bytes(IMAGES), mtime=0)[:9], "cannot be read"),
        ("images", b"\x1f\x8b" + b"\xff" * 50, "cannot be read"),
        ("labels", gzip.compress(idx_bytes(LABELS), mtime=0)[:-8] + bytes(8), "BadGzipFile"),
        ("images", idx_bytes(np.zeros((6, 20, 20), np.uint8)), "items of shape (20, 20)"),
        ("labels", idx_bytes(LABELS[:5]), "labels of shape (5,) for 6 images"),
        ("labels", idx_bytes(np.array([0, 1, 2, 3, 4, 10], np.uint8)), "integers 0..9"),
    ],
)
def test_bad_idx_file_is_named(tmp_path, damaged, content, cause):
    write_idx(tmp_path / "mnist")
    (path,) = (tmp_path / "mnist").glob(f"*{damaged}*")
    path.write_bytes(content)
    message = refusal("mnist", data_dir=tmp_path)
    assert message.startswith(f"file={str(path)!r}")
    assert cause in message
    assert "replace it" in message


def test_corrupt_deflate_stream(tmp_path):
    write_idx(tmp_path / "mnist")
    path = tmp_path / "mnist/train-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    raw[12:60] = b"\xff" * 48
    path.write_bytes(raw)
    assert "cannot be read" in refusal("mnist", data_dir=tmp_path)


def test_empty_set_is_refused(tmp_path):
    write_idx(tmp_path / "mnist", count=0)
    assert "holds 0 samples" in refusal("mnist", data_dir=tmp_path)


def test_contents_of_the_other_set_are_recognized(tmp_path, monkeypatch):
    """Also when packed anew: the digest is that of the contents."""
    images, _ = write_idx(tmp_path / "mnist")
    digest = hashlib.sha256(idx_bytes(images)).hexdigest()[:16]
    monkeypatch.setitem(data_files.CONTENTS, digest, "fashion_mnist/train-images-idx3-ubyte")
    message = refusal("mnist", data_dir=tmp_path)
    assert "holds fashion_mnist/train-images-idx3-ubyte, not mnist/train-images" in message
    monkeypatch.setitem(data_files.CONTENTS, digest, "mnist/train-images-idx3-ubyte")
    assert len(data.load("mnist", data_dir=tmp_path)[0]) == 6


# CIFAR-10


def test_generated_batch_is_what_numpy_reads():
    """The usual recipe agrees with the writer above, warnings about old flags aside."""
    images, labels = random_pair(3, (32, 32, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = pickle.loads(batch_bytes(images, labels), encoding="bytes")
    np.testing.assert_array_equal(batch[b"data"], images.transpose(0, 3, 1, 2).reshape(3, -1))
    assert batch[b"labels"] == list(labels)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "place",
    ["cifar-10-batches-py", "cifar10/cifar-10-batches-py", ".", "tar", "cifar10/tar"],
)
def test_cifar10_batches(tmp_path, place, split):
    files, pairs = cifar_files()
    target = tmp_path / place
    if target.name == "tar":
        target.parent.mkdir(exist_ok=True)
        (target.parent / "cifar-10-python.tar.gz").write_bytes(tar_bytes(files))
    else:
        target.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (target / name).write_bytes(content)
    x, y = data.load("cifar10", split=split, data_dir=tmp_path, standardize=False)
    images, labels = pairs[split]
    np.testing.assert_allclose(x, images / 255, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)


def test_archive_members_are_not_written_to_disk(tmp_path):
    files, _ = cifar_files()
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tar_bytes({"../../evil": b"x"} | files))
    data.load("cifar10", data_dir=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar-10-python.tar.gz"]


def test_npz_splits_into_4096_and_the_rest(tmp_path):
    images, labels = write_npz(tmp_path / "cifar10_subset.npz", 4100)
    x, y = data.load("cifar10", data_dir=tmp_path, standardize=False)
    assert x.shape == (4096, 32, 32, 3)
    rest, rest_y = data.load("cifar10", split="test", data_dir=tmp_path, standardize=False)
    np.testing.assert_allclose(rest, images[4096:] / 255, rtol=1e-6)
    np.testing.assert_array_equal(np.concatenate([y, rest_y]), labels)


def test_npz_without_test_images(tmp_path):
    write_npz(tmp_path / "cifar10.npz", 8)
    assert "test split of cifar10 holds 0 samples" in refusal(
        "cifar10", split="test", data_dir=tmp_path
    )


def test_cifar10_is_standardized_per_channel_over_the_selection(tmp_path):
    write_npz(tmp_path / "cifar10.npz", 8)
    x, _ = data.load("cifar10", data_dir=tmp_path, num_samples=5)
    eps = np.finfo(np.float32).eps
    np.testing.assert_allclose(x.mean((0, 1, 2), dtype=float), 0, atol=4 * eps)
    np.testing.assert_allclose(x.std((0, 1, 2), dtype=float), 1, rtol=4 * eps)


def test_constant_channel_cannot_be_standardized(tmp_path):
    write_npz(tmp_path / "cifar10.npz", images=np.zeros((8, 32, 32, 3), np.uint8))
    assert "channel is constant" in refusal("cifar10", data_dir=tmp_path)
    assert not data.load("cifar10", data_dir=tmp_path, standardize=False)[0].any()


def test_several_npz_files_are_ambiguous(tmp_path):
    for name in ("cifar10.npz", "cifar10_subset.npz"):
        write_npz(tmp_path / name)
    assert "holds 2 files cifar10*.npz" in refusal("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"images": np.zeros((8, 3, 32, 32), np.uint8)}, "not uint8 images (32, 32, 3)"),
        ({"images": np.zeros((8, 32, 32, 3), np.float32)}, "holds float32"),
        ({"labels": np.zeros(7, np.uint8)}, "labels of shape (7,) for 8 images"),
        ({"labels": np.full(8, 10)}, "integers 0..9"),
        ({"labels": np.full(8, -1)}, "integers 0..9"),
        ({"labels": np.zeros(8)}, "integers 0..9"),
        ({"labels": np.array([object()] * 8)}, "allow_pickle=False"),
    ],
)
def test_bad_arrays_in_npz(tmp_path, changes, cause):
    path = tmp_path / "cifar10.npz"
    write_npz(path, **changes)
    message = refusal("cifar10", data_dir=tmp_path)
    assert message.startswith(f"file={str(path)!r}")
    assert cause in message


def damaged_npz(path, damage):
    write_npz(path)
    raw = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(raw[:-100])
    elif damage == "corrupt":
        path.write_bytes(raw[:300] + b"\xff" * 300 + raw[600:])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "array":
        buffer = io.BytesIO()
        np.save(buffer, np.zeros(3))
        path.write_bytes(buffer.getvalue())
    elif damage == "pickle":
        path.write_bytes(pickle.dumps({"images": 1}))
    else:
        np.savez(path, images=np.zeros((8, 32, 32, 3), np.uint8))


@pytest.mark.parametrize(
    "damage", ["truncated", "corrupt", "empty", "array", "pickle", "without labels"]
)
def test_bad_npz_file_is_named(tmp_path, damage):
    damaged_npz(tmp_path / "cifar10.npz", damage)
    assert refusal("cifar10", data_dir=tmp_path).startswith("file='" + str(tmp_path / "cifar10"))


class Command:
    """Pickled, it runs a command when it is read."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (pickle.dumps({b"data": 1, b"labels": []}, 2), "cannot be read"),
        (pickle.dumps({b"data": np.zeros(3)}, 5), "does not need"),
        (pickle.dumps([len], 2), "does not need __builtin__.len"),
        (batch_bytes(*random_pair(2, (32, 32, 3)))[:-50], "cannot be read"),
        (batch_bytes(*random_pair(2, (32, 32, 3))).replace(b"U\x02u1", b"U\x02O8"), "type b'O8'"),
        (batch_bytes(IMAGES[:2, :1, :1, None].repeat(3, 3), [1, 2]), "cannot be read"),
        (batch_bytes(np.zeros((2, 32, 32, 3), np.uint8), [1, 2, 3]), "shape (3,) for 2 images"),
        (batch_bytes(np.zeros((2, 32, 32, 3), np.uint8), [1, 77]), "integers 0..9"),
        (b"", "EOFError"),
        (b"<html>", "cannot be read"),
    ],
)
def test_bad_batch_is_named(tmp_path, content, cause):
    (tmp_path / "test_batch").write_bytes(content)
    message = refusal("cifar10", split="test", data_dir=tmp_path)
    assert message.startswith(f"file={str(tmp_path / 'test_batch')!r}")
    assert cause in message


@pytest.mark.parametrize("protocol", range(6))
def test_pickled_commands_are_not_run(tmp_path, protocol):
    command = Command(f"echo > {tmp_path / 'ran'}")
    (tmp_path / "test_batch").write_bytes(pickle.dumps([command], protocol))
    assert "system" in refusal("cifar10", split="test", data_dir=tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_batch_is_named(tmp_path):
    files, _ = cifar_files()
    for name in TRAIN_BATCHES[:3]:
        (tmp_path / name).write_bytes(files[name])
    assert "data_batch_4" in refusal("cifar10", data_dir=tmp_path)


def test_archive_without_a_batch_is_named(tmp_path):
    files, _ = cifar_files()
    del files["data_batch_2"]
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(tar_bytes(files))
    assert "lacks cifar-10-batches-py/data_batch_2" in refusal("cifar10", data_dir=tmp_path)
    assert len(data.load("cifar10", split="test", data_dir=tmp_path)[1]) == 4


@pytest.mark.parametrize("damage", ["truncated", "corrupt", "one byte", "not gzip", "empty"])
def test_bad_archive_is_named(tmp_path, damage):
    raw = tar_bytes(cifar_files()[0])
    middle = len(raw) // 2
    content = {
        "truncated": raw[:middle],
        "corrupt": raw[:middle] + b"\xff" * 200 + raw[middle + 200 :],
        "one byte": raw[:-8] + bytes([raw[-8] ^ 1]) + raw[-7:],  # of the checksum
        "not gzip": b"<html>" * 1000,
        "empty": b"",
    }
    path = tmp_path / "cifar-10-python.tar.gz"
    path.write_bytes(content[damage])
    assert refusal("cifar10", data_dir=tmp_path).startswith(f"file='{path}")


# Downloads, from a server on this machine


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        content = self.server.files.get(self.path)
        if content is None:
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content) + self.server.missing))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    """Serves `server.files`; `server.missing` bytes less than announced."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.missing = {}, 0
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def serve(server, monkeypatch, name, files):
    monkeypatch.setitem(data._MIRRORS, name, f"http://127.0.0.1:{server.server_port}/")
    server.files |= {f"/{filename}": content for filename, content in files.items()}
    digests = tuple(hashlib.sha256(content).hexdigest() for content in files.values())
    monkeypatch.setitem(data._SHA256, name, digests)


def idx_files(seed=0):
    """The four files of a set, in the order of the known checksums, and the training pair."""
    pairs = [random_pair(5, (28, 28), seed), random_pair(3, (28, 28), seed + 1)]
    files = {}
    for prefix, (images, labels) in zip(("train", "t10k"), pairs, strict=True):
        files[f"{prefix}-images-idx3-ubyte.gz"] = gzip.compress(idx_bytes(images), mtime=0)
        files[f"{prefix}-labels-idx1-ubyte.gz"] = gzip.compress(idx_bytes(labels), mtime=0)
    return files, {"train": pairs[0], "test": pairs[1]}


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_download_of_idx_files(tmp_path, server, monkeypatch, name, split):
    files, pairs = idx_files()
    serve(server, monkeypatch, name, files)
    x, y = data.load(name, split=split, data_dir=tmp_path / "new", standardize=False)
    np.testing.assert_allclose(x[..., 0], pairs[split][0] / 255, rtol=1e-6)
    np.testing.assert_array_equal(y, pairs[split][1])
    found = {path.name for path in leftovers(tmp_path / "new" / name)}
    assert found == {file for file in files if file.startswith(PREFIX[split])}
    server.files.clear()  # the second time no download is needed
    data.load(name, split=split, data_dir=tmp_path / "new")


@pytest.mark.parametrize("place", ["environment", "cache"])
def test_download_goes_to_environment_or_cache(tmp_path, server, monkeypatch, place):
    files, _ = cifar_files()
    serve(server, monkeypatch, "cifar10", {"cifar-10-python.tar.gz": tar_bytes(files)})
    if place == "environment":
        monkeypatch.setenv("MEANFIELD_JAX_DATA", str(tmp_path / "environment"))
    assert data.load("cifar10", flatten=True)[0].shape == (20, 3072)
    (path,) = leftovers(tmp_path)
    root = "environment" if place == "environment" else "cache/meanfield_jax"
    assert path == tmp_path / root / "cifar10/cifar-10-python.tar.gz"


# After an error the HTTP client leaves its connection to the garbage collector, which warns.
collected_connection = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@collected_connection
@pytest.mark.parametrize("failure", ["checksum", "404", "cut off", "no server"])
def test_failed_download_leaves_nothing(tmp_path, server, monkeypatch, failure):
    files, _ = idx_files()
    serve(server, monkeypatch, "mnist", files)
    first = "train-images-idx3-ubyte.gz"
    if failure == "checksum":
        server.files["/" + first] = idx_files(seed=9)[0][first]
    elif failure == "404":
        server.files.clear()
    elif failure == "cut off":
        server.missing = 10
    else:
        monkeypatch.setitem(data._MIRRORS, "mnist", "http://127.0.0.1:9/")
    message = refusal("mnist", data_dir=tmp_path / "new")
    cause = {"checksum": "SHA256", "404": "404", "cut off": "Incomplete", "no server": "Connection"}
    for part in (
        *(f"file={first!r}", f"{tmp_path / 'new' / 'mnist'}, {tmp_path / 'new'}"),
        *("meanfield_jax", cause[failure], "--data-dir", "$MEANFIELD_JAX_DATA", "--data digits"),
    ):
        assert part in message
    assert leftovers(tmp_path) == []
    gc.collect()  # here, not in a later test


@collected_connection
def test_interrupted_download_leaves_nothing(tmp_path, server, monkeypatch):
    serve(server, monkeypatch, "mnist", idx_files()[0])

    def interrupt(self, size):
        raise KeyboardInterrupt

    monkeypatch.setattr(data._Bar, "update", interrupt)
    with pytest.raises(KeyboardInterrupt):
        data.load("mnist", data_dir=tmp_path)
    assert leftovers(tmp_path) == []
    gc.collect()


def test_download_keeps_a_file_that_is_there(tmp_path, server, monkeypatch):
    """Half a pair: the other file is added, the user's own copy is not replaced."""
    files, pairs = idx_files()
    serve(server, monkeypatch, "mnist", files)
    images = idx_bytes(pairs["train"][0][::-1])
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist/train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images, 1))
    x, y = data.load("mnist", data_dir=tmp_path, standardize=False)
    np.testing.assert_allclose(x[..., 0], pairs["train"][0][::-1] / 255, rtol=1e-6)
    np.testing.assert_array_equal(y, pairs["train"][1])


def test_download_into_what_is_not_a_folder(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    assert "download" in refusal("mnist", data_dir=tmp_path / "file")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bar_is_for_terminals(tmp_path, server, monkeypatch, capsys, terminal):
    serve(server, monkeypatch, "mnist", idx_files()[0])
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    data.load("mnist", data_dir=tmp_path)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("100%" in captured.err) == terminal


# Real files


@pytest.mark.parametrize("name", ["digits", *REAL])
@pytest.mark.parametrize("split", ["train", "test"])
def test_real_images(name, split):
    x, y = data.load(name, split=split, data_dir=REAL_DIR)
    assert x.shape == (len(y), *data.shape_of(name))
    assert (x.dtype, y.dtype) == (np.float32, np.int32)
    assert np.all(np.bincount(y, minlength=10) > 0.05 * len(y))
    # Constants of four decimals; a test set has its own mean and variance.
    tolerance = 5e-4 if split == "train" else 0.05
    assert abs(x.mean(dtype=float)) < (tolerance if name != "digits" else 0.05)
    assert abs(x.std(dtype=float) - 1) < (tolerance if name != "digits" else 0.05)


@pytest.mark.parametrize("name", ["gaussian", "digits", *REAL])
def test_first_samples(name):
    few, few_y = data.load(name, num_samples=7, data_dir=REAL_DIR, standardize=False)
    more, more_y = data.load(name, num_samples=20, data_dir=REAL_DIR, standardize=False)
    np.testing.assert_array_equal(few, more[:7])
    np.testing.assert_array_equal(few_y, more_y[:7])
    flat, _ = data.load(name, num_samples=7, data_dir=REAL_DIR, standardize=False, flatten=True)
    np.testing.assert_array_equal(flat, few.reshape(7, -1))


@pytest.mark.parametrize("name", ["digits", *(name for name in REAL if "mnist" in name)])
def test_real_files_under_the_other_name(tmp_path, name):
    """MNIST in a folder named after Fashion-MNIST, and the reverse; digits have no files."""
    if name == "digits":
        assert len(data.load(name, data_dir=tmp_path)[1]) == 1438
        return
    other = {"mnist": "fashion_mnist", "fashion_mnist": "mnist"}[name]
    source = next(REAL_DIR.glob(REAL_PATTERNS[name])).parent
    (tmp_path / other).symlink_to(source.resolve(), target_is_directory=True)
    assert f"holds {name}/train-images-idx3-ubyte, not {other}/" in refusal(
        other, data_dir=tmp_path
    )
