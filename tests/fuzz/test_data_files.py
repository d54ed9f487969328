"""Damaged and hostile data files, and servers without an end: errors that name the file.

Each test goes through seeds for MEANFIELD_JAX_FUZZ_SECONDS (3 by default).
"""

import functools
import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import threading
import tracemalloc
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from borders import answer, draws

import meanfield_jax as mf
from meanfield_jax import data, data_files

COUNT = 3
BOMB = 2**26
"""Bytes to which a bomb expands."""

MOST = 2**24
"""The limit of a file in the tests of bombs, lower than the real one to save time."""

LEAST = 2**23
"""Memory that a refusal may take."""


def idx(sizes: tuple[int, ...], values: bytes) -> bytes:
    return struct.pack(f">{1 + len(sizes)}I", 2048 + len(sizes), *sizes) + values


def npz(**arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def batch() -> bytes:
    """A CIFAR-10 batch as Python 2 pickled it."""
    rows = bytes(COUNT * 3072)
    return (
        b"\x80\x02}q\x01(U\x06labelsq\x04]q\x05(K\x00K\x01K\x02eU\x04dataq\x06"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08"
        b"K\x00\x85U\x01b\x87Rq\x09(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
        + struct.pack("<I", len(rows))
        + rows
        + b"tbu."
    )


def archive(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as packed:
        for name, content in members.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            packed.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


IMAGES, LABELS = np.zeros((COUNT, 32, 32, 3), np.uint8), np.arange(COUNT)
GOOD: dict[str, tuple[str, str, bytes]] = {
    "idx": ("mnist", "t10k-images-idx3-ubyte", idx((COUNT, 28, 28), bytes(COUNT * 784))),
    "idx.gz": (
        "mnist",
        "t10k-images-idx3-ubyte.gz",
        gzip.compress(idx((COUNT, 28, 28), bytes(COUNT * 784))),
    ),
    "npz": ("cifar10", "cifar10_subset.npz", npz(images=IMAGES, labels=LABELS)),
    "pickle": ("cifar10", "test_batch", batch()),
    "tar": ("cifar10", "cifar-10-python.tar.gz", archive(test_batch=batch())),
}
"""By format: the data set, the name of a file, and its contents."""


def loaded(folder, kind: str, content: bytes):
    """What loading a file with these contents gives."""
    name, filename, _ = GOOD[kind]
    (folder / filename).write_bytes(content)
    if name == "mnist":
        (folder / "t10k-labels-idx1-ubyte").write_bytes(idx((COUNT,), bytes(COUNT)))
    split = "train" if kind == "npz" else "test"
    return data.load(name, split=split, data_dir=folder, standardize=False)


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Contents with something changed: bytes, a part, the end, or the whole."""
    kind, at = rng.randrange(8), rng.randrange(len(content))
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content + rng.randbytes(rng.randint(1, 100))
    if kind == 2:
        return content[:at] + content[at + rng.randint(1, 50) :]
    if kind == 3:
        return rng.randbytes(rng.randint(0, 2000))
    if kind == 4:
        return content[: at // 2] + content[at:] + content[:at]
    # many of the structures that matter are at the beginning
    where = range(min(len(content), rng.choice([20, 200, len(content)])))
    found = bytearray(content)
    for place in rng.choices(where, k=rng.randint(1, 4)):
        found[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(found)


@pytest.mark.parametrize("kind", GOOD)
def test_whole_files_are_read(tmp_path, kind):
    x, labels = loaded(tmp_path, kind, GOOD[kind][2])
    assert x.shape == (COUNT, *data.shape_of(GOOD[kind][0]))
    assert len(labels) == COUNT


@pytest.mark.filterwarnings("ignore")
def test_damaged_files(tmp_path):
    answers = []
    for seed, rng in draws("data files"):
        kind = rng.choice(sorted(GOOD))
        content = damaged(rng, GOOD[kind][2])
        read = functools.partial(loaded, tmp_path, kind, content)
        found = answer(read, f"seed {seed}: {kind}")
        answers.append(found)
        if found is not None:
            x, labels = found
            assert x.shape[1:] == data.shape_of(GOOD[kind][0]), seed
            assert len(x) == len(labels), seed
        for path in tmp_path.iterdir():
            path.unlink()
    assert sum(found is None for found in answers) > len(answers) / 3


# ---- bombs


def zeros(size: int, head: bytes = b"") -> bytes:
    """A gzip file of some bytes and zeros: members one after the other are one file."""
    length = min(size, 2**22)
    return gzip.compress(head) + gzip.compress(bytes(length)) * (size // length)


def zip_of(shape: tuple[int, ...], size: int) -> bytes:
    """An npz whose arrays declare a shape, and have less contents."""
    buffer, header = io.BytesIO(), io.BytesIO()
    declared = dict(descr="|u1", fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(header, declared)
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in ("images", "labels"):
            with packed.open(f"{name}.npy", "w") as stream:
                stream.write(header.getvalue())
                for _ in range(size // 2**20):
                    stream.write(bytes(2**20))
    return buffer.getvalue()


def tuples(levels: int) -> bytes:
    """A pickle of tuples in tuples, each named twice, as the key of a dictionary."""
    inner = b"".join(b"q%ch%ch%c\x86" % (n, n, n) for n in range(levels))
    return b"\x80\x02}K\x01" + inner + b"K\x00s."


def hostile_files() -> Iterator[tuple[str, str, bytes]]:
    """Names, formats and contents of files that would take memory, time or more."""
    yield "a gzip bomb", "idx.gz", zeros(BOMB, idx((COUNT, 28, 28), b""))
    yield "a gzip bomb that says so", "idx.gz", zeros(2**20, idx((2**32 - 1, 28, 28), b""))
    yield "an array of 10^13", "npz", zip_of((10**10, 32, 32), 2**20)
    yield "a zip bomb", "npz", zip_of((COUNT, 32, 32, 3), 2 * MOST)
    yield "a tar bomb", "tar", zeros(BOMB // 2)
    member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
    member.size = 2**40
    yield "a member of 10^12", "tar", zeros(2**20, member.tobuf())
    yield "an archive after an archive", "tar", archive(test_batch=batch()) + zeros(BOMB // 2)
    member.size, member.type = 0, tarfile.SYMTYPE
    member.linkname = "/etc/passwd"
    yield "a link", "tar", gzip.compress(member.tobuf() + bytes(1024))
    yield (
        "an array of 10^12 in a pickle",
        "pickle",
        batch()
        .replace(b"K\x00\x85U\x01b", b"\x8a\x06\x00\x00\x00\x00\x00\x01\x85U\x01b")
        .replace(b"K\x03M\x00\x0c\x86", b"\x8a\x06\x00\x00\x00\x00\x00\x01M\x00\x0c\x86"),
    )
    yield "a text of 10^12", "pickle", b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x."
    yield "a far place", "pickle", b"\x80\x02}r" + struct.pack("<I", 2**31) + b"."
    yield "tuples of tuples", "pickle", tuples(60)
    yield "an array called", "pickle", b"\x80\x02cnumpy\nndarray\nJ\xff\xff\xff\x7f\x85R."


def test_hostile_files_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(data_files, "MOST_BYTES", MOST)
    for name, kind, content in hostile_files():
        folder = tmp_path / name
        folder.mkdir()
        tracemalloc.start()
        try:
            found = answer(functools.partial(loaded, folder, kind, content), name)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert found is None, name
        assert peak < LEAST, f"{name}: {peak / 2**20:.0f} MiB"


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("kind", ["pickle", "tar", "npz"])
def test_no_command_is_run(tmp_path, kind):
    commands = np.array([Command(f"echo > {tmp_path / 'ran'}")] * COUNT)
    packed = pickle.dumps({b"data": commands, b"labels": [0] * COUNT}, 2)
    contents = dict(
        pickle=packed, tar=archive(test_batch=packed), npz=npz(images=commands, labels=LABELS)
    )
    assert answer(functools.partial(loaded, tmp_path, kind, contents[kind]), kind) is None
    assert not (tmp_path / "ran").exists()


# ---- servers


class Endless(BaseHTTPRequestHandler):
    """Answers with zeros until the reader has had enough."""

    sent = 0

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        try:
            while Endless.sent < 2**31:
                self.wfile.write(bytes(2**16))
                Endless.sent += 2**16
        except OSError:
            pass

    def log_message(self, *args):
        pass


@pytest.fixture
def endless(monkeypatch):
    """A server in place of the mirrors."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(data, "_MIRRORS", dict.fromkeys(data._MIRRORS, address))
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Endless.sent = 0
    yield
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_download_without_an_end_is_ended(endless, tmp_path):
    with pytest.raises(mf.DataError, match="the server sends more than 9912422 bytes"):
        data.load("mnist", data_dir=tmp_path)
    assert Endless.sent < 3 * 10**7
    assert list(tmp_path.rglob("*")) == []
