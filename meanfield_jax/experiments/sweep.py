"""Phase diagrams of training: a grid of runs on any number of devices, saved in a store.

One file, because it is the one place where grid, job, store and training come together; each of
them has a file of its own.
"""

from __future__ import annotations

import contextlib
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
from jax.sharding import AxisType, Mesh

from meanfield_jax.arguments import checked
from meanfield_jax.checks import pair
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.birth import create
from meanfield_jax.experiments.files import files_at, locked
from meanfield_jax.experiments.grid import (
    STRUCTURE,
    cells_in_memory,
    chunk_shape,
    coordinates_of,
    restructured,
    shape_of,
    split_grid,
    structure_key,
    structures,
)
from meanfield_jax.experiments.grow import exchange, grown, known_cells, store_to_extend
from meanfield_jax.experiments.job import Job
from meanfield_jax.experiments.progress import Progress
from meanfield_jax.experiments.store import Layout, Named, SweepStore, Variable, open_store
from meanfield_jax.experiments.train import (
    Arrays,
    Cell,
    Optimizer,
    Recipe,
    Samples,
    Training,
    check_cells,
    check_samples,
    recipe_of,
    run_cells,
)
from meanfield_jax.experiments.watch import picture_of
from meanfield_jax.kernel.kernel import STATISTICS
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze, least_samples
from meanfield_jax.theory.learning_rate import stable_rate
from meanfield_jax.theory.memory_plan import room
from meanfield_jax.variants import has_norm, with_gamma, with_weight_var

if TYPE_CHECKING:
    import xarray as xr

THEORY_SAMPLES = 128
"""The most samples of the batch whose theory is stored beside the results."""

THEORY_ROOM = 0.1
"""Fraction of the memory for this theory; of maps that need more, positions are sampled."""


@checked(data=pair)
def sweep(
    network: Network,
    data: Samples,
    grid: Mapping[str, Any],
    *,
    store: str | Path | None = None,
    resume: bool = False,
    extend: bool = False,
    test: Samples | None = None,
    epochs: int = 5,
    loss: str = "squared",
    optimizer: Optimizer | None = None,
    train_gamma: bool = True,
    precision: str = "float32",
    devices: Sequence[Any] | None = None,
    chunk_cells: int | None = None,
    detach: bool = False,
    patience: float = 60.0,
    progress: bool = False,
    watch: bool = False,
) -> xr.Dataset:
    """Trains a network as :func:`train` does, at every point of a grid of any size.

    The grid is divided into chunks, each of which is one call, sharded over the devices. A
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
        extend: Whether an existing store may also grow, by values of its axes, by axes that had a
            single number, or by epochs. Its cells are kept, and only the others are trained; with
            more epochs, all that did not diverge are trained again. Until this is complete the old
            store stays as it is; repeat the call if it was interrupted.
        test: Samples to be evaluated after each epoch.
        epochs: Passes over the data.
        loss: ``"squared"`` or ``"cross_entropy"``.
        optimizer: Maps a learning rate to any optax optimizer; the heavy ball by default.
        train_gamma: Whether scale and offset of the norms are trained.
        precision: Of the products in training, ``"float32"``, ``"tf32"`` or ``"bf16"``, as in
            :func:`train`; the predictions are in float32.
        devices: JAX devices to compute on; all local ones by default.
        chunk_cells: Runs per chunk; by default as many as memory allows and at most 1024 per
            device, but on CPU 16, or one per device if there are more.
        detach: Whether to leave the distributed runtime (``jax.distributed.shutdown()``) once the
            work has been divided, so that a process that dies does not end the others.
        patience: Seconds without a new chunk (and at least five times as long as the slowest chunk
            took here) after which other processes are considered dead; before the first chunk,
            seconds without another sign of life.
        progress: Whether to show progress, rate and time left on stderr.
        watch: Whether to draw the results on stderr, if it is a terminal, as a heat map that is
            renewed with every chunk; of several processes the first one draws what it computes.

    Returns:
        A data set over the grid's axes: ``loss``, ``test_loss``, ``test_accuracy`` (also over
        ``epoch``; NaN from the epoch of divergence on), ``diverged_at`` (a step; -1: converged,
        -2: not computed yet), ``status`` (a :class:`Status` as integer), and, over the axes on
        which they depend, the predicted ``eta_max_batch``, ``eta_max_frozen``, ``eta_max_wei2019``
        of one training batch (at most its first 128 samples; of maps for which this would take a
        tenth of the memory, with a sample of the positions). Its attributes are the specification
        as JSON, versions and machine.

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
    axes, fixed = split_grid(grid)
    devices = list(devices or jax.local_devices())
    options = (loss, optimizer, train_gamma, precision)
    recipes = {
        structure_key(at): recipe_of(
            restructured(network, at), epochs, int(at["batch_size"]), *options
        )
        for at in structures(axes, fixed)
    }
    largest = max(recipes.values(), key=lambda recipe: recipe.batch_size)
    samples, test_samples = check_samples(largest, data, test)
    check_cells(network, {name: jnp.asarray(v) for name, v in (axes | fixed).items()})
    if chunk_cells is not None and chunk_cells < 1:
        remedy = "pass a positive integer"
        raise problem(SpecError, "chunk_cells", chunk_cells, "must be at least 1", remedy)
    cells = chunk_cells or cells_in_memory(recipes.values(), devices)
    spec = dict(
        network=json.loads(network.to_json()),
        grid={name: values.tolist() for name, values in axes.items()},
        fixed={name: value.item() for name, value in fixed.items()},
        epochs=epochs,
        loss=loss,
        optimizer=_name_of(optimizer),
        train_gamma=train_gamma,
        precision=precision,
        data=_fingerprint(samples),
        test=None if test_samples is None else _fingerprint(test_samples),
    )
    variables = _variables(epochs, loss, test is not None)
    sizes = {name: len(values) for name, values in axes.items()}
    coordinates = coordinates_of(axes, fixed, epochs)
    layout = Layout(sizes, chunk_shape(sizes, cells), variables, coordinates, spec, _facts(devices))
    job, files = Job(patience), files_at(store)
    if store is None and job.count > 1:
        cause, remedy = "several processes share it", "pass the name of a folder that all see"
        raise problem(SpecError, "store", None, cause, remedy)

    def predict() -> Named:
        return _predictions(recipes, axes, fixed, samples[0], loss)

    with locked(files) if job.first else contextlib.nullcontext():
        old = store_to_extend(files, layout, settle=job.first) if extend else None
        known = None if old is None else known_cells(old.dataset(), layout)
        target = files if old is None else grown(files)
        made: list[SweepStore] = []

        def make() -> dict[str, Any]:
            again = resume or extend
            made.append(create(target, layout, resume=again, predict=predict, known=known))
            return dict(pending=made[0].pending())

        pending = job.agree(make)["pending"]
        opened = made[0] if job.first else open_store(target)
        if detach and job.count > 1:
            jax.distributed.shutdown()
        share = pending[job.index :: job.count]
        run = _Share(opened, recipes, axes, fixed, samples, test_samples, devices, share, known)
        job.patience = max(patience, 5 * run.compute(progress, watch and job.first))
        _wait(job, opened, pending)
        if old is not None:
            if job.first:
                exchange(files)
            # the others may read it when it has its name
            job.wait(lambda: not target.top(), lambda: 0, lambda: "resume the sweep")
            opened = open_store(files)
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
        known: Results on the whole grid that need not be computed; None if there are none.
    """

    store: SweepStore
    recipes: dict[tuple, Recipe]
    axes: dict[str, np.ndarray]
    fixed: dict[str, np.ndarray]
    data: Arrays
    test: Arrays | None
    devices: list[Any]
    numbers: list[int]
    known: dict[str, np.ndarray] | None

    def compute(self, progress: bool, watch: bool) -> float:
        """Computes and writes the chunks; returns the longest time that a call took."""
        picture = picture_of(self.store) if watch else None
        # a device more than a chunk has cells would only compute one of them once more
        devices = self.devices[: math.prod(self.store.layout.chunk)]
        mesh = jax.make_mesh((len(devices),), ("cell",), (AxisType.Auto,), devices=devices)
        todo = {number: int(self._missing(number).sum()) for number in self.numbers}
        longest = 0.0
        count, total = sum(todo.values()), math.prod(self.store.layout.shape)
        with Progress(count, total, progress, picture) as shown:
            for numbers in self._calls(todo):
                start = time.monotonic()
                for number, results in self._results(numbers, mesh).items():
                    self.store.write(number, results)
                    if picture is not None:
                        picture.add(self.store.regions[number], results)
                longest = max(longest, time.monotonic() - start)
                shown.advance(sum(todo[number] for number in numbers))
        return longest

    def _calls(self, todo: dict[int, int]) -> Iterator[list[int]]:
        """Yields the chunks that one call computes: one, or several of which some cells are known.

        The rows of a call that a chunk with known cells leaves free are used for the next one.
        """
        call, free = [], 0
        for number in self.numbers:
            partial = todo[number] < math.prod(shape_of(self.store.regions[number]))
            fits = call and partial and todo[number] <= free
            if call and not (fits and self._structure(number) == self._structure(call[0])):
                yield call
                call = []
            if not call:
                free = math.prod(self.store.layout.chunk) if partial else 0
            call.append(number)
            free -= todo[number]
        if call:
            yield call

    def _results(self, numbers: list[int], mesh: Mesh) -> dict[int, dict[str, np.ndarray]]:
        """The results of chunks, each in the shape of its region, from one call."""
        missing = {number: self._missing(number) for number in numbers}
        parts = [self._cells(number, missing[number]) for number in numbers]
        values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        # every call is padded to the size of the largest chunk, so that all use the same program
        whole = math.prod(self.store.layout.chunk)
        whole += -whole % mesh.size
        count = len(values["seed"])
        rows = np.minimum(np.arange(whole), count - 1)
        cells = Cell(**{name: jnp.asarray(column[rows]) for name, column in values.items()})
        recipe = self.recipes[self._structure(numbers[0])]
        result: Training = run_cells(recipe, cells, self.data, self.test, mesh)
        found, start = {}, 0
        for number, mask in missing.items():
            found[number] = {}
            for name, variable in self.store.layout.variables.items():
                values = np.empty((*mask.shape, *variable.shape), variable.dtype)
                if self.known is not None:
                    values[...] = self.known[name][self.store.regions[number]]
                values[mask] = np.asarray(getattr(result, name))[start : start + mask.sum()]
                found[number][name] = values
            start += mask.sum()
        return found

    def _missing(self, number: int) -> np.ndarray:
        """Which cells of a chunk are not known, in the shape of its region."""
        region = self.store.regions[number]
        if self.known is None:
            return np.ones(shape_of(region), bool)
        return self.known["diverged_at"][region] == -2

    def _cells(self, number: int, missing: np.ndarray) -> dict[str, np.ndarray]:
        """The numbers of those cells of a chunk, (cells,) each."""
        axes = self._axes(number)
        points = np.meshgrid(*axes.values(), indexing="ij")
        columns = {name: values[missing] for name, values in zip(axes, points, strict=True)}
        fixed = {name: np.full(missing.sum(), value) for name, value in self.fixed.items()}
        return {name: values for name, values in (fixed | columns).items() if name not in STRUCTURE}

    def _structure(self, number: int) -> tuple:
        """The key of a chunk's recipe, which is the same for all of its cells."""
        numbers = self.fixed | self._axes(number)
        return structure_key({name: np.ravel(values)[0] for name, values in numbers.items()})

    def _axes(self, number: int) -> dict[str, np.ndarray]:
        """The part of each axis that a chunk covers."""
        region = self.store.regions[number]
        return {
            name: values[part]
            for (name, values), part in zip(self.axes.items(), region, strict=True)
        }


def _wait(job: Job, store: SweepStore, pending: list[int]) -> None:
    """Waits until the other processes have written their chunks."""
    if job.count == 1:
        return
    left = set(pending)

    def num_left() -> int:
        left.difference_update([number for number in left if store.read(number) is not None])
        return len(left)

    total = len(store.regions)
    job.wait(
        lambda: not left,
        num_left,
        lambda: (
            f"{total - len(left)} of {total} chunks of store={store.files.name!r} are kept, resume "
            "the sweep to compute the rest"
        ),
    )


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


def _predictions(recipes, axes, fixed, x: Array, loss: str) -> Named:
    """The boundaries predicted for a batch of the data."""
    names = [name for name in axes if name not in ("learning_rate", "seed")]
    numbers = {name: axes[name] for name in names}
    momentum = numbers.pop("momentum", fixed.get("momentum"))
    # momentum last, because the theory is the same for all its values
    others = [key for key in names if key != "momentum"]
    predictions, known = {}, {}
    for statistics in STATISTICS:
        values = []
        for point in itertools.product(*numbers.values()):
            at = fixed | dict(zip(others, point, strict=True))
            network = _network_at(recipes, at)
            batch = x[: min(int(at["batch_size"]), THEORY_SAMPLES)]
            # without a norm all statistics are the same, as are batches from THEORY_SAMPLES on
            key = network, len(batch), has_norm(network) and statistics
            if key not in known:
                known[key] = _boundary(network, batch, statistics, loss, momentum)
            values.append(known[key])
        shape = tuple(len(numbers[key]) for key in others)
        table = np.asarray(values, np.float64).reshape((*shape, *np.shape(momentum)))
        if "momentum" in names:
            table = np.moveaxis(table, -1, names.index("momentum"))
        said = f"largest stable learning rate by theory, statistics={statistics!r}"
        predictions[f"eta_max_{statistics}"] = (
            tuple(names),
            table,
            dict(long_name=said, units="1"),
        )
    return predictions


def _network_at(recipes: dict[tuple, Recipe], numbers: dict[str, Any]) -> Network:
    """The specification at a point of the grid."""
    network = recipes[structure_key(numbers)].network
    if "gamma" in numbers:
        network = with_gamma(network, float(numbers["gamma"]))
    if "weight_var" in numbers:
        network = with_weight_var(network, float(numbers["weight_var"]))
    return network


def _boundary(
    network: Network, batch: Array, statistics: str, loss: str, momentum: Any
) -> np.ndarray:
    """The largest stable rates of a batch; NaN where the theory needs more samples."""
    if len(batch) < least_samples(network.body):
        return np.full(np.shape(momentum), np.nan)
    likelihood = "categorical" if loss == "cross_entropy" else "gaussian"
    with room(THEORY_ROOM):
        theory = analyze(
            network, data=batch, statistics=statistics, likelihood=likelihood, throw=False
        )
    return np.asarray(stable_rate(theory.fisher.lambda_max, momentum))


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
