"""Flax models as pure functions of their parameters, and the mode that they are in."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.arguments import checked
from meanfield_jax.checks import array
from meanfield_jax.errors import DataError, problem
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.pytree import pytree, static

Params = dict[str, Array]


class Model(nnx.Sequential):
    """The Flax network of a specification; ``layers[i]`` is the module of ``network.layers[i]``."""

    def __init__(self, network: Network, rngs: nnx.Rngs):
        self.input_shape = network.input_shape
        super().__init__(*network.body.modules(network.input_shape, rngs))

    def __call__(self, x: Array) -> Array:
        """Outputs (samples, C) for inputs (samples, *input_shape)."""
        shape = getattr(x, "shape", ())
        if shape[1:] != self.input_shape:
            remedy = f"pass an array of shape (samples, {', '.join(map(str, self.input_shape))})"
            raise problem(DataError, "x.shape", shape, "does not fit the network", remedy)
        return super().__call__(x)


@checked()
def build(network: Network, *, rngs: nnx.Rngs | Array | int) -> Model:
    """The Flax NNX network with parameters drawn from the declared distributions.

    Weights are N(0, weight_var / fan_in) and biases N(0, bias_var); the scale of a BatchNorm starts
    at gamma and its offset at beta. The model starts in training mode; ``model.eval()`` and
    ``model.train()`` switch between the modes.

    Args:
        network: The specification.
        rngs: Flax's random streams, such as ``nnx.Rngs(0)``, or a seed or key of them.

    Returns:
        A module that maps (samples, *input_shape) to (samples, C) in float32, with products in full
        float32 precision on every platform.

    Raises:
        SpecError: if the specification contains invalid numbers.

    Example:
        >>> import jax.numpy as jnp, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> model(jnp.ones((5, 8))).shape
        (5, 3)
    """
    network.validate()
    if not isinstance(jnp.zeros(()), Tracer):  # shapes alone take no memory
        within("MEMORY", "network", network, 4 * network.num_parameters)
    assert isinstance(rngs, nnx.Rngs)
    return Model(network, rngs)


@pytree(eq=False)
class Functional:
    """A Flax NNX model as a pure function ``apply(params, x)``; see :func:`functional`.

    Attributes:
        state: Variables that are not parameters (running statistics), held constant.
        graphdef: The model's structure, including its mode.
        treedef: Structure of its parameters.
        names: The parameters' names in the order of ``treedef``.
        call: Function that maps the model and the inputs to outputs.
    """

    state: Any
    graphdef: Any = static()
    treedef: Any = static()
    names: tuple[str, ...] = static()
    call: Callable[..., Any] = static()

    def __call__(self, params: Params, x: Any) -> Any:
        """The model's outputs for these parameters."""
        return self.call(self._model(params), x)

    def with_added(self, params: Params, added: Params, x: Any) -> tuple[Any, Params]:
        """The outputs, with an array added to the products of some Linear layers.

        Args:
            params: The parameters.
            added: The arrays to add, by path of an ``nnx.Linear``.
            x: Inputs.

        Returns:
            The outputs, and by path the inputs of every Linear layer that was used exactly once,
            has its parameters to itself and uses JAX's default product.
        """
        model = self._model(params)
        inputs: dict[str, list[Array]] = {}
        for path, module in nnx.iter_modules(model):
            name = "/".join(map(str, path))
            if isinstance(module, nnx.Linear) and self._is_plain(name, module):
                inputs[name] = []
                module.dot_general = _adding(inputs[name], added.get(name, 0.0))
        outputs = self.call(model, x)
        return outputs, {name: seen[0] for name, seen in inputs.items() if len(seen) == 1}

    def _is_plain(self, name: str, module: nnx.Linear) -> bool:
        """Whether the layer's arrays are all parameters under its own path, used as usual."""
        arrays = dict(kernel=module.kernel, bias=module.bias)
        named = all(
            value is None or f"{name}/{kind}" in self.names for kind, value in arrays.items()
        )
        return named and module.kernel.ndim == 2 and module.dot_general is jax.lax.dot_general

    def _model(self, params: Params) -> nnx.Module:
        variables = jax.tree.unflatten(self.treedef, [params[name] for name in self.names])
        # without a copy, updating running statistics inside a vmap would raise a trace error
        return nnx.merge(self.graphdef, variables, self.state, copy=True)


def _adding(seen: list[Array], added: Array | float) -> Callable[..., Array]:
    def dot_general(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
        seen.append(x)
        return jax.lax.dot_general(x, kernel, *args, **kwargs) + added

    return dot_general


def call_with(model: nnx.Module, x: Any) -> Any:
    """Calls a model on its inputs: ``model(x)``, ``model(*x)`` or ``model(**x)``.

    If the model takes several arguments, a tuple is unpacked into positional arguments and a
    dictionary into keyword arguments.

    Returns:
        What the model returns.
    """
    arguments, keywords = spread_over(inspect.signature(model.__call__), x)
    return model(*arguments, **keywords)


def spread_over(signature: inspect.Signature, x: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs as positional and keyword arguments of a function with this signature."""
    taken = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    least = sum(parameter.default is parameter.empty for parameter in taken)
    if len(taken) > 1 and isinstance(x, tuple) and least <= len(x) <= len(taken):
        return x, {}
    if isinstance(x, dict) and len(taken) > 1 and set(x) <= {each.name for each in taken}:
        return (), x
    return (x,), {}


@checked()
def functional(
    model: nnx.Module, call: Callable[[Any, Any], Any] | None = None
) -> tuple[Functional, Params]:
    """The pure function ``apply(params, x)`` of a Flax NNX model in its current mode.

    Args:
        model: Any NNX module that maps a batch to outputs.
        call: How to call it, as in ``lambda model, x: model(x["tokens"], mask=x["mask"])``; by
            default ``model(x)``, or ``model(*x)`` for a tuple and ``model(**x)`` for a dictionary
            where the model takes several arguments.

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
    return Functional(state, graphdef, treedef, names, call or call_with), params


def path_name(path: tuple[Any, ...]) -> str:
    """A pytree's key path as text, such as "layers/0/kernel"."""
    parts = [getattr(key, "key", getattr(key, "name", getattr(key, "idx", None))) for key in path]
    return "/".join(map(str, parts))


def in_mode(model: nnx.Module, statistics: str) -> nnx.Module:
    """A copy of the model that uses batch statistics ("batch") or running ones ("frozen").

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


@checked(x=array)
def calibrate(model: nnx.Module, x: Array) -> None:
    """Sets the running statistics of every BatchNorm to exactly those of one batch.

    Afterwards, evaluation mode gives the same outputs on ``x`` as training mode.

    Args:
        model: An NNX model with BatchNorm layers (of this package or of Flax); changed in place.
        x: The batch, (samples, *input_shape).
    """
    nnx.update(model, batch_statistics(model, x))


def batch_statistics(model: nnx.Module, x: Array) -> nnx.State[Any, Any]:
    """The running statistics that the model would have if they were those of this batch."""
    copy = in_mode(model, "batch")
    modules: list[Any] = [module for _, module in nnx.iter_modules(copy)]
    for module in modules:
        if hasattr(module, "use_running_average"):
            module.momentum = 0.0
    graphdef, state = nnx.split(copy)
    return _statistics_after(graphdef, state, x)


@jax.jit(static_argnums=0)
def _statistics_after(graphdef: Any, state: Any, x: Array) -> nnx.State[Any, Any]:
    model = nnx.merge(graphdef, state, copy=True)
    model(x)
    return nnx.state(model, nnx.BatchStat)


def never_calibrated(statistics: Any) -> bool:
    """Whether the running statistics are still the zeros and ones that they started from."""
    leaves = jax.tree.leaves(statistics)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        return False  # not known while tracing
    return all(np.all((leaf == 0) | (leaf == 1)) for leaf in map(np.asarray, leaves))
