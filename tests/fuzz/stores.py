"""A store that needs no training, and ways to damage it; the numbers follow from the seeds."""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from meanfield_jax.experiments.birth import create
from meanfield_jax.experiments.files import Folder, locked
from meanfield_jax.experiments.store import Layout, SweepStore, Variable

GRID = dict(gamma=[0.5, 1.0, 2.0], learning_rate=[0.1, 0.2, 0.4, 0.8], seed=[0, 1])
SPEC = dict(network=dict(format="x"), grid=GRID, fixed=dict(momentum=0.9), epochs=2, loss="squared")


def layout() -> Layout:
    coordinates = {
        name: ((name,), np.array(values), dict(units="1")) for name, values in GRID.items()
    }
    coordinates |= dict(epoch=(("epoch",), np.arange(1, 3), {}), momentum=((), np.array(0.9), {}))
    variables = dict(
        loss=Variable((2,), np.float32, np.nan, dict(units="1")),
        diverged_at=Variable((), np.int32, -2, dict(units="step")),
    )
    axes = {name: len(values) for name, values in GRID.items()}
    return Layout(axes, (2, 2, 2), variables, coordinates, SPEC, dict(devices="none"))


def predict():
    return dict(eta_max_batch=(("gamma",), np.array([3.0, 2.0, np.inf]), dict(units="1")))


def results(store: SweepStore, number: int) -> dict[str, np.ndarray]:
    """What the training of a chunk might give."""
    rng = np.random.default_rng(number)
    shape = tuple(part.stop - part.start for part in store.regions[number])
    loss = rng.normal(size=(*shape, 2)).astype(np.float32)
    at = rng.integers(-1, 3, shape).astype(np.int32)
    return dict(loss=np.where((at >= 0)[..., None], np.float32(np.nan), loss), diverged_at=at)


def finish(path: Path, resume: bool = True) -> SweepStore:
    """What a sweep does: it makes or continues the store, and writes what is missing."""
    files = Folder(path)
    with locked(files):
        store = create(files, layout(), resume=resume, predict=predict)
        for number in store.pending():
            store.write(number, results(store, number))
    return store


def content(path: Path) -> dict[str, bytes]:
    """All files of a store."""
    found = (file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def _flip(path: Path, files: list[Path], draw: random.Random) -> None:
    file = draw.choice([file for file in files if file.stat().st_size])
    data = bytearray(file.read_bytes())
    for _ in range(draw.randint(1, 3)):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def _cut(path: Path, files: list[Path], draw: random.Random) -> None:
    file = draw.choice(files)
    file.write_bytes(file.read_bytes()[: draw.randrange(max(1, file.stat().st_size))])


def _empty(path: Path, files: list[Path], draw: random.Random) -> None:
    draw.choice(files).write_bytes(b"")


def _zeros(path: Path, files: list[Path], draw: random.Random) -> None:
    file = draw.choice(files)
    file.write_bytes(bytes(file.stat().st_size))


def _delete(path: Path, files: list[Path], draw: random.Random) -> None:
    draw.choice(files).unlink()


def _longer(path: Path, files: list[Path], draw: random.Random) -> None:
    with draw.choice(files).open("ab") as file:
        file.write(draw.randbytes(draw.randint(1, 50)))


def _noise(path: Path, files: list[Path], draw: random.Random) -> None:
    draw.choice(files).write_bytes(draw.randbytes(draw.randint(0, 300)))


def _swap(path: Path, files: list[Path], draw: random.Random) -> None:
    a, b = draw.sample(files, 2)
    contents = a.read_bytes(), b.read_bytes()
    a.write_bytes(contents[1])
    b.write_bytes(contents[0])


def _swap_chunks(path: Path, files: list[Path], draw: random.Random) -> None:
    """Two whole chunks of one shape, with their digests."""
    pairs = [("loss/c/0/0/0/0", "loss/c/0/1/0/0"), ("diverged_at/c/0/0/0", "diverged_at/c/0/1/0")]
    for a, b in (*pairs, ("digest/c/0", "digest/c/1")):
        if not {path / a, path / b} <= set(files):
            raise FileNotFoundError
        _swap(path, [path / a, path / b], draw)


def _document(path: Path, files: list[Path], draw: random.Random) -> None:
    """Metadata that is JSON, but says something else."""
    file = draw.choice([file for file in files if file.name == "zarr.json"])
    document = json.loads(file.read_text())
    holder = document
    while isinstance(holder.get("attributes"), dict) and draw.random() < 0.5:
        holder = holder["attributes"]
    odd = (None, [], {}, "", "|O", -1, 10**30, math.nan, [[]], [10**9] * 3, True)
    if draw.random() < 0.3:
        del holder[draw.choice(list(holder))]
    else:
        holder[draw.choice([*holder, "consolidated_metadata"])] = draw.choice(odd)
    file.write_text(json.dumps(document))


def _link(path: Path, files: list[Path], draw: random.Random) -> None:
    """A file in whose place there is something else."""
    file = draw.choice(files)
    file.unlink()
    kind = draw.randrange(3)
    if kind == 0:
        file.symlink_to(file)
    elif kind == 1:
        file.symlink_to("/dev/zero")
    else:
        os.mkfifo(file)


DAMAGES: tuple[Callable[[Path, list[Path], random.Random], None], ...] = (
    *(_flip, _flip, _flip, _cut, _empty, _zeros, _delete, _longer, _noise),
    *(_swap, _swap_chunks, _document, _link),
)


def damage(path: Path, seed: int) -> str:
    """Damages a store once, or several times; returns how."""
    draw = random.Random(seed)
    names = []
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        kind = draw.choice(DAMAGES)
        try:
            kind(path, [file for file in files if not file.is_symlink()], draw)
        except (OSError, ValueError, KeyError, IndexError, AttributeError):
            continue  # an earlier damage left nothing for this one
        names.append(kind.__name__)
    return f"seed {seed}: {', '.join(names)}"


if __name__ == "__main__":
    # a child makes a store whenever it is told a path, until it is killed
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("ready", flush=True)
    for line in sys.stdin:
        if os.fork() == 0:
            target, pause = line.split()
            print(os.getpid(), flush=True)
            files = Folder(Path(target))
            with locked(files):
                made = create(files, layout(), resume=True, predict=predict)
                for chunk in made.pending():
                    time.sleep(float(pause))
                    made.write(chunk, results(made, chunk))
            os._exit(0)
