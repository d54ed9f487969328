"""Checks of what an operator is given: a batch, and parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.checks import check_tree, jax_dtype, native
from meanfield_jax.empirical.model import path_name
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.layers.base import is_layer


def check_batch(x: Any) -> Any:
    """The batch as JAX arrays; raises DataError if it cannot be used.

    Args:
        x: An array, or any pytree of arrays, whose leading axes run over the n samples:
            floating-point numbers, integers (tokens), booleans (masks).

    Returns:
        The same pytree.
    """
    named = [(_argument("x", path), leaf) for path, leaf in _leaves("x", x)]
    if not named:
        raise problem(DataError, "x", x, "contains no arrays", "pass inputs (n, ...)")
    for name, leaf in named:
        if _dtype(leaf) is None:
            remedy = "pass arrays whose leading axis runs over the samples"
            raise problem(DataError, name, type(leaf).__name__, "not an array", remedy)
        shape = np.shape(leaf)
        alone_and_flat = len(shape) == 1 and leaf is x and jnp.issubdtype(_dtype(x), jnp.inexact)
        if len(shape) == 0 or shape[0] == 0 or alone_and_flat:
            remedy = "pass (samples, features) or (samples, height, width, channels)"
            raise problem(DataError, f"{name}.shape", shape, "not a batch", remedy)
    sizes = {np.shape(leaf)[0]: name for name, leaf in named}
    if len(sizes) > 1:
        (first, one), (second, other) = list(sizes.items())[:2]
        cause = f"{one} has {first} samples and {other} has {second}"
        remedy = "pass arrays with equal leading axes, and hold constants in the model"
        raise problem(DataError, "x", f"{len(named)} arrays", cause, remedy)
    for name, leaf in named:
        # NumPy computes at once even where everything else is being traced
        if isinstance(leaf, Tracer) or not jnp.issubdtype(_dtype(leaf), jnp.inexact):
            continue
        values = np.asarray(leaf)
        if count := int((~np.isfinite(values.astype(np.result_type(values, np.float32)))).sum()):
            remedy = "remove or replace these values"
            raise problem(DataError, name, f"{count} values", "NaN or infinite", remedy)
    return jax.tree.map(_as_jax, x)


def check_params(params: Any) -> Any:
    """The parameters as JAX arrays; raises SpecError if they cannot be differentiated."""
    if isinstance(params, Mapping) and "params" in params and len(params) > 1:
        others = ", ".join(sorted(map(str, set(params) - {"params"})))
        cause = f"it holds more than parameters ({others})"
        remedy = "use FisherOperator.from_linen(module, variables, x)"
        raise problem(SpecError, "params", list(map(str, params)), cause, remedy)
    named = _leaves("params", params)
    if not named:
        raise problem(SpecError, "params", params, "contains no arrays", "pass a pytree of arrays")
    for path, leaf in named:
        dtype = _dtype(leaf)
        name = _argument("params", path)
        if dtype is None:
            remedy = "pass only arrays, and hold everything else in the function"
            raise problem(SpecError, name, type(leaf).__name__, "not an array", remedy)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            cause = "a Fisher matrix is defined for real parameters only"
            remedy = "make the real and imaginary parts two parameters"
            raise problem(SpecError, f"{name}.dtype", str(dtype), cause, remedy)
        if not jnp.issubdtype(dtype, jnp.floating):
            remedy = "hold it in the function, or convert it with .astype('float32')"
            raise problem(SpecError, f"{name}.dtype", str(dtype), "not differentiable", remedy)
    return jax.tree.map(_as_jax, params)


def _as_jax(leaf: Any) -> Array:
    if isinstance(leaf, (Array, bool, int, float, complex)):
        return jnp.asarray(leaf)
    return jnp.asarray(native(np.asarray(leaf)))


def _leaves(argument: str, tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    check_tree(argument, tree, is_layer)
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_layer)


def _argument(name: str, path: tuple[Any, ...]) -> str:
    """The name of a leaf: "x", or "x[tokens]"."""
    return f"{name}[{path_name(path)}]" if path else name


def _dtype(leaf: Any) -> Any:
    """The dtype in JAX; None for what is not a number."""
    if isinstance(leaf, (bool, int, float, complex)):
        return jnp.result_type(leaf)
    if isinstance(leaf, Array):
        return leaf.dtype
    if isinstance(leaf, (jax.ShapeDtypeStruct, np.ma.MaskedArray)) or not hasattr(leaf, "dtype"):
        return None
    return jax_dtype(np.asarray(leaf).dtype)  # also of pandas, xarray or PyTorch
