"""What happens to a sweep when processes are killed, files damaged and disks full.

Really done, to the command ``meanfield-jax sweep`` on scikit-learn's digits (96 chunks):

* ``kill -9`` at 20 random moments, resumed each time: the store is bit by bit that of a sweep
  which nobody touched;
* two processes with ``jax.distributed`` over 127.0.0.1, first the one, then the other killed: the
  survivor does its share, says in one line that the other seems dead, and the store resumes;
* a chunk truncated: it is found and computed again;
* a disk that is full, and one that is read-only (a small tmpfs): one clear line, the store stays
  readable, and resumes once it can be written.

Run as root, who may mount a tmpfs: ``python faults.py``. The exit status is 1 when one of these is
false. About five minutes.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import write_rows

import meanfield_jax as mf

COMMAND = (
    *("--data", "digits", "--widths", "256", "256", "--num-samples", "1000", "--num-test", "100"),
    *("--epochs", "5", "--chunk-cells", "1", "--grid", "gamma=0.5,1,2"),
    *("learning_rate=1e-2:100:16", "seed=0,1", "batch_size=50"),
)
KILLS = 20


def start(store: Path, *options: str) -> subprocess.Popen:
    """The command as a process of its own."""
    command = [sys.executable, "-m", "meanfield_jax", "sweep", str(store), *COMMAND, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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


def killed(folder: Path, whole: Path) -> dict[str, Any]:
    """Kills while a process starts, or some chunks after it found the store, and a bit later."""
    store, moments = folder / "killed.zarr", random.Random(0)
    seen = [0]
    for kill in range(KILLS):
        process = start(store, *(["--resume"] if (store / "zarr.json").exists() else []))
        if kill % 5 == 0:
            time.sleep(moments.uniform(0, 4))
        else:
            wanted = seen[-1] + moments.randint(0, 5)
            while finished(store) < wanted and process.poll() is None:
                time.sleep(0.005)
            time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        finish(process)
        seen.append(finished(store) if store.exists() else 0)
    status, _ = finish(start(store, "--resume"))
    text = f"kill -9 at {KILLS} random moments"
    return dict(fault=text, chunks_after=seen[1:], holds=status == 0 and same(store, whole))


def two_processes(folder: Path, whole: Path, victim: int) -> dict[str, Any]:
    """Kills one of two processes in the middle of its share."""
    store = folder / f"two-{victim}.zarr"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--coordinator", address, "--num-processes", "2", "--patience", "5")
    processes = [start(store, *options, "--process-id", str(number)) for number in range(2)]
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


def truncated(folder: Path, whole: Path) -> dict[str, Any]:
    """Cuts a file of results in half."""
    store = folder / "truncated.zarr"
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


def full_disk(folder: Path, whole: Path) -> dict[str, Any]:
    """Runs on a tmpfs that is too small, then makes it larger."""
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


def read_only(folder: Path, whole: Path) -> dict[str, Any]:
    """Resumes an unfinished sweep on a disk that may not be written, then may."""
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


def main() -> int:
    """Does all that, writes JSON, prints a line for each."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = folder / "whole.zarr"
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        status, said = finish(start(whole))
        if status:
            print(said, file=sys.stderr)
            return 1
        rows = []
        for check in (
            lambda: killed(folder, whole),
            lambda: two_processes(folder, whole, 0),
            lambda: two_processes(folder, whole, 1),
            lambda: truncated(folder, whole),
            lambda: full_disk(folder, whole),
            lambda: read_only(folder, whole),
        ):
            rows.append(check())
            print(rows[-1], flush=True)
    write_rows("faults", rows)
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
