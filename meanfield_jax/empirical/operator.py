"""Symmetric positive semi-definite operators, for use with NumPy, SciPy and lineax."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Inexact

from meanfield_jax.checks import array
from meanfield_jax.empirical.linearized import Product, linearized, multiply_rows
from meanfield_jax.errors import SpecError, problem

if TYPE_CHECKING:
    import lineax
    import scipy.sparse.linalg

LARGEST_DENSE = 20_000
"""Number of rows of the largest matrix that ``to_dense`` forms: 1.6 GB in float32."""


class SymmetricOperator:
    """A symmetric positive semi-definite matrix that is known only by its products.

    Derived classes are pytrees with ``shape``, ``dtype`` and ``linearize()``.
    """

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the matrix, (size, size)."""
        raise NotImplementedError

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the vectors."""
        raise NotImplementedError

    def linearize(self) -> Product:
        """Does the work common to all products; returns v -> A v, from (size,) to (size,)."""
        raise NotImplementedError

    def __matmul__(self, vector: Any) -> Any:
        """The product A v.

        Args:
            vector: An array (size,), or (size, k) for k products at once.

        Returns:
            An array of the same shape.
        """
        vector, size = array("vector", vector).astype(self.dtype), self.shape[0]
        if vector.ndim not in (1, 2) or vector.shape[0] != size:
            remedy = f"pass an array ({size},) or ({size}, k)"
            raise problem(SpecError, "vector.shape", vector.shape, "does not fit", remedy)
        rows = vector[None] if vector.ndim == 1 else vector.T
        products = multiply_rows(self, rows)
        return products[0] if vector.ndim == 1 else products.T

    def to_dense(self) -> Inexact[Array, "size size"]:
        """The matrix as an array.

        Returns:
            An array, (size, size).

        Raises:
            SpecError: if the matrix has more than 20,000 rows.
        """
        size = self.shape[0]
        if size > LARGEST_DENSE:
            cause, remedy = "the matrix is too large to be formed", "use products, or op.dual"
            raise problem(SpecError, "shape", self.shape, cause, remedy)
        return multiply_rows(self, jnp.eye(size, dtype=self.dtype))

    def to_scipy(self) -> scipy.sparse.linalg.LinearOperator:
        """The operator for ``scipy.sparse.linalg.eigsh`` and the like; compiled once.

        Returns:
            A linear operator on NumPy arrays, which is its own transpose.
        """
        import scipy.sparse.linalg

        op = linearized(self)

        def multiply(vector: np.ndarray) -> np.ndarray:
            rows = array("vector", vector.reshape(self.shape[0], -1).T).astype(self.dtype)
            return np.asarray(multiply_rows(op, rows)).T.reshape(vector.shape)

        products: Any = dict.fromkeys(("matvec", "rmatvec", "matmat", "rmatmat"), multiply)
        create: Any = scipy.sparse.linalg.LinearOperator
        return create(self.shape, dtype=np.dtype(self.dtype), **products)

    def to_lineax(self) -> lineax.FunctionLinearOperator:
        """The operator for ``lineax.linear_solve``, tagged as positive semi-definite.

        Returns:
            A linear operator on arrays (size,). F itself is singular, so a solver needs damping.
        """
        import lineax

        structure = jax.ShapeDtypeStruct(self.shape[:1], self.dtype)
        tags = (lineax.symmetric_tag, lineax.positive_semidefinite_tag)
        return lineax.FunctionLinearOperator(linearized(self).product, structure, tags)
