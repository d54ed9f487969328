r"""Averages over a Gaussian vector divided by its own length.

BatchNorm divides a unit's values z on a batch, (n,), by their sample deviation |z| / sqrt(n), not
by its expectation. Averages of f(z) / |z|^2 are mixtures of Gaussian averages:

.. math:: E[f(z) / |z|^2] = \int_0^\infty \det(1 + 2 s C)^{-1/2} E_{N(0, G(s))}[f] ds, \quad
    G(s) = C (1 + 2 s C)^{-1}

With a further factor 1 / |z|^2, the integrand has a further factor s.
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from meanfield_jax.precise import matmul

RANK = 16
"""Eigenvectors treated separately; of the other eigenvalues only sum and sum of squares count."""

ITERATIONS = 8

LEAST_VALUES = 4
"""Fewest values in a variance: the inverse variance of fewer values has no expectation."""


V = TypeVar("V", covariant=True)


class SphereAverages(NamedTuple, Generic[V]):
    """Averages over a Gaussian vector z divided by its own length, as arrays or matrices.

    Attributes:
        first: E[z_hat z_hat^T] = n E[z z^T / |z|^2].
        factor: The expected inverse variance, divided by the inverse of the expected variance.
        second: E[z z^T / |z|^4], in units in which it is ``first`` if variances do not fluctuate.
    """

    first: V
    factor: Float[Array, "..."]
    second: V


def on_sphere(covariance: Float[Array, "*batch n n"]) -> SphereAverages[Array]:
    """E[z z^T / |z|^2], E[1 / |z|^2], E[z z^T / |z|^4] in units of C, of 1 / trace C, of both.

    Args:
        covariance: The covariance C of z, (..., n, n), positive semi-definite.

    Returns:
        The three averages in this order: ``first``, (..., n, n), ``factor``, (..., 1, 1), and
        ``second``, (..., n, n).

    Accuracy:
        Exact for up to 16 eigenvalues above a bulk of equal ones. For eigenvalues that fall like
        k^-0.3 to k^-2 with n = 40, the error is 1e-4 of E[1 / |z|^2], and 5e-3 of the largest
        eigenvalue in the matrices (tested). At least four eigenvalues must be non-zero: with fewer,
        1 / |z|^2 has no expectation.
    """
    size = covariance.shape[-1]
    values, vectors = _dominant(covariance)
    trace = jnp.trace(covariance, axis1=-2, axis2=-1)[..., None]
    shares = values / trace
    rounding = 10 * size * jnp.finfo(shares.dtype).eps
    # the factor of an eigenvalue of 0 is unbounded, and would amplify rounding errors
    shares = jnp.where(shares > rounding, shares, 0)
    sum_rest = jnp.maximum(1 - shares.sum(-1), 0)
    squares = jnp.sum(covariance**2, (-2, -1)) / trace[..., 0] ** 2
    squares_rest = jnp.maximum(squares - jnp.sum(shares**2, -1), 0)
    # a bulk of equal eigenvalues with this sum and this sum of squares
    some = (sum_rest > rounding) & (squares_rest > 0)
    level = jnp.where(some, squares_rest / jnp.where(some, sum_rest, 1), 0)
    number = jnp.where(some, sum_rest**2 / jnp.where(some, squares_rest, 1), 0)

    log_s, step = np.linspace(-20, 36, 225, retstep=True)
    log_s = jnp.broadcast_to(jnp.asarray(log_s, shares.dtype), (*level.shape, log_s.size))
    s = jnp.exp(log_s)[..., None]
    levels = jnp.concatenate([shares, level[..., None]], -1)[..., None, :]
    multiplicities = jnp.concatenate([jnp.ones_like(shares), number[..., None]], -1)[..., None, :]
    growth = jnp.log1p(2 * s * levels)
    log_density = log_s - jnp.sum(multiplicities * growth, -1) / 2
    density = step * jnp.exp(log_density)[..., None]
    shrinkage = jnp.exp(-growth)

    def changed(factors: Array) -> Array:
        own, rest = factors[..., None, :-1], jnp.where(some, factors[..., -1], 0)[..., None, None]
        known = (own - rest) * (shares * trace)[..., None, :]
        low_rank = matmul(vectors * known, _turned(vectors))
        return rest * covariance + low_rank

    factor = density.sum(-2)
    second = jnp.sum(s * density * shrinkage, -2) / factor
    return SphereAverages(
        changed(jnp.sum(density * shrinkage, -2)), factor[..., None], changed(second)
    )


def _dominant(
    matrix: Float[Array, "*batch n n"],
) -> tuple[Float[Array, "*batch rank"], Float[Array, "*batch n rank"]]:
    """The largest eigenvalues and their eigenvectors, by subspace iteration."""
    function = _dominant_of_one
    for _ in matrix.shape[:-2]:
        function = jax.vmap(function)
    return function(matrix)


# one matrix after the other: two batched QR at a time deadlock on a CPU with two cores
# (jaxlib 0.10.1)
@jax.custom_batching.sequential_vmap
def _dominant_of_one(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, " rank"], Float[Array, "n rank"]]:
    size = matrix.shape[-1]
    start = jax.random.normal(jax.random.key(0), (size, min(RANK, size)), matrix.dtype)

    def improve(_: Array, frame: Array) -> Array:
        return jnp.linalg.qr(matmul(matrix, frame))[0]

    frame = lax.fori_loop(0, ITERATIONS, improve, jnp.linalg.qr(start)[0])
    values, turn = jnp.linalg.eigh(matmul(frame.T, matmul(matrix, frame)))
    return jnp.maximum(values, 0), matmul(frame, turn)


def _turned(matrix: Float[Array, "*batch a b"]) -> Float[Array, "*batch b a"]:
    return jnp.swapaxes(matrix, -1, -2)
