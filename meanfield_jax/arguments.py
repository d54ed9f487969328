"""What the arguments of the public functions may be: one table, by the name of the argument.

A name means one thing in the whole package. The table holds types; ranges that depend on the
function, or on its other arguments, are checked there.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.checks import (
    array,
    check_tree,
    function,
    mapping,
    names,
    number,
    numbers,
    pair,
    path,
    plain,
    scalar,
    sequence,
    truth,
    whole,
)
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import Layer, as_layer, is_layer
from meanfield_jax.limits import check_structure, within

P = ParamSpec("P")
R = TypeVar("R")
Check = Callable[[str, Any], Any]


def checked(
    *, error: type[ValueError] = SpecError, **special: Check
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates a function whose arguments are checked, and brought into one form, by the table.

    An argument that is its default is not looked at.

    Args:
        error: The class of the errors.
        **special: Checks of arguments that mean something else in this function.

    Returns:
        The decorator.
    """

    def decorate(wrapped: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(wrapped)
        checks = {name: special.get(name) or CHECKS[name] for name in signature.parameters}

        @functools.wraps(wrapped)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                return wrapped(*args, **kwargs)  # Python names the function in its own message
            for name, value in bound.arguments.items():
                if value is signature.parameters[name].default:
                    continue
                try:
                    bound.arguments[name] = checks[name](name, value)
                except SpecError as found:
                    raise error(str(found)) from None
            return wrapped(*bound.args, **bound.kwargs)

        return call

    return decorate


def network(argument: str, value: Any) -> Any:
    """A specification."""
    from meanfield_jax.network import Network

    if isinstance(value, Network):
        return value
    given = type(value).__name__
    if is_flax(value):
        cause, remedy = "a model", "pass its specification, mf.Network.from_flax(model, x)"
    else:
        cause, remedy = (
            "not a network",
            "pass a Network, such as mf.mlp([100], inputs=8, outputs=3)",
        )
    raise problem(SpecError, argument, given, cause, remedy)


def network_or_model(argument: str, value: Any) -> Any:
    """A specification, or a Flax model that can be read as one."""
    return value if is_flax(value) else network(argument, value)


def is_flax(value: Any) -> bool:
    """Whether it is an NNX module, a Linen module, or a pair of the latter and its variables."""
    first = value[0] if isinstance(value, tuple) and len(value) == 2 else value
    linen = sys.modules.get("flax.linen")  # who has a Linen module has imported it
    return isinstance(value, nnx.Module) or (linen is not None and isinstance(first, linen.Module))


def model(argument: str, value: Any) -> Any:
    """A Flax NNX model."""
    if not isinstance(value, nnx.Module):
        cause = "not a Flax NNX module"
        raise problem(SpecError, argument, type(value).__name__, cause, _remedy_for_model(value))
    return value


def model_or_function(argument: str, value: Any) -> Any:
    """A Flax NNX model, or a function of parameters and inputs."""
    if not callable(value):
        cause = "neither a Flax NNX module nor a function"
        raise problem(SpecError, argument, type(value).__name__, cause, _remedy_for_model(value))
    return value


def _remedy_for_model(value: Any) -> str:
    from meanfield_jax.network import Network

    if isinstance(value, Network):
        return "pass mf.build(network, rngs=0)"
    return "pass an nnx.Module, such as mf.build(network, rngs=0)"


def rngs(argument: str, value: Any) -> nnx.Rngs:
    """Flax's random streams, also from a seed or a key."""
    if isinstance(value, nnx.Rngs):
        return value
    seed = plain(value)
    if isinstance(seed, int) or _is_key(value):
        return nnx.Rngs(value if _is_key(value) else whole(argument, seed))
    cause, remedy = "not random streams", "pass nnx.Rngs(0), a seed or a key"
    raise problem(SpecError, argument, value, cause, remedy)


def key(argument: str, value: Any) -> Array:
    """A random key, also from a seed."""
    if _is_key(value):
        return value
    if isinstance(plain(value), int):
        return jax.random.key(whole(argument, value))
    raise problem(SpecError, argument, value, "not a key", "pass jax.random.key(0) or a seed")


def _is_key(value: Any) -> bool:
    if not isinstance(value, (Array, np.ndarray)):
        return False
    typed = jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and value.shape == ()
    return typed or (value.dtype == jnp.uint32 and value.shape in ((2,), (4,)))


def block(argument: str, value: Any) -> Layer:
    """A layer that may contain others."""
    found = as_layer(argument, value)
    check_structure((found,))
    return found


def activation(argument: str, value: Any) -> Activation:
    """An activation, also from its name or its function."""
    from meanfield_jax.network import check_numbers

    found = value if isinstance(value, Activation) else Activation(value)
    check_numbers(found)
    return found


def operator(argument: str, value: Any) -> Any:
    """A matrix that is known by its products."""
    has_shape = isinstance(getattr(value, "shape", None), tuple)
    if not (has_shape and hasattr(value, "dtype") and hasattr(value, "linearize")):
        remedy = "pass mf.fisher_operator(model, x) or mf.FisherOperator(apply, params, x)"
        cause = "not an operator"
        raise problem(SpecError, argument, type(value).__name__, cause, remedy)
    return value


def instance_of(module: str, name: str, remedy: str) -> Check:
    """The check that a value belongs to a class, which is imported only then."""

    def check(argument: str, value: Any) -> Any:
        if not isinstance(value, getattr(importlib.import_module(module), name)):
            raise problem(SpecError, argument, type(value).__name__, f"not a {name}", remedy)
        return value

    return check


def dataset_of(source: str, *names: str) -> Check:
    """The check of a data set, by some of its variables.

    Args:
        source: The function that returns it, for messages.
        *names: The variables.

    Returns:
        The check.
    """

    def check(argument: str, value: Any) -> Any:
        import xarray as xr

        if not isinstance(value, xr.Dataset) or not set(names) <= set(value.variables):
            cause = f"not a data set with {', '.join(names)}"
            remedy = f"pass what {source} returns"
            raise problem(SpecError, argument, type(value).__name__, cause, remedy)
        return value

    return check


def optimizer(argument: str, value: Any) -> Any:
    """An optax optimizer, or a function from a learning rate to one."""
    if not (isinstance(value, optax.GradientTransformation) or callable(value)):
        remedy = "pass optax.sgd(0.1), or a function such as optax.adam"
        raise problem(SpecError, argument, value, "not an optimizer", remedy)
    return value


def grid(argument: str, value: Any) -> Any:
    """The axes of a sweep, whose cells are counted before there are any."""
    cells = 1
    for name, axis in mapping(argument, value).items():
        values = numbers(f"{argument}[{name!r}]", axis)
        cells *= np.size(values)
        within("MEMORY", f"{argument}[{name!r}]", f"{cells} cells", BYTES_OF_CELL * cells)
    return value


def norms(argument: str, value: Any) -> Any:
    """Names of norms, or a mapping from names to layers."""
    if not isinstance(value, Mapping):
        return [value] if isinstance(value, str) else names(argument, value)
    return {
        name: None if norm is None else as_layer(f"{argument}[{name!r}]", norm)
        for name, norm in mapping(argument, value).items()
    }


def devices(argument: str, value: Any) -> Any:
    """Devices of JAX."""
    for device in sequence(argument, value):
        if not isinstance(device, jax.Device):
            remedy = "pass devices such as jax.devices()"
            raise problem(SpecError, argument, value, "not JAX devices", remedy)
    return value


def integer(argument: str, value: Any) -> Any:
    """One integer."""
    return whole(argument, value)


def integers(argument: str, value: Any) -> Any:
    """An integer, or an array of them."""
    if not (isinstance(value, Tracer) or np.ndim(numbers(argument, value))):
        return whole(argument, value)
    found = value if isinstance(value, Array) else plain(np.asarray(value))
    if not jnp.issubdtype(found.dtype, jnp.integer):
        raise problem(SpecError, argument, value, "must be integers", "pass integers")
    return found


def scalars(argument: str, value: Any) -> list[Any]:
    """A sequence of numbers."""
    given = sequence(argument, value)
    return [scalar(f"{argument}[{i}]", item) for i, item in enumerate(given)]


def momenta(argument: str, value: Any) -> Any:
    """Momenta of the heavy ball, an array or one."""
    found = numbers(argument, value)
    if not isinstance(found, Tracer):
        known = np.asarray(found)
        if not np.all((known >= 0) & (known < 1)):
            raise problem(SpecError, argument, value, "outside [0, 1)", "pass e.g. 0.9")
    return found


def one_momentum(argument: str, value: Any) -> Any:
    """One momentum of the heavy ball."""
    return momenta(argument, scalar(argument, value))


def positive(argument: str, value: Any) -> Any:
    """One positive number."""
    found = scalar(argument, value)
    if not isinstance(found, Tracer) and not 0 < found < np.inf:
        cause, remedy = "must be above 0 and finite", "pass a positive number"
        raise problem(SpecError, argument, value, cause, remedy)
    return found


def sizes(argument: str, value: Any) -> list[Any]:
    """A sequence of integers."""
    return [whole(f"{argument}[{i}]", x) for i, x in enumerate(sequence(argument, value))]


def shape(argument: str, value: Any) -> tuple[Any, ...]:
    """The shape of one sample, also from a single number of features."""
    single = plain(value)
    return tuple(sizes(argument, (single,) if isinstance(single, int) else single))


def vector(argument: str, value: Any) -> Array:
    """A one-dimensional array."""
    found = array(argument, value)
    if found.ndim != 1:
        shape = f"{argument}.shape"
        raise problem(SpecError, shape, found.shape, "must have one axis", "pass (n,)")
    return found


def arrays(argument: str, value: Any) -> Any:
    """Arrays in containers of any kind."""
    check_tree(argument, value, is_layer)
    return jax.tree.map(lambda leaf: array(argument, leaf), value, is_leaf=is_layer)


def arrays_by_name(argument: str, value: Any) -> Any:
    """A mapping from names to arrays."""
    given = mapping(argument, value).items()
    return {name: array(f"{argument}[{name!r}]", leaf) for name, leaf in given}


def pair_of_arrays(argument: str, value: Any) -> Any:
    """Two arrays."""
    return tuple(array(f"{argument}[{i}]", item) for i, item in enumerate(pair(argument, value)))


def as_given(argument: str, value: Any) -> Any:
    """What the function itself checks."""
    return value


BYTES_OF_CELL = 100.0
"""Memory of a cell of a grid, for its coordinates and its results."""

KINDS: dict[Check, str] = {
    network: "network",
    block: "block",
    model: "model",
    rngs: "rngs",
    key: "key",
    activation: "activation",
    operator: "op",
    optimizer: "optimizer",
    grid: "grid",
    norms: "norms",
    devices: "devices",
    function: "objective call",
    path: "store data_dir",
    truth: """
        throw progress shared vectors flatten standardize resume extend detach train_gamma
        watch
    """,
    integer: """
        batch_size chunk_cells draws epochs k max_steps num_batches num_draws num_eigenvalues
        num_probes num_steps seed seeds warmup
    """,
    scalar: "min_output_variance output_variance tail_share value",
    positive: "fraction patience residual tol tolerance",
    one_momentum: "momentum",
    number: "num_samples",
    numbers: "beta bias_var gamma lambda_max learning_rate weight_var",
    scalars: "gammas learning_rates",
    sequence: "batches",
    sizes: "batch_sizes",
    shape: "shape",
    array: "data y probabilities",
    vector: "predicted measured",
    pair: "test",
    pair_of_arrays: "used full",
    arrays: "grads",
    arrays_by_name: "activations",
    names: "over layers",
    mapping: "bounds",
    instance_of(
        "meanfield_jax.empirical.density", "SpectralDensity", "pass spectral_density(op)"
    ): """
        density
    """,
    instance_of("meanfield_jax.tuning", "Tuning", "pass what mf.tune returns"): "tuning",
    as_given: """
        blocks channels dataset event head init inputs
        kernel_size likelihood loss name norm outputs padding
        params precision rate split statistics stride theory widths x output
    """,
}
"""By check, the names of the arguments that it is for."""

CHECKS: dict[str, Check] = {name: kind for kind, named in KINDS.items() for name in named.split()}
"""By name of an argument, its check."""
