"""Training runs as one pure function: many scales, learning rates and seeds in one call."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jax import Array

from meanfield_jax.empirical.model import build
from meanfield_jax.errors import DataError, SpecError, check_choice, check_data, problem
from meanfield_jax.layers.batch_norm import BatchNormModule
from meanfield_jax.network import Network
from meanfield_jax.variants import has_batch_norm, with_norms

LOSSES = ("squared", "cross_entropy")
BLOW_UP = 1e3
"""Training has diverged when a loss is that many times the first one, or not finite."""

RUNNING = 0.9
"""Momentum of a BatchNorm's running statistics: short runs have few steps to settle them."""

Samples = tuple[Array, Array]
Optimizer = Callable[[Any], optax.GradientTransformation]


class _Cell(NamedTuple):
    """What differs between the runs of one call, (cells,) each."""

    learning_rate: Array
    momentum: Array
    seed: Array
    gamma: Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Training:
    """What :func:`train` returns; ``...`` are the axes that its numbers broadcast to.

    Attributes:
        loss: Mean training loss of each epoch, (..., epochs); NaN from the epoch of divergence on.
        test_loss: After each epoch, likewise; None without test data.
        test_accuracy: Share of test samples whose largest output is the label's; likewise.
        diverged_at: The step whose loss was not finite or above 1000 times the first one, (...,);
            -1 where there was none: the run converged.
    """

    loss: Array
    test_loss: Array | None
    test_accuracy: Array | None
    diverged_at: Array

    @property
    def diverged(self) -> Array:
        """Whether a run diverged, (...,)."""
        return self.diverged_at >= 0

    def to_xarray(self, dims: tuple[str, ...] = ()) -> xr.Dataset:
        """The curves and the status as a labelled data set.

        Args:
            dims: Names of the leading axes.
        """
        data: dict[str, Any] = dict(diverged_at=(dims, np.asarray(self.diverged_at)))
        for name in ("loss", "test_loss", "test_accuracy"):
            if (values := getattr(self, name)) is not None:
                data[name] = ((*dims, "epoch"), np.asarray(values))
        return xr.Dataset(data, dict(epoch=np.arange(1, self.loss.shape[-1] + 1)))


def train(
    network: Network,
    data: Samples,
    *,
    test: Samples | None = None,
    gamma: float | Array | None = None,
    learning_rate: float | Array = 0.1,
    momentum: float | Array = 0.9,
    epochs: int = 5,
    batch_size: int = 100,
    seed: int | Array = 0,
    loss: str = "squared",
    optimizer: Optimizer | None = None,
    train_gamma: bool = True,
) -> Training:
    """Trains random draws of a network by minibatches; every number may be an array.

    ``gamma``, ``learning_rate``, ``momentum`` and ``seed`` broadcast against each other, and all
    runs are one vmapped, jitted scan over steps. A run that diverges stands still from then on.

    Args:
        network: The specification.
        data: Inputs (n, *input_shape) and integer labels (n,) or targets (n, C).
        test: The same, to be evaluated after each epoch in evaluation mode (running statistics are
            averages with momentum 0.9).
        gamma: Initial scale of every BatchNorm; None: as specified.
        learning_rate: Of the optimizer.
        momentum: Of the heavy ball; not used by an ``optimizer`` of your own.
        epochs: Passes over the data, each in a random order of its own.
        batch_size: Samples of a step; what is left over at the end of an epoch is left out.
        seed: Of the draw of the network and of the order of the samples.
        loss: ``"squared"``, (1/2n) sum ||f(x) - y||^2, or ``"cross_entropy"``.
        optimizer: Maps a learning rate to any optax optimizer, such as ``optax.adam``.
        train_gamma: Whether scale and offset of the BatchNorms learn.

    Returns:
        Curves and status; the same inputs give the same numbers.

    Raises:
        SpecError, DataError: for inputs that make no sense.

    Example:
        >>> import numpy as np, meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> net = mf.mlp([100], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rates = np.array([0.01, 10.0])
        >>> mf.train(net, (x, labels), learning_rate=rates, epochs=2).diverged.tolist()
        [False, True]
    """
    x, y = _checked(network, data, "data")
    check_choice("loss", loss, LOSSES)
    for name, value in dict(epochs=epochs, batch_size=batch_size).items():
        if value < 1:
            raise problem(SpecError, name, value, "not a number of them", "give at least 1")
    if batch_size > len(x):
        cause = f"there are {len(x)} samples"
        raise problem(SpecError, "batch_size", batch_size, cause, f"give at most {len(x)}")
    if gamma is not None and not has_batch_norm(network):
        cause, remedy = "the network has no BatchNorm", "leave it out"
        raise problem(SpecError, "gamma", gamma, cause, remedy)
    network.validate()
    # plain numbers: the specification is part of what is compiled
    spec = jax.tree.map(float, network if train_gamma else with_norms(network, trainable=False))
    numbers = dict(gamma=gamma, learning_rate=learning_rate, momentum=momentum, seed=seed)
    given = {name: jnp.asarray(value) for name, value in numbers.items() if value is not None}
    shape = jnp.broadcast_shapes(*(value.shape for value in given.values()))
    flat = {name: jnp.broadcast_to(value, shape).ravel() for name, value in given.items()}
    cells = _Cell(**flat)
    checked_test = None if test is None else _checked(network, test, "test")
    result = _train(
        spec, cells, (x, y), checked_test, epochs, batch_size, loss, optimizer or "heavy ball"
    )
    return jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), result)


def _checked(network: Network, data: Samples, name: str) -> Samples:
    """Inputs, and targets (n, C)."""
    x = check_data(data[0])
    y = jnp.asarray(data[1])
    if x.shape[1:] != network.input_shape:
        remedy = f"give (samples, {', '.join(map(str, network.input_shape))})"
        raise problem(DataError, f"{name}[0].shape", x.shape, "not the network's inputs", remedy)
    (num_outputs,) = network.output_shape
    if y.shape == (len(x),) and jnp.issubdtype(y.dtype, jnp.integer):
        return x, jax.nn.one_hot(y, num_outputs, dtype=x.dtype)
    if y.shape != (len(x), num_outputs):
        remedy = f"give integer labels ({len(x)},) or targets ({len(x)}, {num_outputs})"
        raise problem(DataError, f"{name}[1].shape", y.shape, "neither labels nor targets", remedy)
    return x, y.astype(x.dtype)


@partial(jax.jit, static_argnames=("network", "epochs", "batch_size", "loss", "optimizer"))
def _train(network, cells, data, test, epochs, batch_size, loss, optimizer) -> Training:
    return jax.vmap(
        lambda cell: _run(network, cell, data, test, epochs, batch_size, loss, optimizer)
    )(cells)


def _run(
    network, cell: _Cell, data: Samples, test, epochs, batch_size, loss, optimizer
) -> Training:
    """One run."""
    key_draw, key_order = jax.random.split(jax.random.key(cell.seed))
    network = network if cell.gamma is None else with_norms(network, gamma=cell.gamma)
    model = build(network, rngs=nnx.Rngs(key_draw))
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNormModule):
            module.momentum = RUNNING
    graphdef, params, state = nnx.split(model, nnx.Param, nnx.Variable)
    rule = (
        optax.sgd(cell.learning_rate, cell.momentum)
        if optimizer == "heavy ball"
        else optimizer(cell.learning_rate)
    )

    def objective(params, state, x: Array, y: Array):
        model = nnx.merge(graphdef, params, state, copy=True)
        value = _loss(loss, model(x), y)
        return value, nnx.split(model, nnx.Param, nnx.Variable)[2]

    def step(carry, rows: Array):
        params, state, memory, limit, count, diverged_at = carry
        x, y = (array[rows] for array in data)
        (value, new_state), slope = jax.value_and_grad(objective, has_aux=True)(params, state, x, y)
        limit = jnp.where(count == 0, BLOW_UP * value, limit)
        fails = ~(value <= limit)
        diverged_at = jnp.where(fails & (diverged_at < 0), count, diverged_at)
        updates, new_memory = rule.update(slope, memory, params)
        new = (optax.apply_updates(params, updates), new_state, new_memory)
        old = (params, state, memory)
        kept = jax.tree.map(lambda a, b: jnp.where(diverged_at < 0, a, b), new, old)
        value = jnp.where(diverged_at < 0, value, jnp.nan)
        return (*kept, limit, count + 1, diverged_at), value

    num_steps = len(data[0]) // batch_size

    def epoch(carry, key):
        order = jax.random.permutation(key, len(data[0]))
        rows = order[: num_steps * batch_size].reshape(num_steps, batch_size)
        carry, values = jax.lax.scan(step, carry, rows)
        return carry, (values.mean(), evaluate(carry))

    def evaluate(carry):
        if test is None:
            return None
        params, state, *_, diverged_at = carry
        model = nnx.merge(graphdef, params, state, copy=True)
        model.eval()
        outputs = model(test[0])
        hits = jnp.argmax(outputs, -1) == jnp.argmax(test[1], -1)
        values = (_loss(loss, outputs, test[1]), hits.mean())
        return tuple(jnp.where(diverged_at < 0, value, jnp.nan) for value in values)

    start = (params, state, rule.init(params), jnp.inf, 0, jnp.asarray(-1))
    keys = jax.random.split(key_order, epochs)
    end, (losses, tested) = jax.lax.scan(epoch, start, keys)
    test_loss, test_accuracy = tested or (None, None)
    return Training(losses, test_loss, test_accuracy, diverged_at=end[-1])


def _loss(name: str, outputs: Array, targets: Array) -> Array:
    """Mean over samples."""
    if name == "squared":
        return jnp.sum((outputs - targets) ** 2) / (2 * len(outputs))
    return optax.softmax_cross_entropy(outputs, targets).mean()
