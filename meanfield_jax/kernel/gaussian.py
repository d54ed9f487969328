"""Expectations of an activation function over a pair of jointly Gaussian pre-activations.

A :class:`Nonlinearity` is a function with what is known about it: its derivative, where it has
kinks, whether it is homogeneous, and, where one exists, the closed form of its expectations.
:func:`expectations` is the one entry: it takes the closed form when it holds (zero mean), and
Gauss-Legendre quadrature split at the kinks otherwise.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.kernel import safe

NUM_NODES = 48
"""Gauss-Legendre nodes on each smooth piece and axis; see :func:`quadrature_error`."""

CHUNK = 512
"""Entries of a kernel integrated at a time: a bound on memory."""

CUTOFF = 9.0
"""Where the standard Gaussian is cut: the mass beyond is 2e-19."""


class Moments(NamedTuple):
    """The three expectations a layer rule needs, each of the shape of the covariance.

    Attributes:
        product: E[phi(u) phi(v)].
        derivative: E[phi'(u) phi'(v)].
        scale: E[phi'(u) phi'(v) x y] with x, y the standardized u, v.
    """

    product: Array
    derivative: Array
    scale: Array


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """A scalar function with what the theory has to know about it.

    Attributes:
        function: Elementwise function of an array, built from JAX operations.
        kinks: Points where the function or its derivative jumps; quadrature is split there.
        closed_form: Maps (variance_a, variance_b, covariance) to :class:`Moments` for zero means.
    """

    function: Callable[[Array], Array]
    kinks: tuple[float, ...] = ()
    closed_form: Callable[[Array, Array, Array], Moments] | None = None

    def derivative(self, x: Array) -> Array:
        """phi'(x), elementwise."""
        return jax.jvp(self.function, (x,), (jnp.ones_like(x),))[1]


def expectations(
    phi: Nonlinearity,
    variance_a: Array,
    variance_b: Array,
    covariance: Array,
    mean: Array | None,
) -> Moments:
    """E[phi phi], E[phi' phi'] and E[phi' phi' x y] for (u, v) Gaussian with equal means.

    Args:
        phi: The activation function.
        variance_a: Var(u), broadcastable to the shape of ``covariance``.
        variance_b: Var(v), likewise.
        covariance: Cov(u, v).
        mean: E[u] = E[v], a scalar; None where it is exactly 0.

    Returns:
        The moments, of the shape of ``covariance``.

    Accuracy:
        Closed forms: rounding. Quadrature: 1e-12 relative for tanh, erf, gelu and silu up to
        variance 9 and for ReLU with an offset (tests/test_gaussian.py).

    Source:
        Closed forms: Cho & Saul 2009 (ReLU), Williams 1997 (erf).
    """
    if mean is None and phi.closed_form is not None:
        return phi.closed_form(variance_a, variance_b, covariance)
    mean = jnp.zeros_like(covariance, shape=()) if mean is None else mean
    entries = jnp.broadcast_arrays(variance_a, variance_b, covariance)
    moments = jax.lax.map(
        lambda entry: _quadrature(phi, entry[0], entry[1], entry[2], mean, NUM_NODES),
        tuple(entry.ravel() for entry in entries),
        batch_size=min(covariance.size, CHUNK),
    )
    return Moments(*(moment.reshape(covariance.shape) for moment in moments))


def quadrature_error(
    phi: Nonlinearity, variance: float, correlation: float = 0.5, mean: float = 0.0
) -> float:
    """Estimated relative error of the quadrature at one point: the change from 2/3 of the nodes."""
    var, cov, offset = (jnp.asarray(a, float) for a in (variance, correlation * variance, mean))
    fine = _quadrature(phi, var, var, cov, offset, NUM_NODES)
    coarse = _quadrature(phi, var, var, cov, offset, 2 * NUM_NODES // 3)
    changes = [abs(a - b) / (abs(a) + 1e-300) for a, b in zip(fine, coarse, strict=True)]
    return float(max(changes))


def _quadrature(phi, variance_a, variance_b, covariance, mean, num_nodes: int) -> Moments:
    """Iterated integral over x and the part of y independent of x, each split at the kinks."""
    std_a, std_b = safe.sqrt(variance_a), safe.sqrt(variance_b)
    correlation = jnp.clip(safe.divide(covariance, std_a * std_b), -1.0, 1.0)
    std_a, std_b, correlation = jnp.broadcast_arrays(std_a, std_b, correlation)
    rest = safe.sqrt(1.0 - correlation**2)

    x, weight_x = _nodes(_kinks(phi, mean, std_a), num_nodes)
    inner_mean = mean + std_b[..., None] * correlation[..., None] * x
    inner_std = std_b[..., None] * rest[..., None]
    w, weight_w = _nodes(_kinks(phi, inner_mean, inner_std), num_nodes)
    v = inner_mean[..., None] + inner_std[..., None] * w
    y = correlation[..., None, None] * x[..., None] + rest[..., None, None] * w

    def average(value_u: Array, value_v: Array) -> Array:
        return jnp.sum(weight_x * value_u * jnp.sum(weight_w * value_v, -1), -1)

    u = mean + std_a[..., None] * x
    slope_u, slope_v = phi.derivative(u), phi.derivative(v)
    return Moments(
        average(phi.function(u), phi.function(v)),
        average(slope_u, slope_v),
        average(slope_u * x, slope_v * y),
    )


def _kinks(phi: Nonlinearity, mean: Array, std: Array) -> Array:
    """The kinks in units of the standardized variable, (..., kinks), inside the cutoff."""
    points = (jnp.asarray(phi.kinks, std.dtype) - jnp.asarray(mean)[..., None]) / jnp.where(
        std > 0, std, 1.0
    )[..., None]
    # a deterministic value has its kink on the side where the piece with all the mass stays
    points = jnp.where((std > 0)[..., None], points, jnp.sign(points) * CUTOFF)
    return jnp.clip(points, -CUTOFF, CUTOFF)


def _nodes(kinks: Array, num_nodes: int) -> tuple[Array, Array]:
    """Nodes and Gaussian weights, (..., pieces * num_nodes), on the pieces between the kinks."""
    node, weight = np.polynomial.legendre.leggauss(num_nodes)
    ends = jnp.full((*kinks.shape[:-1], 1), CUTOFF, kinks.dtype)
    edges = jnp.concatenate([-ends, jnp.sort(kinks, -1), ends], -1)
    centre, half = (edges[..., 1:] + edges[..., :-1]) / 2, (edges[..., 1:] - edges[..., :-1]) / 2
    x = centre[..., None] + half[..., None] * jnp.asarray(node, kinks.dtype)
    density = jnp.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    weights = half[..., None] * jnp.asarray(weight, kinks.dtype) * density
    return x.reshape(*kinks.shape[:-1], -1), weights.reshape(*kinks.shape[:-1], -1)


def _rectifier(slope: float) -> Nonlinearity:
    """max(x, slope x): piecewise linear, hence phi'(u) u = phi(u)."""

    def closed_form(variance_a: Array, variance_b: Array, covariance: Array) -> Moments:
        scale = safe.sqrt(variance_a * variance_b)
        c = jnp.clip(safe.divide(covariance, scale), -1.0, 1.0)
        angle = jnp.pi / 2 + safe.asin(c)
        first = (safe.sqrt(1.0 - c**2) + c * angle) / jnp.pi
        product = (1 - slope) ** 2 / 2 * first + slope * c
        derivative = (1 - slope) ** 2 / 2 * angle / jnp.pi + slope
        return Moments(scale * product, derivative, product)

    def function(x: Array) -> Array:
        return jax.nn.relu(x) if slope == 0 else jax.nn.leaky_relu(x, slope)

    return Nonlinearity(function, kinks=(0.0,), closed_form=closed_form)


def _erf_moments(variance_a: Array, variance_b: Array, covariance: Array) -> Moments:
    wide = (1 + 2 * variance_a) * (1 + 2 * variance_b)
    determinant = wide - 4 * covariance**2
    derivative = 4 / jnp.pi / jnp.sqrt(determinant)
    std_product = safe.sqrt(variance_a * variance_b)
    # phi' phi' is itself a Gaussian factor, which shrinks the covariance to cov / determinant
    return Moments(
        2 / jnp.pi * safe.asin(2 * covariance / jnp.sqrt(wide)),
        derivative,
        derivative * safe.divide(covariance, std_product) / determinant,
    )


def _identity_moments(variance_a: Array, variance_b: Array, covariance: Array) -> Moments:
    correlation = safe.divide(covariance, safe.sqrt(variance_a * variance_b))
    return Moments(covariance, jnp.ones_like(covariance), correlation)


def _identity(x: Array) -> Array:
    return x


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


NONLINEARITIES: dict[str, Nonlinearity] = {
    "relu": _rectifier(0.0),
    "leaky_relu": _rectifier(0.1),
    "tanh": Nonlinearity(jnp.tanh),
    "erf": Nonlinearity(jax.scipy.special.erf, closed_form=_erf_moments),
    "gelu": Nonlinearity(_gelu),
    "silu": Nonlinearity(jax.nn.silu),
    "identity": Nonlinearity(_identity, closed_form=_identity_moments),
}
"""The activation functions that can be named; ``leaky_relu`` has slope 0.1."""
