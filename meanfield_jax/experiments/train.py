"""Training as one pure function: many scales, learning rates and seeds in one call.

One file, because a run, its recipe and its checks share the same few tuples of arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, PartitionSpec

from meanfield_jax.arguments import checked, integers, momenta
from meanfield_jax.checks import check_choice, check_data, numbers, pair, targets
from meanfield_jax.empirical.model import build
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.experiments.in_turn import at_once, each
from meanfield_jax.experiments.precision import PRECISIONS, lower_products, products_in
from meanfield_jax.layers.base import Signal
from meanfield_jax.limits import within
from meanfield_jax.network import Network, walk
from meanfield_jax.pytree import pytree, static
from meanfield_jax.status import Status, first_failure
from meanfield_jax.variants import has_norm, with_gamma, with_norms, with_weight_var

if TYPE_CHECKING:
    import xarray as xr

LOSSES = ("squared", "cross_entropy")
BLOW_UP = 1e3
"""Training has diverged when a loss exceeds the first one by this factor or is not finite."""

RUNNING = 0.9
"""Momentum of running statistics, lower than usual because short runs have few steps."""

Samples = tuple[Array | np.ndarray, Array | np.ndarray]
"""Inputs (n, ...), and labels or targets."""

Arrays = tuple[Array, Array]
"""Inputs and targets (n, C)."""

Optimizer = Callable[[Any], optax.GradientTransformation]


class Cell(NamedTuple):
    """Numbers that may differ between the runs of one call, (cells,) each; None: as specified."""

    learning_rate: Array
    momentum: Array
    seed: Array
    gamma: Array | None = None
    weight_var: Array | None = None


@pytree
class Recipe:
    """What all runs of one call have in common besides data; all but the numbers is static.

    Attributes:
        numbers: Numbers of the specification; None for those in ``constants``.
        constants: Numbers that a Flax module holds as constants (eps); None for the others.
        structure: Structure of the specification.
        epochs: Passes over the data.
        batch_size: Samples per step.
        loss: One of ``LOSSES``.
        optimizer: Maps a learning rate to an optax optimizer, or is one; None: the heavy ball.
        precision: One of ``PRECISIONS``.
    """

    numbers: list[float | Array | None]
    constants: tuple[float | None, ...] = static()
    structure: Any = static()
    epochs: int = static()
    batch_size: int = static()
    loss: str = static()
    optimizer: Optimizer | optax.GradientTransformation | None = static()
    precision: str = static()

    @property
    def network(self) -> Network:
        """The specification."""
        pairs = zip(self.numbers, self.constants, strict=True)
        leaves = [number if constant is None else constant for number, constant in pairs]
        return jax.tree.unflatten(self.structure, leaves)


@pytree
class Training:
    """What :func:`train` returns; ``...`` are the axes to which its numbers broadcast.

    Attributes:
        loss: Mean training loss of each epoch, (..., epochs); NaN from the epoch of divergence on.
        test_loss: Test loss after each epoch, (..., epochs); None without test data.
        test_accuracy: Fraction of test samples whose largest output is that of the label, likewise.
        diverged_at: The step at which the loss was not finite or more than 1000 times the first
            one, (...,); -1 if there was none, in which case the run converged.
    """

    loss: Array
    test_loss: Array | None
    test_accuracy: Array | None
    diverged_at: Array

    @property
    def diverged(self) -> Array:
        """Whether a run diverged, (...,)."""
        return self.diverged_at >= 0

    @property
    def status(self) -> Array:
        """A :class:`Status` as integer, (...,): CONVERGED or DIVERGED."""
        return jnp.where(self.diverged, Status.DIVERGED, Status.CONVERGED)

    def raise_if_failed(self) -> Training:
        """Returns itself, or raises for the first run that diverged (host only).

        Raises:
            RuntimeError: the status is not CONVERGED.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        step = int(self.diverged_at[failed.cell])
        cause = f"diverged at step {step}{failed.where}"
        raise RuntimeError(f"train: {cause}; use a smaller learning rate")

    def to_xarray(self, dims: tuple[str, ...] = ()) -> xr.Dataset:
        """The curves and the status as a labelled data set.

        Args:
            dims: Names of the leading axes.

        Returns:
            A data set of ``diverged_at`` over ``dims``, and of the losses and the accuracy (on test
            samples if there are any) over ``dims`` and ``epoch``, which counts from 1.
        """
        import xarray as xr

        data: dict[str, Any] = dict(diverged_at=(dims, np.asarray(self.diverged_at)))
        for name in ("loss", "test_loss", "test_accuracy"):
            if (values := getattr(self, name)) is not None:
                data[name] = ((*dims, "epoch"), np.asarray(values))
        return xr.Dataset(data, dict(epoch=np.arange(1, self.loss.shape[-1] + 1)))


@checked(data=pair, momentum=numbers, seed=integers)
def train(
    network: Network,
    data: Samples,
    *,
    test: Samples | None = None,
    gamma: float | Array | None = None,
    weight_var: float | Array | None = None,
    learning_rate: float | Array | None = None,
    momentum: float | Array = 0.9,
    epochs: int = 5,
    batch_size: int = 100,
    seed: int | Array = 0,
    loss: str = "squared",
    optimizer: Optimizer | optax.GradientTransformation | None = None,
    train_gamma: bool = True,
    precision: str = "float32",
) -> Training:
    """Trains random draws of a network on minibatches; many numbers may be arrays.

    ``gamma``, ``weight_var``, ``learning_rate``, ``momentum`` and ``seed`` broadcast against each
    other, and all runs are one jitted scan over steps: vmapped on accelerators, and one after the
    other on CPU. The parameters of a run that diverges do not change any more, and on CPU its
    remaining steps take no time.

    Args:
        network: The specification.
        data: Inputs (n, *input_shape) and integer labels (n,) or targets (n, C).
        test: The same for test samples, evaluated after each epoch in evaluation mode (running
            statistics are averages with momentum 0.9).
        gamma: Initial scale of every norm; None: as specified.
        weight_var: sigma_w^2 of every layer of weights; None: as specified.
        learning_rate: Learning rate of the heavy ball, or the argument of an ``optimizer`` that is
            a function; None: 0.1.
        momentum: Momentum of the heavy ball; not used if an ``optimizer`` is given.
        epochs: Passes over the data, each in a new random order.
        batch_size: Samples per step; an incomplete batch at the end of an epoch is not used.
        seed: Seed of the draw of the network and of the order of the samples.
        loss: ``"squared"``, (1/2n) sum ||f(x) - y||^2, or ``"cross_entropy"``.
        optimizer: A function from a learning rate to an optax optimizer, such as ``optax.adam``; or
            an optimizer with its own rate.
        train_gamma: Whether scale and offset of the norms are trained.
        precision: Of products: ``"float32"``; ``"tf32"``, which allows TF32 (10 bits of mantissa)
            on NVIDIA GPUs and three products of bfloat16 on TPUs, and has no effect on CPU; or
            ``"bf16"``, factors rounded to bfloat16 (those of attention's own products only on GPUs
            and TPUs). Sums, parameters, statistics of norms, losses and the optimizer stay in
            float32.

    Returns:
        Curves and status; the same inputs give the same numbers.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Example:
        >>> import numpy as np, meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rates = np.array([0.01, 10.0])
        >>> mf.train(net, (x, labels), learning_rate=rates, epochs=2).diverged.tolist()
        [False, True]
    """
    recipe = recipe_of(network, epochs, batch_size, loss, optimizer, train_gamma, precision)
    if isinstance(optimizer, optax.GradientTransformation) and learning_rate is not None:
        cause, remedy = "the optimizer has its own learning rate", "leave one of the two out"
        raise problem(SpecError, "learning_rate", learning_rate, cause, remedy)
    numbers = dict(
        gamma=gamma,
        weight_var=weight_var,
        learning_rate=0.1 if learning_rate is None else learning_rate,
        momentum=momentum,
        seed=seed,
    )
    given = {name: jnp.asarray(value) for name, value in numbers.items() if value is not None}
    check_cells(network, given)
    shape = jnp.broadcast_shapes(*(value.shape for value in given.values()))
    cells = Cell(**{name: jnp.broadcast_to(v, shape).ravel() for name, v in given.items()})
    samples = check_samples(recipe, data, test)
    check_size(recipe, math.prod(shape), len(samples[0][0]))
    result = run_cells(recipe, cells, *samples)
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), result)


def recipe_of(
    network: Network,
    epochs: int,
    batch_size: int,
    loss: str,
    optimizer: Optimizer | optax.GradientTransformation | None,
    train_gamma: bool,
    precision: str,
) -> Recipe:
    """The recipe, after checking its options; raises SpecError if one is not valid."""
    check_choice("loss", loss, LOSSES)
    check_choice("precision", precision, tuple(PRECISIONS))
    for name, value in dict(epochs=epochs, batch_size=batch_size).items():
        if value < 1:
            raise problem(SpecError, name, value, "must be at least 1", "pass a positive integer")
    network.num_outputs  # noqa: B018, raises for maps
    network.validate()
    # floats, because integers would be compiled again
    spec = jax.tree.map(float, network if train_gamma else with_norms(network, trainable=False))
    leaves, structure = jax.tree_util.tree_flatten_with_path(spec)
    constants = tuple(number if path[-1].name == "eps" else None for path, number in leaves)
    numbers = [None if path[-1].name == "eps" else number for path, number in leaves]
    return Recipe(numbers, constants, structure, epochs, batch_size, loss, optimizer, precision)


def bytes_of_cell(recipe: Recipe) -> int:
    """A rough upper bound on the memory of one run.

    It counts six copies of the parameters (draw, gradient, momentum, old and new), and four of what
    a batch keeps of each layer, including the windows of convolutions.

    Returns:
        Bytes, four for each number (float32).
    """
    network = recipe.network
    signals = network.body.signals(Signal(network.input_shape))
    sides = (max(inner.kernel_size for _, inner in walk(layer)) for layer in network.layers)
    windows = [side**2 for side in sides] + [1]
    numbers = sum(
        math.prod(signal.shape) * window for signal, window in zip(signals, windows, strict=True)
    )
    return 4 * (6 * network.num_parameters + 4 * recipe.batch_size * numbers)


def check_size(recipe: Recipe, cells: int, num_samples: int) -> None:
    """Raises SpecError for runs that would take more memory or steps than the limits."""
    steps = recipe.epochs * max(1, num_samples // recipe.batch_size)
    within("STEPS", "epochs", recipe.epochs, steps)
    curves = 16 * recipe.epochs * cells
    held = at_once(cells, jax.default_backend()) * bytes_of_cell(recipe)
    within("MEMORY", "runs", cells, curves + held)


def check_cells(network: Network, numbers: dict[str, Array]) -> None:
    """Raises SpecError for numbers with which no run is possible."""
    known = {name: value for name, value in numbers.items() if not isinstance(value, Tracer)}
    if "gamma" in numbers and not has_norm(network):
        given = known["gamma"].tolist() if "gamma" in known else "traced"
        raise problem(SpecError, "gamma", given, "the network has no norm", "leave it out")
    for name, values in known.items():
        if not np.all(np.isfinite(values)):
            raise problem(SpecError, name, values.tolist(), "not finite", "pass finite numbers")
    if "momentum" in known:
        momenta("momentum", known["momentum"])
    for name in ("learning_rate", "weight_var"):
        if name in known and np.any(known[name] < 0):
            remedy = "pass numbers of at least 0"
            raise problem(SpecError, name, known[name].tolist(), "must not be negative", remedy)


def check_samples(
    recipe: Recipe, data: Samples, test: Samples | None
) -> tuple[Arrays, Arrays | None]:
    """Inputs and targets (n, C), for training and for testing."""
    x, y = _checked(recipe.network, data, "data")
    if recipe.batch_size > len(x):
        cause = f"there are only {len(x)} samples"
        raise problem(SpecError, "batch_size", recipe.batch_size, cause, f"pass at most {len(x)}")
    return (x, y), None if test is None else _checked(recipe.network, test, "test")


def _checked(network: Network, data: Samples, name: str) -> Arrays:
    """Inputs and targets (n, C) of one data set."""
    x = check_data(data[0], f"{name}[0]")
    if x.shape[1:] != network.input_shape:
        remedy = f"pass inputs of shape (samples, {', '.join(map(str, network.input_shape))})"
        cause = "does not fit the network's input shape"
        raise problem(DataError, f"{name}[0].shape", x.shape, cause, remedy)
    return x, targets(f"{name}[1]", data[1], len(x), network.num_outputs, x.dtype)


@partial(jax.jit, static_argnames="mesh")
def run_cells(
    recipe: Recipe, cells: Cell, data: Arrays, test: Arrays | None, mesh: Mesh | None = None
) -> Training:
    """All runs at once, (cells, ...), distributed over a mesh's axis "cell" if one is given."""

    def run_all(recipe: Recipe, cells: Cell, data: Arrays, test: Arrays | None) -> Training:
        return each(lambda cell: _run(recipe, cell, data, test), cells)

    if mesh is not None:
        split, whole = PartitionSpec("cell"), PartitionSpec()
        run_all = jax.shard_map(
            run_all,
            mesh=mesh,
            in_specs=(whole, split, whole, whole),
            out_specs=split,
            check_vma=False,
        )
    return run_all(recipe, cells, data, test)


def _run(recipe: Recipe, cell: Cell, data: Arrays, test: Arrays | None) -> Training:
    """One run."""
    key_draw, key_order = jax.random.split(jax.random.key(cell.seed))
    network, batch_size = recipe.network, recipe.batch_size
    if cell.gamma is not None:
        network = with_gamma(network, cell.gamma)
    if cell.weight_var is not None:
        network = with_weight_var(network, cell.weight_var)
    model = build(network, rngs=nnx.Rngs(key_draw))
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "momentum"):
            setattr(module, "momentum", RUNNING)  # noqa: B010
    lower_products(model, recipe.precision)
    graphdef, params, state = nnx.split(model, nnx.Param, nnx.Variable)
    rule = _rule(recipe.optimizer, cell)

    def objective(params, state, x: Array, y: Array):
        model = nnx.merge(graphdef, params, state, copy=True)
        with products_in(recipe.precision):
            outputs = model(x)
        value = _loss(recipe.loss, outputs, y)
        return value, nnx.split(model, nnx.Param, nnx.Variable)[2]

    def step(carry, rows: Array):
        return jax.lax.cond(carry[-1] < 0, advance, lambda carry, _: (carry, missing), carry, rows)

    def advance(carry, rows: Array):
        params, state, memory, limit, count, diverged_at = carry
        x, y = (array[rows] for array in data)
        (value, new_state), slope = jax.value_and_grad(objective, has_aux=True)(params, state, x, y)
        limit = jnp.where(count == 0, BLOW_UP * value, limit)
        fails = ~(value <= limit)
        updates, new_memory = rule.update(slope, memory, params)
        new = (optax.apply_updates(params, updates), new_state, new_memory)
        old = (params, state, memory)
        kept = jax.tree.map(lambda a, b: jnp.where(fails, b, a), new, old)
        diverged_at = jnp.where(fails, count, diverged_at)
        return (*kept, limit, count + 1, diverged_at), jnp.where(fails, missing, value)

    num_steps = len(data[0]) // batch_size

    def epoch(carry, key):
        order = jax.random.permutation(key, len(data[0]))
        rows = order[: num_steps * batch_size].reshape(num_steps, batch_size)
        carry, values = jax.lax.scan(step, carry, rows)
        if test is None:
            return carry, (values.mean(), None)
        unknown = (missing, missing)
        tested = jax.lax.cond(carry[-1] < 0, evaluate, lambda *_: unknown, carry, *test)
        return carry, (values.mean(), tested)

    def evaluate(carry, x: Array, y: Array):
        params, state, *_ = carry

        def apply(x: Array) -> Array:
            # merged here, because Flax does not allow a module from outside a scan inside it
            model = nnx.merge(graphdef, params, state, copy=True)
            model.eval()
            with products_in(recipe.precision):
                return model(x)

        outputs = _in_batches(apply, x, batch_size)
        hits = jnp.argmax(outputs, -1) == jnp.argmax(y, -1)
        return _loss(recipe.loss, outputs, y), hits.mean(dtype=missing.dtype)

    missing = jnp.asarray(jnp.nan, data[1].dtype)
    start = (params, state, rule.init(params), jnp.full_like(missing, jnp.inf), 0, jnp.asarray(-1))
    keys = jax.random.split(key_order, recipe.epochs)
    end, (losses, tested) = jax.lax.scan(epoch, start, keys)
    test_loss, test_accuracy = tested or (None, None)
    return Training(losses, test_loss, test_accuracy, diverged_at=end[-1])


def _rule(
    optimizer: Optimizer | optax.GradientTransformation | None, cell: Cell
) -> optax.GradientTransformation:
    if optimizer is None:
        return optax.sgd(cell.learning_rate, cell.momentum)
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    return optimizer(cell.learning_rate)


def _in_batches(apply: Callable[[Array], Array], x: Array, batch_size: int) -> Array:
    """The outputs, computed in batches to save the memory of intermediate values."""
    whole = len(x) // batch_size * batch_size
    batches = x[:whole].reshape(whole // batch_size, batch_size, *x.shape[1:])
    outputs = jax.lax.map(apply, batches)
    outputs = outputs.reshape(whole, *outputs.shape[2:])
    return outputs if whole == len(x) else jnp.concatenate([outputs, apply(x[whole:])])


def _loss(name: str, outputs: Array, targets: Array) -> Array:
    """The loss, averaged over samples."""
    if name == "squared":
        return jnp.sum((outputs - targets) ** 2) / (2 * len(outputs))
    return optax.softmax_cross_entropy(outputs, targets).mean()
