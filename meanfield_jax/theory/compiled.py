"""Compilation once per structure; the numbers of a network, including widths, are arguments."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.layers.base import Layer
from meanfield_jax.network import Network

Spec = TypeVar("Spec", Network, Layer)
L = TypeVar("L", bound=Layer)
R = TypeVar("R")


def known_numbers(network: Spec) -> Spec:
    """The network in the form for which the theory is compiled.

    Offsets that are known to be 0 become None, which avoids quadrature. Integers and NumPy numbers
    become floats, so that 1, 1.0 and ``np.float64(1)`` use the same program.

    Returns:
        A specification of the same structure and with the same theory.
    """

    def known(path: tuple[Any, ...], leaf: Any) -> Any:
        if isinstance(leaf, Tracer):
            return leaf
        if path[-1].name == "beta" and np.all(np.asarray(leaf) == 0):
            return None
        return float(leaf) if isinstance(leaf, (int, float, np.integer)) else leaf

    return jax.tree_util.tree_map_with_path(known, network)


def number_of_samples(num_samples: Any) -> Any:
    """The number as a float, so that 12, 12.0 and the limit, infinity, use the same program."""
    if num_samples is None:
        return np.inf
    return float(num_samples) if isinstance(num_samples, (int, float, np.number)) else num_samples


def without_widths(layer: L) -> tuple[L, tuple[float, ...]]:
    """The layer with every width set to 1, and its widths, so that only depth needs compiling."""
    widths: list[float] = []

    def change(inner: Layer) -> Layer:
        if not inner.is_weights:
            return inner
        widths.append(float(inner.width))
        return inner.replace(width=1)

    return layer.changed(change), tuple(widths)


def with_widths(layer: L, widths: tuple[Array | float, ...]) -> L:
    """The layer with these widths, which may be traced; for use in the layer's rules only."""
    given = iter(widths)
    return layer.changed(
        lambda inner: inner.replace(width=next(given)) if inner.is_weights else inner
    )


def compiled(
    function: Callable[..., R], static: tuple[str, ...] = (), small: int = 0
) -> Callable[..., R]:
    """The function under jit, on CPU without fusion.

    On CPU, XLA fuses every number with all layers before it: 15 layers compile in 30 s instead of
    1 s, and a batch takes three times as long. Many networks under one vmap benefit from fusion.

    Args:
        function: The function.
        static: Names of its static arguments.
        small: Arguments of fewer numbers than this take no time to speak of: there LLVM's
            optimizations, a third of the compile time, are left out.

    Returns:
        A function of the same arguments, given by position.
    """
    unfused = {"xla_disable_hlo_passes": "fusion"}
    plain, large, quick = (
        jax.jit(function, static_argnames=static, compiler_options=options)
        for options in ({}, unfused, unfused | {"xla_backend_optimization_level": 0})
    )

    def call(*args: Any) -> R:
        leaves = jax.tree.leaves(args)
        traced = any(isinstance(value, Tracer) for value in (*leaves, jnp.zeros(())))
        if traced or jax.default_backend() != "cpu":
            return plain(*args)
        return (quick if sum(map(np.size, leaves)) < small else large)(*args)

    return call
