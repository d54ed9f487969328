"""Damaged stores, crashes at every write, kills: nothing is lost, and nothing wrong is believed.

Each test goes through seeds for MEANFIELD_JAX_FUZZ_SECONDS (2 by default), and names the seed of a
failure; the seeds start at MEANFIELD_JAX_FUZZ_SEED (0), and those that once failed come first.
"""

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import stores

import meanfield_jax as mf
from meanfield_jax.experiments import files
from meanfield_jax.experiments.check import check_store

SECONDS = float(os.environ.get("MEANFIELD_JAX_FUZZ_SECONDS", "2"))
FIRST = int(os.environ.get("MEANFIELD_JAX_FUZZ_SEED", "0"))
ONCE_FAILED = ()


def seeds() -> Iterator[int]:
    """Seeds until the time is over; how many there were is printed."""
    yield from ONCE_FAILED
    deadline, seed = time.monotonic() + SECONDS, FIRST
    while time.monotonic() < deadline:
        yield seed
        seed += 1
    print(f"seeds {FIRST} to {seed - 1}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store that nothing happened to."""
    path = tmp_path_factory.mktemp("whole") / "run.zarr"
    stores.finish(path)
    return path


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """A folder in memory where there is one, and no waiting for the disk: what is tested is what is
    in the files, a thousand times."""
    monkeypatch.setattr(files, "synchronize", lambda path: None)
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=place) as folder:
        yield Path(folder)


def documented(call, store: Path):
    """The result of a call, or None if it raised an error in one line that names the store."""
    try:
        return call()
    except (mf.DataError, mf.SpecError, OSError) as error:
        if not str(error).startswith(f"store='{store}'") or "\n" in str(error):
            raise
        return None


def test_a_damaged_store_is_right_or_refused_and_resumes(whole, memory):
    """What is loaded is right, or missing; and the sweep can be resumed, or says why not."""
    truth, files_of_truth = mf.load_sweep(whole), stores.content(whole)
    counts = dict(stores=0, refused_by_load=0, refused_by_resume=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds():
        store = memory / "run.zarr"
        shutil.rmtree(store, ignore_errors=True)
        shutil.copytree(whole, store)
        how = stores.damage(store, seed)
        counts["stores"] += 1
        loaded = documented(lambda store=store: mf.load_sweep(store), store)
        if loaded is None:
            counts["refused_by_load"] += 1
        else:
            computed = loaded.diverged_at != -2
            assert loaded.where(computed).drop_attrs().equals(truth.where(computed).drop_attrs()), (
                how
            )
            for name in ("eta_max_batch", *loaded.coords):
                assert loaded[name].identical(truth[name]), how
        found = documented(lambda store=store: check_store(store), store)
        unharmed = stores.content(store) == files_of_truth
        assert found is None or unharmed or found.faults or found.missing, how
        if documented(lambda store=store: stores.finish(store), store) is None:
            counts["refused_by_resume"] += 1
            assert loaded is None, how
        else:
            assert mf.load_sweep(store).identical(truth), how
            assert check_store(store).faults == (), how
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) // 1024
    print(counts, f"peak memory {peak // 1024} MB before, {grown} MB more after")
    assert grown < 200
    assert counts["stores"] > 10 * SECONDS
    assert counts["refused_by_resume"] <= 0.1 * counts["stores"]


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_check_knows_every_chunk_whatever_file_is_damaged(whole, memory, how):
    """Chunks whose files are whole are said to be whole, unless the header is lost."""
    total = len(stores.finish(whole).regions)
    for file in stores.content(whole):
        store = memory / "run.zarr"
        shutil.copytree(whole, store)
        data = bytearray((store / file).read_bytes())
        if how == "flipped":
            data[len(data) // 2] ^= 1
        (store / file).write_bytes(data[: len(data) // (2 if how == "cut" else 1)])
        if how == "gone":
            (store / file).unlink()
        found = check_store(store)
        is_result = file.startswith(("loss/c", "diverged_at/c", "digest/c"))
        lost = file == "zarr.json" and how != "flipped"
        assert found.whole == (0 if lost else total - is_result), file
        assert found.whole + found.damaged + found.missing + found.unknown == total, file
        assert found.unknown == (total if lost else 0), file
        # without its digest a chunk has not been computed yet
        undone = how == "gone" and file.startswith("digest/c")
        assert found.missing == undone, file
        assert undone or file in str([fault.file for fault in found.faults]), file
        stores.finish(store)
        assert check_store(store) == check_store(whole), file
        shutil.rmtree(store)


class Crash(BaseException):
    """The process ends here."""


HOW = ("before", "torn", "empty", "after")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("step", ["write", "replace", "rename"])
def test_a_crash_at_any_write_loses_nothing(whole, memory, monkeypatch, step, how):
    """Also if the content of a file was not on the disk yet when it got its name."""
    owner, name = (files, "write_file") if step == "write" else (Path, step)
    do = getattr(owner, name)
    left = 0

    def crash(path: Path, argument):
        nonlocal left
        left -= 1
        if left:
            return do(path, argument)
        if how != "before":
            target = path if step == "write" else argument
            do(path, argument)
            if how != "after" and target.is_file():
                data = target.read_bytes()
                target.write_bytes(data[: len(data) // 2] if how == "torn" else b"")
        raise Crash

    count = 0
    while left >= 0:
        count += 1
        left = count
        store = memory / f"{count}.zarr"
        monkeypatch.setattr(owner, name, crash)
        try:
            stores.finish(store)
            left = -1
        except Crash:
            left = 0
        monkeypatch.setattr(owner, name, do)
        stores.finish(store)
        assert stores.content(store) == stores.content(whole), count
    assert count > (1 if step == "rename" else len(stores.content(whole)))


def test_killed_at_any_moment_a_store_resumes(whole, tmp_path):
    """Most of the kills are in the first 200 ms, in which the store is born."""
    server = subprocess.Popen(
        [sys.executable, stores.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | dict(JAX_PLATFORMS="cpu"),
    )
    kills = early = unfinished = 0
    try:
        assert server.stdout.readline() == "ready\n"
        for seed in seeds():
            draw = random.Random(seed)
            store = tmp_path / f"{seed}.zarr"
            for _ in range(draw.randint(1, 3)):
                wait = draw.choice((0.005, 0.03, 0.2, 0.5)) * draw.random()
                server.stdin.write(f"{store} {draw.choice((0, 0.01, 0.05))}\n")
                server.stdin.flush()
                child = int(server.stdout.readline())
                time.sleep(wait)
                with contextlib.suppress(ProcessLookupError):  # it was done before
                    os.kill(child, signal.SIGKILL)
                    kills, early = kills + 1, early + (wait < 0.2)
                # the system closes its files, and with them the lock, a moment later
                while Path(f"/proc/{child}").exists():
                    time.sleep(0.001)
            unfinished += not store.exists() or len(stores.content(store)) < len(
                stores.content(whole)
            )
            stores.finish(store)
            assert stores.content(store) == stores.content(whole), f"seed {seed}"
    finally:
        server.kill()
        server.communicate()
    print(dict(kills=kills, in_the_first_200_ms=early, stores_unfinished=unfinished))
    assert early > kills / 3
    assert unfinished


def test_nothing_in_a_hostile_store_is_executed(whole, tmp_path):
    """Consolidated metadata that make an array one of pickled objects, and pickles as its data."""
    store, mark = tmp_path / "run.zarr", tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (mark,)

    shutil.copytree(whole, store)
    document = json.loads((store / "zarr.json").read_text())
    codec = dict(name="numcodecs.pickle", configuration=dict(protocol=5))
    array = json.loads((store / "gamma" / "zarr.json").read_text())
    array |= dict(data_type="|O", codecs=[codec], fill_value=0)
    metadata = dict(gamma=array, loss=array)
    document["consolidated_metadata"] = dict(
        kind="inline", must_understand=False, metadata=metadata
    )
    (store / "zarr.json").write_text(json.dumps(document))
    # the store's own metadata are not changed by this, and its data are right
    assert mf.load_sweep(store).identical(mf.load_sweep(whole))
    (store / "gamma" / "c" / "0").write_bytes(pickle.dumps(Hostile()))
    (store / "gamma" / "zarr.json").write_text(json.dumps(array))
    with pytest.raises(mf.DataError, match="gamma"):
        mf.load_sweep(store)
    assert {fault.file for fault in check_store(store).faults} >= {"gamma/c/0", "gamma/zarr.json"}
    stores.finish(store)
    assert mf.load_sweep(store).identical(mf.load_sweep(whole))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda at: at["spec"]["grid"].update({f"axis{n}": list(range(1000)) for n in range(4)}),
        lambda at: at.update(chunk=[10**9] * 3),
        lambda at: at.update(chunk=[0, 1, 1]),
        lambda at: at["spec"].update(grid=dict(gamma=3)),
        lambda at: at["files"].update({"../../../etc/passwd": "0"}),
        lambda at: at.update(files={}),
        lambda at: at.update(files=[[]] * 3),
    ],
)
def test_a_store_with_right_digests_may_still_be_nonsense(whole, tmp_path, change):
    """Someone else may compute digests, too."""
    from meanfield_jax.experiments import zarr_format

    store = tmp_path / "run.zarr"
    shutil.copytree(whole, store)
    document = json.loads((store / "zarr.json").read_text())
    attributes = document["attributes"]
    change(attributes)
    del attributes["digest"]
    attributes["digest"] = zarr_format.digest_of(zarr_format._encoded(attributes))
    (store / "zarr.json").write_bytes(zarr_format._encoded(document))
    loaded = documented(lambda: mf.load_sweep(store), store)
    assert loaded is None or np.all(loaded.get("diverged_at", -2) == -2)


def test_other_readers_of_zarr_agree(whole):
    """The bytes are those of the format, as its reference implementation reads it."""
    import xarray as xr

    with warnings.catch_warnings(), xr.open_zarr(whole, consolidated=False) as opened:
        ours = mf.load_sweep(whole)
        for name in ("loss", "diverged_at", "eta_max_batch", "gamma", "momentum", "epoch"):
            assert np.array_equal(opened[name].values, ours[name].values, equal_nan=True)
            assert opened[name].dims == ours[name].dims
