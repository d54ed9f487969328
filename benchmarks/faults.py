"""What happens to a sweep when processes are killed, files damaged and disks full.

Really done, to the command ``meanfield-jax sweep`` on scikit-learn's digits:

* ``kills``: ``kill -9`` at 60 random moments of a sweep of 96 chunks, resumed each time: the store
  is bit by bit that of a sweep which nobody touched;
* ``births``: the same to 40 new stores, each within 200 ms of a process's first write, half of
  them of its lock (before the store is there), half of the first file of its store;
* ``two``: two processes with ``jax.distributed`` over 127.0.0.1, first the one, then the other
  killed: the survivor does its share, says in one line that the other seems dead, and the store
  resumes;
* ``many``: 50,000 cells over two such processes, either or both of which are killed in turn;
* ``truncated``: a chunk cut in half is found and computed again;
* ``full``, ``read_only``: a disk that is full, and one that is read-only (a small tmpfs): one clear
  line, the store stays readable, and resumes once it can be written;
* ``opening``: ``mf.load_sweep`` of 100,000 cells in chunks of the default size takes under 2 s;
* ``fuzz``: random specifications, arguments and data files, as in tests/fuzz: each is an error of
  one line or means what it says, in under 2 GB.

Run as root, who may mount a tmpfs: ``python faults.py``, or ``python faults.py --only kills many``.
The exit status is 1 when one of these is false.
"""

import argparse
import contextlib
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, write_rows

import meanfield_jax as mf

SWEEP = (
    *("--data", "digits", "--widths", "256", "256", "--num-samples", "1000", "--num-test", "100"),
    *("--epochs", "5", "--chunk-cells", "1", "--grid", "gamma=0.5,1,2"),
    *("learning_rate=1e-2:100:16", "seed=0,1", "batch_size=50"),
)
SMALL = (
    *("--data", "digits", "--widths", "4", "--num-samples", "100", "--num-test", "0"),
    *("--epochs", "1", "--chunk-cells", "1", "--grid", "gamma=0.5,1"),
    *("learning_rate=1e-2,1", "seed=0,1", "batch_size=50"),
)
MANY = (
    *("--data", "digits", "--widths", "4", "--num-samples", "100", "--num-test", "0"),
    *("--epochs", "1", "--chunk-cells", "100", "--grid", "gamma=0.5,1"),
    *("learning_rate=1e-3:10:250", f"seed={','.join(map(str, range(100)))}", "batch_size=50"),
)
KILLS, BIRTHS, ROUNDS = 60, 40, 8
AXES = dict(gamma=10, learning_rate=100, seed=100)
CELLS = 16
"""Cells of a chunk on one CPU, by default."""
TRIES = 15
SECONDS = 2.0
"""The most that opening may take."""
FUZZ_SECONDS = 300
MOST_MEMORY = 2e9


def start(store: Path, *options: str, command: tuple[str, ...] = SWEEP) -> subprocess.Popen:
    """The command as a process of its own."""
    words = [sys.executable, "-m", "meanfield_jax", "sweep", str(store), *command, *options]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def untouched(folder: Path, name: str, command: tuple[str, ...]) -> Path:
    """The store of a sweep that nobody touched; it is made once."""
    store = folder / f"{name}.zarr"
    if not store.exists():
        status, said = finish(start(store, command=command))
        assert status == 0, said
    return store


def finish(process: subprocess.Popen) -> tuple[int, str]:
    """Exit status and what was said on stderr."""
    _, said = process.communicate(timeout=600)
    return process.returncode, said


def same(a: Path, b: Path) -> bool:
    """Whether two stores hold the same bits."""
    first, second = (mf.load_sweep(store).drop_attrs() for store in (a, b))
    return bool((first.diverged_at != -2).all()) and first.identical(second)


def complaint(said: str) -> str:
    """The program's own line."""
    lines = [line for line in said.splitlines() if line.startswith("meanfield-jax:")]
    return lines[0] if lines else ""


def finished(store: Path) -> int:
    """How many chunks say that they are finished."""
    folder = store / "digest" / "c"
    return len([path for path in folder.iterdir() if path.name.isdigit()]) if folder.exists() else 0


def kills(folder: Path) -> dict[str, Any]:
    """Kills while a process starts, or some chunks after it found the store, and a bit later."""
    store, moments = folder / "killed.zarr", random.Random(0)
    seen = [0]
    for kill in range(KILLS):
        process = start(store, *(["--resume"] if (store / "zarr.json").exists() else []))
        if kill % 5 == 0:
            time.sleep(moments.uniform(0, 4))
        else:
            wanted = seen[-1] + moments.randint(0, 3)
            while finished(store) < wanted and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        finish(process)
        seen.append(finished(store) if store.exists() else 0)
    status, _ = finish(start(store, "--resume"))
    text = f"kill -9 at {KILLS} random moments"
    whole = untouched(folder, "whole", SWEEP)
    return dict(fault=text, chunks_after=seen[1:], holds=status == 0 and same(store, whole))


def births(folder: Path) -> dict[str, Any]:
    """Kills within 200 ms of a process's first write, then resumes."""
    whole, moments = untouched(folder, "small", SMALL), random.Random(0)
    late, unborn, wrong = [], 0, 0
    for kill in range(BIRTHS):
        store = folder / f"birth-{kill}.zarr"
        first = store.with_name(f".{store.name}.{('lock', 'new')[kill % 2]}")
        process = start(store, command=SMALL)
        while not (first.exists() or store.exists()) and process.poll() is None:
            time.sleep(0.0005)
        seen = time.perf_counter()
        time.sleep(moments.uniform(0, 0.19))
        process.send_signal(signal.SIGKILL)
        late.append(1000 * (time.perf_counter() - seen))
        finish(process)
        unborn += not store.exists()
        status, _ = finish(start(store, "--resume", command=SMALL))
        wrong += status != 0 or not same(store, whole)
        shutil.rmtree(store)
    return dict(
        fault=f"kill -9 of {BIRTHS} new sweeps, within 200 ms of the first write",
        milliseconds=[round(value) for value in late],
        without_store=unborn,
        wrong=wrong,
        holds=wrong == 0 and max(late) < 200,
    )


def address() -> str:
    """A free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def pair(store: Path, *options: str, command: tuple[str, ...]) -> list[subprocess.Popen]:
    """Two processes that share a sweep."""
    job = ("--coordinator", address(), "--num-processes", "2", *options)
    return [start(store, *job, "--process-id", str(n), command=command) for n in range(2)]


def two(folder: Path, victim: int) -> dict[str, Any]:
    """Kills one of two processes in the middle of its share."""
    store, whole = folder / f"two-{victim}.zarr", untouched(folder, "whole", SWEEP)
    processes = pair(store, "--patience", "5", command=SWEEP)
    while finished(store) < 4 and processes[victim].poll() is None:
        time.sleep(0.02)
    processes[victim].send_signal(signal.SIGKILL)
    finish(processes[victim])
    status, said = finish(processes[1 - victim])
    kept = finished(store)
    resumed, _ = finish(start(store, "--resume"))
    holds = status == 1 and "seems to have died" in said and "Traceback" not in said
    return dict(
        fault=f"two processes, process {victim} killed",
        said=complaint(said).replace(str(folder), "..."),
        chunks_after=kept,
        holds=bool(holds and resumed == 0 and same(store, whole)),
    )


def many(folder: Path) -> dict[str, Any]:
    """50,000 cells over two processes; in each round one is killed, and mostly the other, too."""
    begun = time.monotonic()
    whole = untouched(folder, "many", MANY)
    alone = time.monotonic() - begun
    store, moments, kept, killed = folder / "many-killed.zarr", random.Random(0), [0], [0, 0]
    for turn in range(ROUNDS):
        resume = ["--resume"] if store.exists() else []
        processes = pair(store, "--patience", "10", *resume, command=MANY)
        wanted, victim = kept[-1] + moments.randint(0, 25), turn % 2
        while finished(store) < wanted and processes[victim].poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        for number in (victim, 1 - victim):
            if number == victim or turn % 4 != 3:  # every fourth survivor does its share
                killed[number] += processes[number].poll() is None
                processes[number].send_signal(signal.SIGKILL)
                time.sleep(moments.uniform(0, 0.3))
        for process in processes:
            finish(process)
        kept.append(finished(store) if store.exists() else 0)
    begun = time.monotonic()
    ends = [finish(process) for process in pair(store, "--resume", command=MANY)]
    cells = mf.load_sweep(whole).diverged_at.size
    return dict(
        fault=f"{cells} cells over two processes, kill -9 of either in {ROUNDS} rounds",
        kills_of_each=killed,
        chunks_after=kept[1:],
        seconds_of_one_process=round(alone, 1),
        seconds_of_the_last_two=round(time.monotonic() - begun, 1),
        holds=[status for status, _ in ends] == [0, 0] and same(store, whole),
    )


def truncated(folder: Path) -> dict[str, Any]:
    """Cuts a file of results in half."""
    store, whole = folder / "truncated.zarr", untouched(folder, "whole", SWEEP)
    shutil.copytree(whole, store)
    path = sorted(file for file in (store / "loss" / "c").rglob("*") if file.is_file())[5]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    missing = int(np.sum(mf.load_sweep(store).diverged_at == -2))
    status, said = finish(start(store, "--resume"))
    holds = missing == 1 and status == 0 and same(store, whole)
    return dict(fault="a chunk truncated", said=said.splitlines()[0], holds=bool(holds))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A tmpfs of so many bytes."""
    disk = folder / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)
        disk.rmdir()


def remount(disk: Path, options: str) -> None:
    """Changes the options of a mounted disk."""
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def full(folder: Path) -> dict[str, Any]:
    """Runs on a tmpfs that is too small, then makes it larger."""
    whole = untouched(folder, "whole", SWEEP)
    used = sum(64 + path.stat().st_blocks * 512 for path in whole.rglob("*"))
    with small_disk(folder, used // 2) as disk:
        store = disk / "run.zarr"
        status, said = finish(start(store))
        kept = int(np.sum(mf.load_sweep(store).diverged_at != -2))
        remount(disk, "size=64M")
        resumed, _ = finish(start(store, "--resume"))
        holds = status == 1 and "No space left" in said and "Traceback" not in said and kept > 0
        return dict(
            fault="no space left on a small tmpfs",
            said=complaint(said).replace(str(folder), "..."),
            runs_kept=kept,
            holds=bool(holds and resumed == 0 and same(store, whole)),
        )


def read_only(folder: Path) -> dict[str, Any]:
    """Resumes an unfinished sweep on a disk that may not be written, then may."""
    whole = untouched(folder, "whole", SWEEP)
    with small_disk(folder, 2**26) as disk:
        store = disk / "run.zarr"
        shutil.copytree(whole, store)
        shutil.rmtree(store / "loss" / "c" / "0")
        remount(disk, "ro")
        missing = int(np.sum(mf.load_sweep(store).diverged_at == -2))
        status, said = finish(start(store, "--resume"))
        remount(disk, "rw")
        resumed, _ = finish(start(store, "--resume"))
        holds = status == 1 and "Read-only" in said and "Traceback" not in said and missing > 0
        return dict(
            fault="a store that is read-only",
            said=complaint(said).replace(str(folder), "..."),
            runs_missing=missing,
            holds=bool(holds and resumed == 0 and same(store, whole)),
        )


def opening(folder: Path) -> dict[str, Any]:
    """Opens a finished store of many cells, whose results are made up."""
    from meanfield_jax.experiments.birth import create
    from meanfield_jax.experiments.files import Folder
    from meanfield_jax.experiments.grid import chunk_shape
    from meanfield_jax.experiments.store import Layout, Variable

    variables = dict(
        loss=Variable((5,), np.float32, np.nan, {}), diverged_at=Variable((), np.int32, -2, {})
    )
    values = {name: np.arange(size, dtype=float) for name, size in AXES.items()}
    coordinates: Any = {name: ((name,), at, {}) for name, at in values.items()}
    spec = dict(grid={name: at.tolist() for name, at in values.items()})
    layout = Layout(AXES, chunk_shape(AXES, CELLS), variables, coordinates, spec, {})
    loss = np.random.default_rng(0).random((*AXES.values(), 5), np.float32)
    known = dict(loss=loss, diverged_at=np.full(layout.shape, -1, np.int32))
    store = create(Folder(folder / "open.zarr"), layout, resume=False, known=known)
    wall, cpu = [], []
    for _ in range(TRIES):
        begun, used = time.perf_counter(), time.process_time()
        found = mf.load_sweep(folder / "open.zarr")
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    return dict(
        fault=f"opening {math.prod(AXES.values())} cells in {len(store.regions)} chunks",
        seconds_least=round(min(wall), 2),
        seconds_median=round(statistics.median(wall), 2),
        seconds_of_cpu=round(statistics.median(cpu), 2),
        load_average=round(os.getloadavg()[0], 1),
        holds=bool(np.array_equal(found.loss, loss)) and statistics.median(wall) < SECONDS,
    )


def fuzz(folder: Path, files: str, tests: str) -> dict[str, Any]:
    """Runs tests of tests/fuzz for a long time."""
    place = Path(__file__).parent.parent / "tests" / "fuzz"
    words = [sys.executable, "-m", "pytest", "-n0", "-s", "-q", str(place / files), "-k", tests]
    settings = os.environ | dict(MEANFIELD_JAX_FUZZ_SECONDS=str(FUZZ_SECONDS))
    done = subprocess.run(words, env=settings, capture_output=True, text=True, cwd=place.parent)
    lines = re.findall(r"(.+): (\d+) tried .*, peak memory (\d+) MiB", done.stdout)
    tried = {name.lstrip("."): int(count) for name, count, _ in lines}
    peak = max((int(megabytes) for *_, megabytes in lines), default=0)
    seeds = sorted(set(re.findall(r"fuzz: seed (\d+)", done.stdout)))
    return dict(
        fault=f"random {tests.replace(' or ', ', ').replace('_', ' ')}",
        tried=tried,
        wrong_seeds=seeds,
        peak_mib=peak,
        holds=done.returncode == 0 and 0 < peak * 2**20 < MOST_MEMORY,
    )


CHECKS: dict[str, list[Callable[[Path], dict[str, Any]]]] = dict(
    kills=[kills],
    births=[births],
    two=[lambda folder: two(folder, 0), lambda folder: two(folder, 1)],
    many=[many],
    truncated=[truncated],
    full=[full],
    read_only=[read_only],
    opening=[opening],
    fuzz=[
        lambda folder: fuzz(folder, "test_specs.py", "specifications or json or arguments"),
        lambda folder: fuzz(folder, "test_data_files.py", "damaged_files"),
    ],
)


def kept_rows(names: list[str]) -> list[dict[str, Any]]:
    """Rows of an earlier run, of the checks that are not run now."""
    path = RESULTS / "faults.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row.get("check") in set(CHECKS) - set(names)]


def main() -> int:
    """Does all that, writes JSON, prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS))
    names = parser.parse_args().only
    os.environ["JAX_PLATFORMS"] = "cpu"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(name) / "programs")
        for check in (name for name in CHECKS if name in names):
            for measure in CHECKS[check]:
                rows.append(dict(check=check, **measure(Path(name))))
                print(rows[-1], flush=True)
    done = [*kept_rows(names), *rows]
    write_rows("faults", sorted(done, key=lambda row: list(CHECKS).index(row["check"])))
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
