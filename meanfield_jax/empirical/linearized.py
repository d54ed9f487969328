"""Operators that are linearized once, and products with them one after the other.

XLA's CPU backend runs the derivative of a convolution 17 times slower inside a compiled loop than
outside. On CPU, loops over products are therefore Python loops in which each step is a compiled
program; elsewhere, and under a caller's ``jax.jit``, the loops are compiled.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Inexact

from meanfield_jax.pytree import pytree, static

Product = Callable[[Array], Array]


class Operator(Protocol):
    """A symmetric matrix that is known by its products; any pytree with these members."""

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (size, size)."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the vectors."""
        ...

    def linearize(self) -> Product:
        """Does the work common to all products; returns v -> A v, from (size,) to (size,)."""
        ...


@pytree(eq=False)
class Linearized:
    """A linearized operator, as a pytree of what its products need.

    Attributes:
        product: The function v -> A v, from (size,) to (size,).
        size: Size of the vectors.
        dtype: Dtype of the vectors.
    """

    product: Product
    size: int = static()
    dtype: jnp.dtype = static()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (size, size)."""
        return (self.size, self.size)

    def linearize(self) -> Product:
        """The product v -> A v."""
        return self.product


def dual_of(op: Operator) -> Operator:
    """The operator's dual, with the same non-zero eigenvalues; the operator if it has none."""
    return getattr(op, "dual", op)


def loops_on_host(*trees: Any) -> bool:
    """Whether loops over products with these operators should be Python loops."""
    traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(trees))
    return jax.default_backend() == "cpu" and not traced


def linearized(op: Operator) -> Linearized:
    """The operator, with the part common to all its products computed once."""
    if isinstance(op, Linearized):
        return op
    return Linearized(_linearized(op), op.shape[0], op.dtype)


@jax.jit
def _linearized(op: Operator) -> Product:
    zeros = jnp.zeros(op.shape[:1], op.dtype)
    return jax.linearize(op.linearize(), zeros)[1]


def multiply_rows(op: Operator, vectors: Inexact[Array, "k size"]) -> Inexact[Array, "k size"]:
    """The product A v for every row v, one after the other, with the memory of one product.

    Args:
        op: The operator.
        vectors: The rows, (k, size).

    Returns:
        The products as rows, (k, size).
    """
    if not loops_on_host(op, vectors):
        return _multiply_rows(op, vectors)
    op = linearized(op)
    return jnp.stack([_multiply(op, vector) for vector in vectors])


@jax.jit
def _multiply_rows(op: Operator, vectors: Inexact[Array, "k size"]) -> Inexact[Array, "k size"]:
    return jax.lax.map(op.linearize(), vectors)


@jax.jit
def _multiply(op: Operator, vector: Inexact[Array, " size"]) -> Inexact[Array, " size"]:
    return op.linearize()(vector)
