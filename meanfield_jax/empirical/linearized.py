"""Operators linearized once, and their products one after the other.

XLA's CPU backend runs the derivative of a convolution 17 times slower inside a compiled loop than
outside. There, the loops over products are Python's, each turn a compiled program; elsewhere, and
under a caller's ``jax.jit``, they are compiled.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Linearized:
    """An operator that was linearized, as a pytree of what its products need.

    Attributes:
        product: v -> A v, (size,) to (size,).
        size: Of the vectors.
        dtype: Likewise.
    """

    product: Any
    size: int = dataclasses.field(metadata=dict(static=True))
    dtype: jnp.dtype = dataclasses.field(metadata=dict(static=True))

    @property
    def shape(self) -> tuple[int, int]:
        """(size, size)."""
        return (self.size, self.size)

    def linearize(self) -> Any:
        """The product."""
        return self.product


def loops_on_host(*trees: Any) -> bool:
    """Whether loops over products with these operators are better Python's."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
    return jax.default_backend() == "cpu" and not traced


def linearized(op: Any) -> Linearized:
    """The operator, with what its products share computed."""
    if isinstance(op, Linearized):
        return op
    return Linearized(_linearized(op), op.shape[0], op.dtype)


@jax.jit
def _linearized(op: Any) -> Any:
    zeros = jnp.zeros(op.shape[:1], op.dtype)
    return jax.linearize(op.linearize(), zeros)[1]


def multiply_rows(op: Any, vectors: Array) -> Array:
    """A v for every row of an array, one after the other: memory stays that of one product.

    Args:
        op: The operator.
        vectors: (k, size).

    Returns:
        (k, size).
    """
    if not loops_on_host(op, vectors):
        return _multiply_rows(op, vectors)
    op = linearized(op)
    return jnp.stack([_multiply(op, vector) for vector in vectors])


@jax.jit
def _multiply_rows(op: Any, vectors: Array) -> Array:
    return jax.lax.map(op.linearize(), vectors)


@jax.jit
def _multiply(op: Any, vector: Array) -> Array:
    return op.linearize()(vector)
