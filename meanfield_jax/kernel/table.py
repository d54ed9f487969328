"""Expectations of a smooth function from a table, for grids of many thousands of networks.

Quadrature in two dimensions costs 40,000 evaluations of the function per entry; the table costs a
hundred multiplications, whatever the function.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import CUTOFF, Moments, Nonlinearity, clipped

ORDER = 10
"""Coefficients of a cell's polynomial in each of the two directions."""

SCALE, WIDTH, NUM_VARIANCES = 8.0, 0.25, 82
"""Cells of equal width in log(1 + SCALE variance), up to a variance of 1e8."""

HALVINGS = 11
MIDDLE = 0.25
"""Cells in c: |c| <= MIDDLE, and HALVINGS for each sign, each half as far from |c| = 1."""

NUM_CORRELATIONS = 1 + 2 * HALVINGS

NUM_TERMS = 512
"""Terms of Mehler's series for the table, and quadrature nodes for their coefficients."""


def is_smooth(phi: Nonlinearity) -> bool:
    """Whether :func:`tabulated` is useful: the function has no closed form and no kinks."""
    return phi.closed_form is None and not phi.kinks


@functools.lru_cache(maxsize=32)
def tabulated(phi: Nonlinearity) -> Nonlinearity:
    """The same function with a table as its closed form, for equal variances.

    The table represents E[phi phi] and the other moments by piecewise polynomials in the variance
    and the correlation, computed from Mehler's series sum_k a_k(std)^2 c^k.

    Args:
        phi: A function without kinks.

    Returns:
        The function; its ``closed_form`` uses ``variance_a`` for both variances.

    Accuracy:
        1e-9 of the value at c = 1 for variances up to 9 (tanh, gelu, silu;
        tests/test_fixed_point.py). At larger variances smooth functions turn into kinks: 1e-4 at
        any variance.
    """
    tables = _tables(phi)
    offset = float(_values(phi.function, np.zeros(1))[0] ** 2)

    def read(moment: int, variance: Array, c: Array) -> Array:
        cell, at = _place(variance, c)
        return _polynomial(jnp.asarray(tables[moment], c.dtype)[cell], *at)

    @jax.custom_jvp
    def product(variance: Array, c: Array) -> Array:
        return read(0, variance, c)

    @product.defjvp
    def product_jvp(
        primals: tuple[Array, Array], tangents: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """In c by Price's theorem, which keeps digits that the polynomial's derivative loses."""
        (variance, c), (variance_dot, c_dot) = primals, tangents
        _, along = jax.jvp(lambda variance: read(0, variance, c), (variance,), (variance_dot,))
        return product(variance, c), along + read(1, variance, c) * c_dot

    def closed_form(variance_a: Array, variance_b: Array, covariance: Array) -> Moments[Array]:
        variance, c = variance_a, clipped(safe.divide(covariance, variance_a))
        rest = (read(moment, variance, c) for moment in (1, 2, 3))
        return Moments(offset + variance * product(variance, c), *rest)

    return dataclasses.replace(phi, closed_form=closed_form)


def _place(
    variance: Float[Array, "..."], c: Float[Array, "*shape"]
) -> tuple[Int[Array, "*shape"], tuple[Array, Array]]:
    """The cell of a point, and its coordinates in the cell, from -1 to 1 in both directions."""
    s = jnp.log1p(SCALE * variance) / WIDTH
    row = jnp.clip(jnp.floor(jax.lax.stop_gradient(s)), 0, NUM_VARIANCES - 1)
    side = jnp.where(c >= 0, 1.0, -1.0)
    rest = (1 - side * c) / (1 - MIDDLE)
    halvings = jnp.ceil(-jnp.log2(jnp.maximum(jax.lax.stop_gradient(rest), 2.0**-HALVINGS)))
    column = jnp.clip(halvings, 0, HALVINGS)
    last = jnp.where(column == HALVINGS, 1.0, 0.0)
    scaled = rest * 2.0 ** (column - last) - (1 - last)
    # the middle is one cell for both signs, because odd functions have their fixed points there
    at = (2 * (s - row) - 1, jnp.where(column == 0, c / MIDDLE, 2 * scaled - 1))
    cell = row * NUM_CORRELATIONS + column + jnp.where((side < 0) & (column > 0), HALVINGS, 0.0)
    return cell.astype(int), at


def _polynomial(
    coefficients: Float[Array, "*shape order order"],
    x: Float[Array, "..."],
    y: Float[Array, "*shape"],
) -> Float[Array, "*shape"]:
    """The sum over i and j of coefficients_ij x^i y^j."""
    rows = jnp.sum(coefficients * _powers(y)[..., None, :], -1)
    return jnp.sum(rows * _powers(x), -1)


def _powers(x: Float[Array, "*shape"]) -> Float[Array, "*shape order"]:
    return jnp.stack(
        list(itertools.accumulate([x] * (ORDER - 1), jnp.multiply, initial=jnp.ones_like(x))), -1
    )


def _values(
    function: Callable[[Array], Array], x: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    with jax.ensure_compile_time_eval(), jax.enable_x64():
        return np.asarray(function(jnp.asarray(x)))


def _tables(phi: Nonlinearity) -> Float[np.ndarray, "4 cells order order"]:
    """Polynomials of (E[phi phi] - phi(0)^2) / variance and of the other moments."""
    nodes = np.cos(np.pi * (np.arange(ORDER) + 0.5) / ORDER)
    s = WIDTH * (np.arange(NUM_VARIANCES)[:, None] + (1 + nodes) / 2)
    variance = np.expm1(s.ravel()) / SCALE
    halvings = np.arange(1, HALVINGS + 1)[:, None]
    last = halvings == HALVINGS
    rest = (1 - MIDDLE) * 2.0 ** (last - halvings) * ((1 + nodes) / 2 + ~last)
    c = np.concatenate([MIDDLE * nodes[None], 1 - rest, rest - 1]).ravel()

    a = _coefficients(phi, np.sqrt(variance))
    powers = np.vander(c, NUM_TERMS, increasing=True).T
    moments = np.stack([(a[i] * a[j]) @ powers for i, j in ((0, 0), (1, 1), (2, 2), (3, 1))])
    moments[0] -= _values(phi.function, np.zeros(1)) ** 2
    moments[0] /= variance[:, None]
    blocks = moments.reshape(4, NUM_VARIANCES, ORDER, NUM_CORRELATIONS, ORDER)
    inverse = np.linalg.inv(np.vander(nodes, increasing=True))
    cells = np.einsum("ia,jb,mvaub->mvuij", inverse, inverse, blocks)
    return cells.reshape(4, -1, ORDER, ORDER)


def _coefficients(
    phi: Nonlinearity, std: Float[np.ndarray, " stds"]
) -> Float[np.ndarray, "4 stds terms"]:
    """Hermite coefficients of phi, phi', phi' x and phi' x^2."""
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
