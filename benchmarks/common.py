"""What the benchmarks share: workers, paired timing, claims, and the record of a run.

Every peer runs in a process of its own, so that its peak memory is its own and its first call is
cold. The processes stay alive and take turns, so that all peers see the same machine at the same
time: a slow minute of the machine hits both sides of a ratio.

This module and the scripts import nothing heavy: a worker imports its peer's libraries itself.
"""

import dataclasses
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "scipy",
    "matfree",
    "torch",
    "curvlinops-for-pytorch",
    "pyhessian",
    "hessian-eigenthings",
    "laplax",
)
console = Console(width=150)


class PeerError(RuntimeError):
    """A peer raised; the message is its own."""


class PeerTimeout(PeerError):
    """A peer gave no answer in the time allowed."""


class Worker:
    """A process that sets up one peer and runs it when asked.

    Args:
        setup: ``"module:function"``; the function returns the callable to be timed.
        arguments: Keyword arguments of that function; they must pickle.
    """

    def __init__(self, setup: str, arguments: dict[str, Any]):
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, setup, arguments), daemon=True)
        self._process.start()
        theirs.close()

    def prepare(self, timeout: float = 300.0) -> None:
        """Imports the libraries, builds the model, and waits until that is done."""
        self._ask("prepare", timeout)

    def run(self, timeout: float = 300.0) -> dict[str, Any]:
        """One timed call: ``seconds`` and whatever the peer returned, a dictionary."""
        return self._ask("run", timeout)

    def peak_megabytes(self) -> float:
        """The largest resident memory of the process so far, imports included."""
        return self._ask("memory", 60.0)["megabytes"]

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _ask(self, command: str, timeout: float) -> dict[str, Any]:
        try:
            self._connection.send(command)
            if not self._connection.poll(timeout):
                self.close()
                raise PeerTimeout(f"no answer in {timeout:.0f} s")
            reply = self._connection.recv()
        except (EOFError, BrokenPipeError, OSError) as error:
            raise PeerError("the process ended") from error
        if "error" in reply:
            raise PeerError(reply["error"])
        return reply


def _serve(connection: Any, setup: str, arguments: dict[str, Any]) -> None:
    """The worker's side: answers until the other end closes the pipe."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the life of the process
    call: Callable[[], dict[str, Any]] | None = None
    while True:
        try:
            command = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        try:
            if command == "prepare":
                module, function = setup.split(":")
                call = getattr(importlib.import_module(module), function)(**arguments)
                reply = {}
            elif command == "memory":
                reply = dict(megabytes=_peak_megabytes())
            else:
                start = time.perf_counter()
                result = call()
                reply = dict(result, seconds=time.perf_counter() - start)
        except Exception as error:
            reply = dict(error=f"{type(error).__name__}: {error}".split("\n")[0][:80])
        connection.send(reply)


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


@contextmanager
def worker(setup: str, arguments: dict[str, Any]) -> Iterator[Worker]:
    """A prepared worker that ends with the block."""
    process = Worker(setup, arguments)
    try:
        process.prepare()
        yield process
    finally:
        process.close()


@dataclasses.dataclass
class Peer:
    """One way to compute the quantity, and what was measured of it.

    Attributes:
        name: As printed.
        setup: ``"module:function"`` for :class:`Worker`.
        options: Keyword arguments of the setup function, beside those of the case.
        rounds: At most so many warm calls; slow peers need not repeat.
        colds: So many fresh processes.
        timeout: Seconds after which a call counts as "no answer".
        cold: Seconds of the first call in a fresh process, one for each process.
        warm: Seconds of later calls.
        warm_ratios: This peer's seconds over the package's, each pair measured side by side.
        cold_ratios: The same of first calls.
        result: What the last call returned.
        megabytes: Peak memory.
        failure: Why there is no answer.
    """

    name: str
    setup: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds: int = 99
    colds: int = 1
    timeout: float = 120.0
    cold: list[float] = dataclasses.field(default_factory=list)
    warm: list[float] = dataclasses.field(default_factory=list)
    warm_ratios: list[float] = dataclasses.field(default_factory=list)
    cold_ratios: list[float] = dataclasses.field(default_factory=list)
    result: dict[str, Any] = dataclasses.field(default_factory=dict)
    megabytes: float | None = None
    failure: str | None = None

    def record(self) -> dict[str, Any]:
        """For the JSON file: medians first, then every single measurement."""
        return dict(
            name=self.name,
            failure=self.failure,
            warm_ratio=median(self.warm_ratios),
            cold_ratio=median(self.cold_ratios),
            megabytes=self.megabytes,
            warm_seconds=median(self.warm),
            cold_seconds=median(self.cold),
            **{key: value for key, value in self.result.items() if key != "seconds"},
            all_warm_seconds=self.warm,
            all_cold_seconds=self.cold,
            all_warm_ratios=self.warm_ratios,
            all_cold_ratios=self.cold_ratios,
        )


def median(values: Sequence[float]) -> float | None:
    """The median, or None where nothing was measured."""
    return statistics.median(values) if values else None


def compare(peers: Sequence[Peer], arguments: dict[str, Any], rounds: int) -> None:
    """Measures all peers in turn; the first is the package, the others are divided by it.

    Args:
        peers: The package first. Their lists are filled in place. Of a peer's fresh processes the
            last one stays for the warm calls.
        arguments: Of the case, for every setup function.
        rounds: Timed warm calls of each peer, each beside one of the package's.
    """
    workers: dict[str, Worker] = {}
    try:
        for cold in range(max(peer.colds for peer in peers)):
            for peer in peers:
                if cold < peer.colds and not peer.failure:
                    _close(workers.pop(peer.name, None))
                    _first_call(peer, arguments, workers)
            _pair_colds(peers, cold)
        for index in range(rounds):
            for peer in peers[1:]:
                if index < peer.rounds and not peer.failure:
                    _pair(peers[0], peer, workers, ours_first=index % 2 == 0)
        for peer in peers:
            if peer.name in workers and not peer.failure:
                peer.megabytes = workers[peer.name].peak_megabytes()
    finally:
        for process in workers.values():
            process.close()


def _first_call(peer: Peer, arguments: dict[str, Any], workers: dict[str, Worker]) -> None:
    """A fresh process and its first call, which includes compilation."""
    process = Worker(peer.setup, {**arguments, **peer.options})
    workers[peer.name] = process
    try:
        process.prepare()
        peer.result = process.run(peer.timeout)
        peer.cold.append(peer.result["seconds"])
        console.print(f"  cold  {peer.name:45s} {peer.cold[-1]:8.2f} s", highlight=False)
    except PeerError as error:
        peer.failure = str(error)
        console.print(f"  cold  {peer.name:45s} {error}", highlight=False, markup=False)


def _pair_colds(peers: Sequence[Peer], cold: int) -> None:
    for peer in peers[1:]:
        if len(peer.cold) > cold and len(peers[0].cold) > cold:
            peer.cold_ratios.append(peer.cold[cold] / peers[0].cold[cold])


def _pair(ours: Peer, peer: Peer, workers: dict[str, Worker], *, ours_first: bool) -> None:
    """One warm call of each, side by side; the order alternates between rounds."""
    order = (ours, peer) if ours_first else (peer, ours)
    seconds = {}
    try:
        for one in order:
            seconds[one.name] = workers[one.name].run(one.timeout)["seconds"]
    except PeerError as error:
        peer.failure = str(error)
        return
    for one in order:
        one.warm.append(seconds[one.name])
    peer.warm_ratios.append(seconds[peer.name] / seconds[ours.name])


def _close(process: Worker | None) -> None:
    if process is not None:
        process.close()


@dataclasses.dataclass(frozen=True)
class Claim:
    """A statement about a run that is true or false.

    Attributes:
        text: What is claimed.
        value: What was measured; None where there was no answer.
        bound: The number it is compared with.
        at_least: Whether the bound is a lower one.
    """

    text: str
    value: float | None
    bound: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        """Whether it is true of this run."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def record(self) -> dict[str, Any]:
        """For the JSON file."""
        return dict(dataclasses.asdict(self), holds=self.holds)


def write_rows(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Writes results/NAME.json: where it ran, the facts, the rows."""
    RESULTS.mkdir(exist_ok=True)
    record = dict(environment=environment(), **facts, rows=rows)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def conclude(claims: Sequence[dict[str, Any]]) -> int:
    """Prints what holds and what does not; the exit status."""
    for claim in claims:
        print("holds" if claim["holds"] else "FALSE", claim["text"], claim["numbers"], sep=" | ")
    return int(not all(claim["holds"] for claim in claims))


def small_images(data_dir: str | None, split: str, count: int) -> tuple[Any, Any]:
    """CIFAR-10 images of 16 x 16, of standard deviation 1, and labels."""
    import jax.numpy as jnp
    import numpy as np

    import meanfield_jax as mf

    x, labels = mf.data.load("cifar10", split=split, num_samples=count, data_dir=data_dir)
    small = np.asarray(x).reshape(len(x), 16, 2, 16, 2, 3).mean((2, 4))
    return jnp.asarray(small / small.std()), jnp.asarray(labels)


def trained_at(
    network: Any, data: Any, test: Any, rates: Any, seeds: int, **options: Any
) -> tuple[int, Any, Any]:
    """Trains at every rate with every seed, by cross-entropy; what diverged counts as chance.

    Returns:
        Which rate has the lowest training loss, so that test samples have no say; the training
        losses, (rates,), inf where a seed diverged; the test accuracies, (rates, seeds).
    """
    import numpy as np

    import meanfield_jax as mf

    runs = mf.train(
        network,
        data,
        test=test,
        learning_rate=np.asarray(rates)[:, None],
        seed=np.arange(seeds),
        loss="cross_entropy",
        **options,
    )
    losses = np.nan_to_num(np.asarray(runs.loss[..., -1]), nan=np.inf).mean(-1)
    accuracy = np.nan_to_num(np.asarray(runs.test_accuracy[..., -1]), nan=0.1)
    return int(losses.argmin()), losses, accuracy


def environment() -> dict[str, Any]:
    """The machine and the versions that a number needs beside it."""
    return dict(
        cpu=_cpu_model(),
        cores=os.cpu_count(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        system=platform.system(),
        python=platform.python_version(),
        load_average=[round(load, 2) for load in os.getloadavg()],
        versions={package: _version(package) for package in PACKAGES},
    )


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
