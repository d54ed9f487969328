"""``meanfield-jax sweep``."""

import contextlib
import dataclasses
import math
import os
import sys
import threading
from collections.abc import Generator
from typing import Annotated, Literal

import jax
import numpy as np
import tyro
from rich.console import Console

from meanfield_jax.cli.options import MOST, DataOptions, NetworkOptions
from meanfield_jax.cli.output import local_store
from meanfield_jax.cli.result import print_sweep
from meanfield_jax.cli.start import signals
from meanfield_jax.cli.tables import sweep_table
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.grid import AXES
from meanfield_jax.experiments.sweep import sweep

STARTING = 60.0
"""Seconds within which all processes of a job have to start, if patience is shorter."""

GRID = ("gamma=0.25,0.5,1,2,4", "learning_rate=1e-3:10:17", "seed=0,1,2")


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Train at every point of a grid, to find which rates and scales diverge and which are best."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder for the results (a Zarr group), which `meanfield-jax plot` draws."""
    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataOptions
    )
    grid: tuple[str, ...] = GRID
    """Axes of the grid, each as AXIS=VALUES, where VALUES is a list such as 1,2,3 or LOW:HIGH:COUNT
    for values in equal ratios. Axes: gamma, learning_rate, seed, momentum, batch_size, weight_var,
    depth, width."""
    num_test: int | None = None
    """Number of test samples, evaluated after each epoch; 0 for none [1000, or all there are]."""
    epochs: int = 5
    """Passes over the training samples."""
    loss: Literal["squared", "cross_entropy"] = "squared"
    """The training loss."""
    frozen_gamma: bool = False
    """Do not train scale and offset of the BatchNorms."""
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    """Precision of the products in training: float32, TF32 on NVIDIA GPUs (no effect on CPU), or
    factors in bfloat16."""
    resume: bool = False
    """Continue an existing store; finished runs are not computed again."""
    extend: bool = False
    """Continue an existing store, and let it grow where the grid has more values or axes, or if
    there are more epochs; runs that it has are not computed again."""
    chunk_cells: int | None = None
    """Runs that are computed and stored together [as many as fit, at most 16 per CPU, 1024 per
    GPU]."""
    distributed: bool = False
    """Divide the work among processes, which are found from the settings of SLURM, Open MPI or a
    TPU pod."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if --distributed cannot find it."""
    num_processes: int | None = None
    """Number of processes, with --coordinator."""
    process_id: int | None = None
    """Number of this process, counted from 0, with --coordinator."""
    patience: float = 60.0
    """Seconds without a new chunk, or another sign of life, after which other processes are
    considered dead."""
    watch: bool = False
    """Draw the results in the terminal as a heat map, renewed with every chunk."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Trains, stores the results and prints the table."""
        store, grid = local_store(self.store), parse_grid(self.grid)
        _use_all_cores()
        if self.distributed or self.coordinator is not None:
            self._connect()
        network = self.network.network(self.inputs.shape(self.network.net))
        test = None
        if self.num_test != 0:
            test = self.inputs.load_test(network, self.num_test, 1000)
        with _stdout_for_results():
            dataset = sweep(
                network,
                self.inputs.load(network),
                grid,
                store=store,
                resume=self.resume,
                test=test,
                extend=self.extend,
                epochs=self.epochs,
                loss=self.loss,
                train_gamma=not self.frozen_gamma,
                precision=self.precision,
                chunk_cells=self.chunk_cells,
                detach=True,
                patience=self.patience,
                progress=True,
                watch=self.watch,
            )
        if jax.process_index() > 0:
            return
        if self.json:
            print_sweep("sweep", dataset)
        elif "learning_rate" in dataset.dims:
            Console().print(sweep_table(dataset))
        diverged, cells = int((dataset.diverged_at >= 0).sum()), dataset.diverged_at.size
        print(f"{cells} runs, {diverged} diverged; wrote {store}", file=sys.stderr)

    def _connect(self) -> None:
        try:
            with _at_most(max(self.patience, STARTING)) as seconds:
                # after these JAX aborts the process with a trace, so they have to be longer
                long = math.ceil(10 * seconds)
                jax.config.update("jax_cpu_get_global_topology_timeout_minutes", 1 + long // 60)
                jax.distributed.initialize(
                    self.coordinator,
                    self.num_processes,
                    self.process_id,
                    initialization_timeout=long,
                    heartbeat_timeout_seconds=long,
                    shutdown_timeout_seconds=long,
                )
                jax.devices()
        except (RuntimeError, ValueError) as error:
            cause = " ".join(str(error).split())
            remedy = "start it under SLURM, Open MPI or on a TPU pod, or use --coordinator"
            raise problem(SpecError, "--distributed", self.coordinator, cause, remedy) from None
        signals.handle()  # JAX has taken SIGTERM over


@contextlib.contextmanager
def _at_most(seconds: float) -> Generator[float]:
    """Ends the process, with a line on stderr, if the other processes take longer to appear."""

    def give_up() -> None:
        said = f"another process did not start within {seconds:.0f} s, or was stopped"
        print(f"meanfield-jax: {said}; start all of them again", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.start()
    try:
        yield seconds
    finally:
        timer.cancel()


@contextlib.contextmanager
def _stdout_for_results() -> Generator[None]:
    """Redirects to stderr what native libraries print, such as Gloo about its connections."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def parse_grid(texts: tuple[str, ...]) -> dict[str, np.ndarray]:
    """``("gamma=0.5,1", "learning_rate=1e-3:1:4")`` as a grid; a single value is not an axis."""
    grid = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or name not in AXES or name in grid:
            cause = (
                "the axis is given twice" if name in grid else "it is not of the form AXIS=VALUES"
            )
            raise problem(SpecError, "--grid", text, cause, f"the axes are {', '.join(AXES)}")
        grid[name] = _values(text, values)
    return grid


def _values(text: str, values: str) -> np.ndarray:
    try:
        if ":" not in values:
            parts = values.split(",")
            numbers = np.array([float(part) for part in parts])
        else:
            low, high, count = values.split(":")
            low, high, count = float(low), float(high), int(count)
            if not (0 < low < math.inf and 0 < high < math.inf and 0 < count <= MOST):
                raise ValueError("not a range")
            numbers = np.geomspace(low, high, count)
    except ValueError:
        cause = "its values cannot be read"
        remedy = f"write a list such as 0.5,1,2, or LOW:HIGH:COUNT, positive, COUNT up to {MOST:,}"
        raise problem(SpecError, "--grid", text, cause, remedy) from None
    # floats hold larger integers only roughly
    if np.all(numbers == np.round(numbers)) and np.all(np.abs(numbers) < 2**53):
        numbers = numbers.astype(int)
    return numbers[0] if len(numbers) == 1 else numbers


def _use_all_cores() -> None:
    """Makes every core of a CPU a device, among which the sweep divides the runs of a chunk.

    Where JAX has started, or the number of devices is given in the environment, nothing changes.
    """
    given = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if given or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", _cores())


def _cores() -> int:
    """The cores that this process may use, which a job's scheduler may have limited."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
