"""Expectations of a smooth function read off a table: for grids of many thousand networks.

Quadrature in two dimensions costs 40,000 evaluations of the function an entry, the table a
hundred multiplications, whatever the function.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import CUTOFF, Moments, Nonlinearity, clipped

ORDER = 10
"""Coefficients of a cell's polynomial in either direction."""

SCALE, WIDTH, NUM_VARIANCES = 8.0, 0.25, 82
"""Cells of equal width in log(1 + SCALE variance), up to a variance of 1e8."""

NUM_CORRELATIONS = 12
"""Cells of either sign, each half as far from |c| = 1 as the one before."""

NUM_TERMS = 512
"""Terms of Mehler's series behind the table, and nodes of their coefficients."""


def is_smooth(phi: Nonlinearity) -> bool:
    """Whether :func:`tabulated` helps: no closed form, no kinks."""
    return phi.closed_form is None and not phi.kinks


@functools.lru_cache(maxsize=32)
def tabulated(phi: Nonlinearity) -> Nonlinearity:
    """The same function with a table for its closed form, in which both variances are equal.

    Piecewise polynomials in the variance and the correlation of E[phi phi] and its companions,
    made from Mehler's series sum_k a_k(std)^2 c^k.

    Args:
        phi: A function without kinks.

    Returns:
        The function; its ``closed_form`` uses ``variance_a`` for both.

    Accuracy:
        1e-9 of the value at c = 1 for variances up to 9 (tanh, gelu, silu;
        tests/test_fixed_point.py). Beyond, smooth functions turn into kinks: 1e-4 at any variance.
    """
    tables = _tables(phi)
    offset = float(_values(phi.function, np.zeros(1))[0] ** 2)

    def closed_form(variance_a: Array, variance_b: Array, covariance: Array) -> Moments:
        variance, c = variance_a, clipped(safe.divide(covariance, variance_a))
        cell, at = _place(variance, c)
        product, *rest = (_polynomial(jnp.asarray(table, c.dtype)[cell], *at) for table in tables)
        return Moments(offset + variance * product, *rest)

    return dataclasses.replace(phi, closed_form=closed_form)


def _place(variance: Array, c: Array) -> tuple[Array, tuple[Array, Array]]:
    """The cell of a point, and where in it the point is, from -1 to 1 in both directions."""
    s = jnp.log1p(SCALE * variance) / WIDTH
    row = jnp.clip(jnp.floor(jax.lax.stop_gradient(s)), 0, NUM_VARIANCES - 1)
    side = jnp.where(c >= 0, 1.0, -1.0)
    rest = 1 - side * c
    last = NUM_CORRELATIONS - 1
    halvings = -jnp.log2(jnp.maximum(jax.lax.stop_gradient(rest), 2.0**-last))
    column = jnp.clip(jnp.floor(halvings), 0, last)
    left = jnp.where(column == last, 0.0, 1.0)
    width = jnp.where(column == last, 2.0**-last, 2.0 ** -(column + 1))
    at = (2 * (s - row) - 1, 2 * (rest / width - left) - 1)
    cell = (row * 2 + (side > 0)) * NUM_CORRELATIONS + column
    return cell.astype(int), at


def _polynomial(coefficients: Array, x: Array, y: Array) -> Array:
    """Horner's scheme in both variables; coefficients (..., ORDER, ORDER)."""
    total = 0.0
    for i in reversed(range(ORDER)):
        row = 0.0
        for j in reversed(range(ORDER)):
            row = row * y + coefficients[..., i, j]
        total = total * x + row
    return total


def _values(function, x: np.ndarray) -> np.ndarray:
    with jax.ensure_compile_time_eval(), jax.enable_x64():
        return np.asarray(function(jnp.asarray(x)))


def _tables(phi: Nonlinearity) -> np.ndarray:
    """Polynomials of (E[phi phi] - phi(0)^2) / variance and the other moments, (4, cells, ...)."""
    nodes = np.cos(np.pi * (np.arange(ORDER) + 0.5) / ORDER)
    s = WIDTH * (np.arange(NUM_VARIANCES)[:, None] + (1 + nodes) / 2)
    variance = np.expm1(s.ravel()) / SCALE
    last = NUM_CORRELATIONS - 1
    width = 2.0 ** -np.minimum(np.arange(NUM_CORRELATIONS) + 1, last)
    left = np.where(np.arange(NUM_CORRELATIONS) == last, 0.0, 1.0)
    rest = width[:, None] * (left[:, None] + (1 + nodes) / 2)
    c = np.stack([rest - 1, 1 - rest]).ravel()

    a = _coefficients(phi, np.sqrt(variance))
    powers = np.vander(c, NUM_TERMS, increasing=True).T
    moments = np.stack([(a[i] * a[j]) @ powers for i, j in ((0, 0), (1, 1), (2, 2), (3, 1))])
    moments[0] -= _values(phi.function, np.zeros(1)) ** 2
    moments[0] /= variance[:, None]
    blocks = moments.reshape(4, NUM_VARIANCES, ORDER, 2, NUM_CORRELATIONS, ORDER)
    inverse = np.linalg.inv(np.vander(nodes, increasing=True))
    cells = np.einsum("ia,jb,mvasub->mvsuij", inverse, inverse, blocks)
    return cells.reshape(4, -1, ORDER, ORDER)


def _coefficients(phi: Nonlinearity, std: np.ndarray) -> np.ndarray:
    """Hermite coefficients of phi, phi', phi' x and phi' x^2, (4, std, terms)."""
    x, step = np.linspace(-CUTOFF, CUTOFF, NUM_TERMS, retstep=True)
    weight = step * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    hermite = np.empty((NUM_TERMS, NUM_TERMS))
    before, now = np.zeros_like(x), np.ones_like(x)
    for k in range(NUM_TERMS):
        hermite[k] = now
        before, now = now, (x * now - np.sqrt(k) * before) / np.sqrt(k + 1)
    u = std[:, None] * x
    value, slope = _values(phi.function, u), _values(phi.derivative, u)
    functions = np.stack([value, slope, slope * x, slope * x**2])
    return (weight * functions) @ hermite.T
