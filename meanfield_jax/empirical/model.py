"""Flax models as pure functions of their parameters, and in which mode they are."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.network import Network

Params = dict[str, Array]


class Model(nnx.Sequential):
    """The Flax network of a specification; ``layers[i]`` is the module of ``network.layers[i]``."""

    def __init__(self, network: Network, rngs: nnx.Rngs):
        self.input_shape = network.input_shape
        super().__init__(*network.body.modules(network.input_shape, rngs))

    def __call__(self, x: Array) -> Array:
        """Outputs (samples, C) of inputs (samples, *input_shape)."""
        if x.shape[1:] != self.input_shape:
            remedy = f"give an array of shape (samples, {', '.join(map(str, self.input_shape))})"
            raise problem(DataError, "x.shape", x.shape, "not what the network takes", remedy)
        return super().__call__(x)


def build(network: Network, *, rngs: nnx.Rngs) -> Model:
    """The Flax NNX network with parameters drawn from the declared distributions.

    Weights are N(0, weight_var / fan_in), biases N(0, bias_var), a BatchNorm's scale gamma and
    offset beta. It starts in training mode; ``model.eval()`` and ``model.train()`` switch.

    Args:
        network: The specification.
        rngs: Flax's random streams, such as ``nnx.Rngs(0)``.

    Returns:
        A module that maps (samples, *input_shape) to (samples, C), float32, products in full
        float32 precision on every platform.

    Raises:
        SpecError: for numbers that make no sense.

    Example:
        >>> import jax.numpy as jnp, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((5, 8))).shape
        (5, 3)
    """
    network.validate()
    return Model(network, rngs)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Functional:
    """A Flax NNX model as a pure function ``apply(params, x)``; see :func:`functional`.

    Attributes:
        state: Variables that are no parameters (running statistics), held constant.
        graphdef: The model's structure, its mode included.
        treedef: Structure of its parameters.
        names: The parameters' names in the order of ``treedef``.
    """

    state: Any
    graphdef: Any = dataclasses.field(metadata=dict(static=True))
    treedef: Any = dataclasses.field(metadata=dict(static=True))
    names: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))

    def __call__(self, params: Params, x: Array) -> Array:
        """The model's outputs for these parameters."""
        return self._model(params)(x)

    def with_taps(self, params: Params, taps: Params, x: Array) -> tuple[Array, Params]:
        """The outputs with an array added to the products of some Linear layers.

        Args:
            params: As for a call.
            taps: What to add, by path of an ``nnx.Linear``.
            x: Inputs.

        Returns:
            The outputs, and the inputs of every Linear layer that was used once, by path.
        """
        model = self._model(params)
        inputs: dict[str, list[Array]] = {}
        for path, module in nnx.iter_modules(model):
            if isinstance(module, nnx.Linear) and module.kernel[...].ndim == 2:
                name = "/".join(map(str, path))
                inputs[name] = []
                module.dot_general = _tapped(inputs[name], taps.get(name, 0.0))
        outputs = model(x)
        return outputs, {name: seen[0] for name, seen in inputs.items() if len(seen) == 1}

    def _model(self, params: Params) -> nnx.Module:
        variables = jax.tree.unflatten(self.treedef, [params[name] for name in self.names])
        # without a copy, updating running statistics inside a vmap would raise a trace error
        return nnx.merge(self.graphdef, variables, self.state, copy=True)


def _tapped(seen: list[Array], tap: Array | float) -> Callable[..., Array]:
    def dot_general(x: Array, kernel: Array, *args, **kwargs) -> Array:
        seen.append(x)
        return jax.lax.dot_general(x, kernel, *args, **kwargs) + tap

    return dot_general


def functional(model: nnx.Module) -> tuple[Functional, Params]:
    """The pure function ``apply(params, x)`` of a Flax NNX model in its present mode.

    Args:
        model: Any NNX module that maps a batch to outputs.

    Returns:
        ``apply``, a pytree that can be passed through ``jax.jit``, and the parameters as a
        dictionary from paths such as ``"layers/0/kernel"`` to arrays.

    Example:
        >>> import jax.numpy as jnp, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> apply, params = mf.functional(model)
        >>> apply(params, jnp.ones((5, 8))).shape, sorted(params)[0]
        ((5, 3), 'layers/0/bias')
    """
    graphdef, variables, state = nnx.split(model, nnx.Param, ...)
    named, treedef = jax.tree_util.tree_flatten_with_path(variables)
    names = tuple(path_name(path).removesuffix("/value") for path, _ in named)
    params = {name: value for name, (_, value) in zip(names, named, strict=True)}
    return Functional(state, graphdef, treedef, names), params


def path_name(path: tuple) -> str:
    """A pytree's key path as text, such as "layers/0/kernel"."""
    parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
    return "/".join(map(str, parts))


def in_mode(model: nnx.Module, statistics: str) -> nnx.Module:
    """A copy of the model that uses batch ("batch") or running statistics ("frozen").

    Dropout is off in both. The model's own mode does not matter.

    Returns:
        The copy; the model itself stays as it was.
    """
    copy = nnx.clone(model)
    modules: list[Any] = [module for _, module in nnx.iter_modules(copy)]
    for module in modules:
        if hasattr(module, "use_running_average"):
            module.use_running_average = statistics == "frozen"
        if hasattr(module, "deterministic"):
            module.deterministic = True
    return copy


def calibrate(model: nnx.Module, x: Array) -> None:
    """Sets the running statistics of every BatchNorm to those of one batch, exactly.

    Afterwards evaluation mode gives on ``x`` what training mode gives.

    Args:
        model: An NNX model with BatchNorm layers (of this package or of Flax); changed in place.
        x: The batch, (samples, *input_shape).
    """
    nnx.update(model, batch_statistics(model, x))


def batch_statistics(model: nnx.Module, x: Array) -> nnx.State:
    """The running statistics as they would be if they were those of this batch."""
    copy = in_mode(model, "batch")
    modules: list[Any] = [module for _, module in nnx.iter_modules(copy)]
    for module in modules:
        if hasattr(module, "use_running_average"):
            module.momentum = 0.0
    graphdef, state = nnx.split(copy)
    return _statistics_after(graphdef, state, x)


@jax.jit(static_argnums=0)
def _statistics_after(graphdef, state, x: Array):
    model = nnx.merge(graphdef, state, copy=True)
    model(x)
    return nnx.state(model, nnx.BatchStat)


def has_batch_statistics(model: nnx.Module) -> bool:
    """Whether the model keeps running statistics."""
    return bool(jax.tree.leaves(nnx.state(model, nnx.BatchStat)))


def never_calibrated(model: nnx.Module) -> bool:
    """Whether the running statistics are still the zeros and ones they started from."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]
    return all(np.all((leaf == 0) | (leaf == 1)) for leaf in leaves)


def couples_samples(apply: Callable[..., Array], params: Any, x: Array) -> bool:
    """Whether one sample's output depends on the others in its batch."""
    pair = jnp.stack([x[0], x[1]])
    alone = jnp.stack([x[0], x[0]])
    with_other, with_itself = (_first_output(apply, params, batch) for batch in (pair, alone))
    scale = float(jnp.abs(with_other).max())
    return bool(jnp.abs(with_other - with_itself).max() > 1e-3 * scale)


@jax.jit
def _first_output(apply, params, batch: Array) -> Array:
    return apply(params, batch)[0]


def check_mode(model: nnx.Module, x: Array, statistics: str) -> None:
    """Refuses a model whose BatchNorm would be measured in another mode than asked for.

    Raises:
        SpecError: with the remedy.
    """
    if statistics == "batch" and x.shape[0] < 2:
        cause = "a BatchNorm on one sample has no variance"
        raise problem(DataError, "x.shape", x.shape, cause, "give at least 2 samples")
    if statistics == "frozen" and never_calibrated(model):
        cause = "the running statistics were never set"
        remedy = "call mf.calibrate(model, x) or train first, or ask for statistics='batch'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    apply, params = functional(model)
    if x.shape[0] > 1 and couples_samples(apply, params, x) != (statistics == "batch"):
        used = "running statistics" if statistics == "batch" else "batch statistics"
        cause = f"the model uses {used} whatever its mode"
        remedy = "do not pass use_running_average in the call, set it by model.train()/eval()"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
