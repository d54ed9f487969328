"""Phase diagrams of training: a grid of runs on any number of devices, saved in a store."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh

from meanfield_jax.arguments import checked
from meanfield_jax.checks import pair
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.progress import Progress
from meanfield_jax.experiments.store import Layout, Region, SweepStore, Variable, create, locked
from meanfield_jax.experiments.train import (
    Arrays,
    Cell,
    Optimizer,
    Recipe,
    Samples,
    Training,
    bytes_of_cell,
    check_cells,
    check_samples,
    recipe_of,
    run_cells,
)
from meanfield_jax.kernel.kernel import STATISTICS
from meanfield_jax.memory import memory_of
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze
from meanfield_jax.theory.learning_rate import stable_rate
from meanfield_jax.variants import with_depth, with_gamma, with_weight_var, with_width

if TYPE_CHECKING:
    import xarray as xr

AXES = {
    "batch_size": "samples per step",
    "depth": "hidden blocks",
    "width": "units or channels of every hidden layer",
    "gamma": "initial scale of every norm",
    "weight_var": "variance of a weight times the fan-in",
    "learning_rate": "learning rate",
    "momentum": "momentum of the heavy ball",
    "seed": "seed of the draw and of the order of the samples",
}
"""Axes that a grid may have, with a description of each."""

STRUCTURE = ("batch_size", "depth", "width")
"""Axes along which the computation is compiled again for every value."""

WHOLE = (*STRUCTURE, "seed")
"""Axes whose values are integers."""

DEFAULTS = dict(batch_size=100, learning_rate=0.1, momentum=0.9, seed=0)

THEORY_SAMPLES = 128
"""The most samples of the batch whose theory is stored beside the results."""

CELLS = dict(cpu=16)
"""The most cells of a chunk per device: little is lost when a small chunk is interrupted."""
CELLS_ELSEWHERE = 1024


@checked(data=pair)
def sweep(
    network: Network,
    data: Samples,
    grid: Mapping[str, Any],
    *,
    store: str | Path | None = None,
    resume: bool = False,
    test: Samples | None = None,
    epochs: int = 5,
    loss: str = "squared",
    optimizer: Optimizer | None = None,
    train_gamma: bool = True,
    devices: Sequence[Any] | None = None,
    chunk_cells: int | None = None,
    detach: bool = False,
    patience: float = 60.0,
    progress: bool = False,
) -> xr.Dataset:
    """Trains a network as :func:`train` does, at every point of a grid of any size.

    The grid is divided into chunks, each of which is one vmapped call sharded over the devices. A
    chunk counts as finished only after it has been written. If the process is killed at any moment
    and the sweep resumed, only what was running is computed again, with the same numbers.
    If ``jax.distributed.initialize()`` was called in every process of a job, the chunks are divided
    among the processes, which all need the same data and access to the same store.

    Args:
        network: The specification.
        data: Inputs (n, *input_shape) and integer labels (n,) or targets (n, C).
        grid: Axes by name, each a sequence of values, or a single number for all runs: gamma,
            weight_var (default: as specified), learning_rate (0.1), momentum (0.9), seed (0),
            batch_size (100), and depth, width (as specified). Each value of the last three is
            compiled separately.
        store: Folder of the results, a Zarr group; None: the results are kept in memory only.
        resume: Whether to continue an existing store, which must be that of the same sweep.
        test: Samples to be evaluated after each epoch.
        epochs: Passes over the data.
        loss: ``"squared"`` or ``"cross_entropy"``.
        optimizer: Maps a learning rate to any optax optimizer; the heavy ball by default.
        train_gamma: Whether scale and offset of the norms are trained.
        devices: JAX devices to compute on; all local ones by default.
        chunk_cells: Runs per chunk; by default as many as memory allows, at most 16 per device on
            CPU and 1024 elsewhere.
        detach: Whether to leave the distributed runtime (``jax.distributed.shutdown()``) once the
            work has been divided, so that a process that dies does not end the others.
        patience: Seconds without a new chunk (and at least five times as long as the slowest chunk
            took here) after which other processes are considered dead.
        progress: Whether to show progress, rate and time left on stderr.

    Returns:
        A data set over the grid's axes: ``loss``, ``test_loss``, ``test_accuracy`` (also over
        ``epoch``; NaN from the epoch of divergence on), ``diverged_at`` (a step; -1: converged,
        -2: not computed yet), and, over the axes on which they depend, the predicted
        ``eta_max_batch``, ``eta_max_frozen``, ``eta_max_wei2019`` of one training batch (at most
        its first 128 samples). Its attributes are the specification as JSON, versions and machine.

    Raises:
        SpecError, DataError: if an option or the data are not valid, or if the store belongs to
            another sweep.
        OSError: if the store cannot be written.

    Example:
        >>> import meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> grid = dict(gamma=[0.5, 1.0], learning_rate=[0.01, 0.1, 1.0, 10.0], seed=range(2))
        >>> result = mf.sweep(net, (x, labels), grid, epochs=1)
        >>> dict(result.diverged_at.sizes)
        {'gamma': 2, 'learning_rate': 4, 'seed': 2}
    """
    if isinstance(optimizer, optax.GradientTransformation):
        cause = "it has its own learning rate, but a sweep sets the learning rate"
        remedy = "pass a function of the learning rate, such as optax.adam"
        raise problem(SpecError, "optimizer", type(optimizer).__name__, cause, remedy)
    axes, fixed = _split(grid)
    devices = list(devices or jax.local_devices())
    recipes = {
        _key(at): recipe_of(
            _restructured(network, at), epochs, int(at["batch_size"]), loss, optimizer, train_gamma
        )
        for at in _structures(axes, fixed)
    }
    largest = max(recipes.values(), key=lambda recipe: recipe.batch_size)
    samples, test_samples = check_samples(largest, data, test)
    check_cells(network, {name: jnp.asarray(v) for name, v in (axes | fixed).items()})
    if chunk_cells is not None and chunk_cells < 1:
        remedy = "pass a positive integer"
        raise problem(SpecError, "chunk_cells", chunk_cells, "must be at least 1", remedy)
    cells = chunk_cells or _cells_in_memory(recipes.values(), devices)
    spec = dict(
        network=json.loads(network.to_json()),
        grid={name: values.tolist() for name, values in axes.items()},
        fixed={name: value.item() for name, value in fixed.items()},
        epochs=epochs,
        loss=loss,
        optimizer=_name_of(optimizer),
        train_gamma=train_gamma,
        data=_fingerprint(samples),
        test=None if test_samples is None else _fingerprint(test_samples),
    )
    variables = _variables(epochs, loss, test is not None)
    sizes = {name: len(values) for name, values in axes.items()}
    coordinates = _coordinates(axes, fixed, epochs)
    layout = Layout(sizes, _chunk(sizes, cells), variables, coordinates, spec, _facts(devices))
    first = jax.process_index() == 0
    opened = create(store, layout, resume=resume) if first else None
    if opened is not None:
        _predict(opened, recipes, axes, fixed, samples[0])
    _meet("the store is made")
    opened = opened or create(store, layout, resume=True)
    pending = opened.pending()
    _meet("the work is shared")
    if detach and jax.process_count() > 1:
        jax.distributed.shutdown()
    share = pending[jax.process_index() :: jax.process_count()]
    run = _Share(opened, recipes, axes, fixed, samples, test_samples, devices, share)
    with locked(store if first else None):
        run.compute(patience, progress)
    return opened.dataset()


@dataclasses.dataclass(frozen=True)
class _Share:
    """The work of one process.

    Attributes:
        store: Where the results are written.
        recipes: What to run, by the values of the axes in ``STRUCTURE``.
        axes: Values of the grid's axes.
        fixed: Numbers that are the same for all cells.
        data: Training samples.
        test: Test samples.
        devices: The devices to compute on.
        numbers: The chunks to compute in this process.
    """

    store: SweepStore
    recipes: dict[tuple, Recipe]
    axes: dict[str, np.ndarray]
    fixed: dict[str, np.ndarray]
    data: Arrays
    test: Arrays | None
    devices: list[Any]
    numbers: list[int]

    def compute(self, patience: float, progress: bool) -> None:
        """Computes and writes the chunks, then waits for those of other processes."""
        mesh = jax.make_mesh(
            (len(self.devices),), ("cell",), (AxisType.Auto,), devices=self.devices
        )
        cells = [math.prod(_sizes(region)) for region in self.store.regions]
        longest = 0.0
        with Progress(sum(cells[number] for number in self.numbers), sum(cells), progress) as shown:
            for number in self.numbers:
                start = time.monotonic()
                self.store.write(number, self._results(self.store.regions[number], mesh))
                longest = max(longest, time.monotonic() - start)
                shown.advance(cells[number])
        if jax.process_count() > 1:
            self._wait(max(patience, 5 * longest))

    def _results(self, region: Region, mesh: Mesh) -> dict[str, np.ndarray]:
        """The results of a chunk, in the shape of its region."""
        axes = {
            name: values[part]
            for (name, values), part in zip(self.axes.items(), region, strict=True)
        }
        shape = _sizes(region)
        points = dict(zip(axes, np.meshgrid(*axes.values(), indexing="ij"), strict=True))
        numbers = self.fixed | {name: values.ravel() for name, values in points.items()}
        # every chunk is padded to the size of the largest, so that all use the same program
        whole = math.prod(self.store.layout.chunk)
        whole += -whole % mesh.size
        count = math.prod(shape)
        rows = np.minimum(np.arange(whole), count - 1)
        cells = Cell(
            **{
                name: jnp.asarray(np.broadcast_to(values, count)[rows])
                for name, values in numbers.items()
                if name not in STRUCTURE
            }
        )
        recipe = self.recipes[_key({name: np.ravel(v)[0] for name, v in numbers.items()})]
        result: Training = run_cells(recipe, cells, self.data, self.test, mesh)
        return {
            name: np.asarray(getattr(result, name))[:count].reshape(*shape, *variable.shape)
            for name, variable in self.store.layout.variables.items()
        }

    def _wait(self, patience: float) -> None:
        """Waits for the chunks of other processes; raises RuntimeError if they stop coming."""
        total = len(self.store.regions)
        finished, since = self.store.num_finished, time.monotonic()
        while finished < total:
            time.sleep(min(1.0, patience / 10))
            if (now := self.store.num_finished) > finished:
                finished, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise RuntimeError(
                    f"store={self.store.name!r}: another process seems to have died, as it wrote "
                    f"no chunk for {patience:.0f} s (process {jax.process_index()} of "
                    f"{jax.process_count()} has written all of its own); {finished} of {total} "
                    "chunks are kept, resume the sweep to compute the rest"
                )


def _split(grid: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The axes, and the numbers that are the same for all cells."""
    axes, fixed = {}, {name: np.asarray(value) for name, value in DEFAULTS.items()}
    for name, given in grid.items():
        if name not in AXES:
            raise problem(SpecError, "grid", name, "unknown axis", f"use {', '.join(AXES)}")
        values = np.asarray(list(given) if isinstance(given, range) else given)
        if name in WHOLE and values.dtype.kind not in "iu":
            remedy = "pass integers"
            raise problem(SpecError, f"grid[{name!r}]", values.tolist(), "must be integers", remedy)
        if values.dtype.kind not in "iuf" or values.ndim > 1 or values.size == 0:
            cause, remedy = "must be numbers", "pass a number or a non-empty sequence of numbers"
            raise problem(SpecError, f"grid[{name!r}]", given, cause, remedy)
        if len(np.unique(values)) < values.size:
            remedy = "pass each value once"
            raise problem(SpecError, f"grid[{name!r}]", values.tolist(), "values repeat", remedy)
        if name not in WHOLE:
            values = values.astype(np.float64)
        if values.ndim == 1:
            axes[name] = values
            fixed.pop(name, None)
        else:
            fixed[name] = values
    if not axes:
        remedy = "pass a sequence of values for at least one axis"
        raise problem(SpecError, "grid", dict(grid), "it has no axis", remedy)
    return axes, fixed


def _structures(axes: dict, fixed: dict) -> Iterator[dict[str, Any]]:
    """Yields every combination of the values that need separate compilation."""
    choices = {
        name: np.atleast_1d((axes | fixed)[name]) for name in STRUCTURE if name in axes | fixed
    }
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


def _key(numbers: Mapping[str, Any]) -> tuple:
    return tuple(int(numbers[name]) for name in STRUCTURE if name in numbers)


def _restructured(network: Network, structure: dict[str, Any]) -> Network:
    if "depth" in structure:
        network = with_depth(network, int(structure["depth"]))
    if "width" in structure:
        network = with_width(network, int(structure["width"]))
    return network


def _variables(epochs: int, loss: str, tested: bool) -> dict[str, Variable]:
    unit = "nat" if loss == "cross_entropy" else "1"
    curves = dict(loss=("training loss", unit))
    if tested:
        curves |= dict(
            test_loss=("test loss", unit),
            test_accuracy=("test accuracy", "1"),
        )
    variables = {
        name: Variable((epochs,), np.float32, np.nan, dict(long_name=text, units=unit))
        for name, (text, unit) in curves.items()
    }
    said = "step at which training diverged; -1: it did not; -2: not computed"
    at = Variable((), np.int32, -2, dict(long_name=said, units="step"))
    return variables | dict(diverged_at=at)


def _coordinates(axes: dict, fixed: dict, epochs: int) -> dict[str, Any]:
    coordinates = {
        name: ((name,) if name in axes else (), values, dict(long_name=AXES[name], units="1"))
        for name, values in (axes | fixed).items()
    }
    return coordinates | dict(epoch=(("epoch",), np.arange(1, epochs + 1), {}))


def _chunk(axes: dict[str, int], cells: int) -> tuple[int, ...]:
    """The extent of a chunk along each axis: whole last axes, then equal parts of one axis."""
    sizes = []
    for name, size in reversed(axes.items()):
        most = 1 if name in STRUCTURE else min(size, max(cells, 1))
        sizes.append(math.ceil(size / math.ceil(size / most)))
        cells //= sizes[-1]
    return tuple(reversed(sizes))


def _sizes(region: Region) -> tuple[int, ...]:
    return tuple(part.stop - part.start for part in region)


def _cells_in_memory(recipes: Any, devices: list[Any]) -> int:
    """Cells per chunk that fit into half of the devices' memory, or a quarter of a CPU's."""
    platform = devices[0].platform
    memory = memory_of(devices) / len(devices) / (4 if platform == "cpu" else 2)
    each = max(bytes_of_cell(recipe) for recipe in recipes)
    most = CELLS.get(platform, CELLS_ELSEWHERE)
    return max(1, int(min(most, memory / each))) * len(devices)


def _predict(store: SweepStore, recipes, axes, fixed, x: Array) -> None:
    """Stores the boundaries predicted for a batch of the data beside the results."""
    names = [name for name in axes if name not in ("learning_rate", "seed")]
    numbers = {name: axes[name] for name in names}
    momentum = numbers.pop("momentum", fixed["momentum"])
    for statistics in STATISTICS:
        name = f"eta_max_{statistics}"
        if store.has(name):
            continue
        # momentum last, because the theory is the same for all its values
        others = [key for key in names if key != "momentum"]
        values = [
            _boundary(
                recipes, fixed | dict(zip(others, point, strict=True)), x, statistics, momentum
            )
            for point in itertools.product(*numbers.values())
        ]
        shape = tuple(len(numbers[key]) for key in others)
        table = np.asarray(values, np.float64).reshape((*shape, *np.shape(momentum)))
        if "momentum" in names:
            table = np.moveaxis(table, -1, names.index("momentum"))
        said = f"largest stable learning rate by theory, statistics={statistics!r}"
        store.add(name, tuple(names), table, dict(long_name=said, units="1"))


def _boundary(recipes, numbers: dict[str, Any], x: Array, statistics: str, momentum) -> np.ndarray:
    recipe = recipes[_key(numbers)]
    network = recipe.network
    if "gamma" in numbers:
        network = with_gamma(network, float(numbers["gamma"]))
    if "weight_var" in numbers:
        network = with_weight_var(network, float(numbers["weight_var"]))
    batch = x[: min(recipe.batch_size, THEORY_SAMPLES)]
    likelihood = "categorical" if recipe.loss == "cross_entropy" else "gaussian"
    theory = analyze(network, data=batch, statistics=statistics, likelihood=likelihood, throw=False)
    return np.asarray(stable_rate(theory.fisher.lambda_max, momentum))


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(where)


def _name_of(optimizer: Optimizer | None) -> str:
    if optimizer is None:
        return "heavy ball"
    module, name = (getattr(optimizer, key, "") for key in ("__module__", "__qualname__"))
    return f"{module}.{name}" if name else repr(optimizer)


def _fingerprint(samples: Arrays) -> dict[str, Any]:
    digest = hashlib.sha256()
    for array in samples:
        digest.update(np.ascontiguousarray(array).tobytes())
    x = samples[0]
    return dict(shape=list(x.shape), dtype=str(x.dtype), sha256=digest.hexdigest()[:16])


def _facts(devices: list[Any]) -> dict[str, Any]:
    packages = ("meanfield_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    device = f"{len(devices)} x {devices[0].device_kind}, {jax.process_count()} processes"
    return dict(versions=json.dumps(versions), devices=device)
