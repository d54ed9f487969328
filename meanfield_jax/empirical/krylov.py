"""One step of the Lanczos method, for the largest eigenvalues as for the whole density.

An operator is any pytree with ``shape`` (size, size), ``dtype`` and ``linearize() -> matvec``;
``linearize`` is called once inside the trace, and ``matvec`` maps (size,) to (size,).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from meanfield_jax.empirical.linearized import Operator, Product
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.precise import matmul

FLOOR = 10.0
"""A remainder below this many eps * lambda_max is rounding error."""


class Krylov(NamedTuple):
    """A Krylov space that grows by one vector a step.

    Attributes:
        basis: Orthonormal rows; those not computed yet are zero.
        projected: Q A Q^T.
        vector: The next basis vector, or zero after a breakdown.
        beta: Norm of the remainder, exactly zero after a breakdown.
    """

    basis: Float[Array, "steps size"]
    projected: Float[Array, "steps steps"]
    vector: Float[Array, " size"]
    beta: Float[Array, ""]


def begin(size: int, steps: int, dtype: jnp.dtype, key: Array) -> Krylov:
    """The state at a random start, with room for ``steps`` basis vectors."""
    vector = jax.random.normal(key, (size,), dtype)
    zero = jnp.zeros((), dtype)
    basis, projected = jnp.zeros((steps, size), dtype), jnp.zeros((steps, steps), dtype)
    return Krylov(basis, projected, vector / jnp.linalg.norm(vector), zero)


def expand(matvec: Product, krylov: Krylov, step: Int[Array, ""]) -> Krylov:
    """One Lanczos step: a product, orthogonalized against the whole basis.

    All coefficients Q A q are kept, not only the two that are non-zero in exact arithmetic, so that
    T remains the projection of A onto the basis in spite of rounding and fresh starts.

    Returns:
        The state with the basis and T one row larger, the next unit vector, (size,), and the norm
        of the remainder from which it was made; both are exactly zero after a breakdown.
    """
    basis = krylov.basis.at[step].set(krylov.vector)
    row, vector = _remove(basis, matvec(krylov.vector))
    projected = krylov.projected.at[step].set(row).at[:, step].set(row)
    beta, scale = jnp.linalg.norm(vector), jnp.max(jnp.abs(projected))
    # once the basis spans the whole space, the remainder is rounding error
    exact = (beta <= FLOOR * jnp.finfo(beta.dtype).eps * scale) | (step + 1 >= basis.shape[1])
    beta = jnp.where(exact & jnp.isfinite(beta), 0, beta)
    vector = jnp.where(beta == 0, 0, vector / jnp.where(beta == 0, 1, beta))
    return Krylov(basis, projected, vector, beta)


def random_unit(basis: Float[Array, "steps size"], key: Array) -> Float[Array, " size"]:
    """A random unit vector orthogonal to the basis."""
    vector = jax.random.normal(key, basis.shape[1:], basis.dtype)
    vector = _remove(basis, vector / jnp.linalg.norm(vector))[1]
    return vector / jnp.linalg.norm(vector)


def _remove(
    basis: Float[Array, "steps size"], vector: Float[Array, " size"]
) -> tuple[Float[Array, " steps"], Float[Array, " size"]]:
    """Twice-iterated classical Gram-Schmidt; returns the coefficients and the remainder."""
    first = matmul(basis, vector)
    vector = vector - matmul(first, basis)
    second = matmul(basis, vector)
    return first + second, vector - matmul(second, basis)


def check_dtype(op: Operator) -> None:
    """Raises SpecError unless the operator works in float32 or float64."""
    if jnp.dtype(op.dtype) not in (jnp.float32, jnp.float64):
        cause = "the small eigenproblem needs float32 or float64"
        raise problem(SpecError, "op.dtype", str(op.dtype), cause, "cast the operator")
