"""Expectations of an activation function over a pair of jointly Gaussian pre-activations.

A :class:`Nonlinearity` is a function with its known properties: its derivative, its kinks and, if
one exists, the closed form of its expectations. :func:`expectations` uses the closed form where it
holds (zero mean), and otherwise quadrature that is split at the kinks.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from meanfield_jax.kernel import safe

NUM_NODES = 192
"""Nodes per axis for a smooth function; half as many on each piece between kinks."""

NUM_TERMS = 80
"""Terms of Mehler's series."""

CHUNK = 128
"""Entries of a kernel integrated at a time, which bounds the memory."""

CUTOFF = 8.5
"""Where the standard Gaussian is cut off: the mass beyond is 2e-17."""


V = TypeVar("V", covariant=True)


class Moments(NamedTuple, Generic[V]):
    """The expectations that a layer rule needs: arrays, or matrices, of the covariance's shape.

    Attributes:
        product: E[phi(u) phi(v)].
        derivative: E[phi'(u) phi'(v)].
        scale: E[phi'(u) phi'(v) x y] with x, y the standardized u, v.
        square: E[phi'(u) phi'(v) x^2].
    """

    product: V
    derivative: V
    scale: V
    square: V


@dataclasses.dataclass(frozen=True)
class Nonlinearity:
    """A scalar function with the properties that the theory needs.

    Attributes:
        function: Elementwise function of an array, built from JAX operations.
        kinks: Points where the function or its derivative jumps; quadrature is split there.
        closed_form: Maps (variance_a, variance_b, covariance) to :class:`Moments`, for zero means.
    """

    function: Callable[[Array], Array]
    kinks: tuple[float, ...] = ()
    closed_form: Callable[[Array, Array, Array], Moments[Array]] | None = None

    def __call__(self, x: Array) -> Array:
        """phi(x), elementwise."""
        return self.function(x)

    def derivative(self, x: Array) -> Array:
        """phi'(x), elementwise."""
        return jax.jvp(self.function, (x,), (jnp.ones_like(x),))[1]


def expectations(
    phi: Nonlinearity,
    variance_a: Float[Array, "..."],
    variance_b: Float[Array, "..."],
    covariance: Float[Array, "..."],
    mean: Float[Array, ""] | None,
) -> Moments[Array]:
    """E[phi phi], E[phi' phi'], E[phi' phi' x y], E[phi' phi' x^2] at Gaussian u, v of equal mean.

    Args:
        phi: The activation function.
        variance_a: Var(u), broadcastable to the shape of ``covariance``.
        variance_b: Var(v), broadcastable to the shape of ``covariance``.
        covariance: Cov(u, v).
        mean: E[u] = E[v], a scalar; None where it is exactly 0.

    Returns:
        The moments, of the shape of ``covariance``.

    Accuracy:
        Closed forms are exact up to rounding. The relative error of the quadrature for variances up
        to 9 is 1e-10 for tanh, erf, gelu and silu, and with kinks 1e-11 for correlations up to .5
        and 1e-5 at .999 (tests/test_gaussian.py). At larger variances, smooth functions turn into
        kinks; see :func:`quadrature_error`. The derivative of the product with respect to the
        covariance is given by Price's theorem, also at c = 1.

    Source:
        Closed forms: Cho & Saul 2009 (ReLU), Williams 1997 (erf).
    """
    if mean is None and phi.closed_form is not None:
        return phi.closed_form(variance_a, variance_b, covariance)
    mean = jnp.zeros_like(covariance, shape=()) if mean is None else mean
    std_a, std_b = safe.sqrt(variance_a), safe.sqrt(variance_b)
    correlation = clipped(safe.divide(covariance, std_a * std_b))
    entries = jnp.broadcast_arrays(std_a, std_b, correlation)
    moments = jax.lax.map(
        lambda entry: _quadrature(phi, NUM_NODES, *entry, mean),
        tuple(entry.ravel() for entry in entries),
        batch_size=min(covariance.size, CHUNK),
    )
    return Moments(*(moment.reshape(covariance.shape) for moment in moments))


def batch_expectations(
    phi: Nonlinearity,
    variance: Float[Array, "... n"],
    covariance: Float[Array, "... n n"],
    mean: Float[Array, "..."] | None,
    of_members: Callable[[Array], tuple[Array, Array]],
) -> Moments[Array]:
    """The same for a matrix over a batch, whose values have a variance and perhaps a mean each.

    Without a closed form it uses Mehler's series: E[phi phi] = sum_k a_k(std_a) a_k(std_b) c^k,
    where a_k are the coefficients of phi(mean + std x) in normalized Hermite polynomials. It costs
    ``NUM_TERMS`` operations per entry, where quadrature costs 40,000.

    Args:
        phi: The activation function.
        variance: The variance of every value.
        covariance: The covariance of every pair of values.
        mean: The mean of all values, (), or of every value; None where it is exactly 0.
        of_members: Arranges one number per value by both members of every pair.

    Returns:
        The moments, of the shape of ``covariance``, (..., n, n).

    Accuracy:
        The values hold off the diagonal; for the entries on it (correlation 1) use
        :func:`variance_expectations`. For smooth functions and variances up to 4 the error is 1e-6
        at any correlation. With a kink the relative error is 1e-4 up to a correlation of .9 and 2 %
        at .99 (for derivatives; the product is a hundred times better).

    Source:
        Mehler 1866; in this use Daniely, Frostig & Singer 2016 (arXiv:1602.05897).
    """
    if mean is None and phi.closed_form is not None:
        return phi.closed_form(*of_members(variance), covariance)
    std = safe.sqrt(variance)
    std_a, std_b = of_members(std)
    c = clipped(safe.divide(covariance, std_a * std_b))
    coefficients = hermite_coefficients(phi, std, 0.0 if mean is None else mean)
    pairs = ((0, 0), (1, 1), (2, 2), (3, 1))

    def term(total: Moments[Array], both: Any) -> tuple[Moments[Array], None]:
        a, b = zip(*map(of_members, both), strict=True)
        parts = (c * value + a[i] * b[j] for value, (i, j) in zip(total, pairs, strict=True))
        return Moments(*parts), None

    zero = jnp.zeros(jnp.broadcast_shapes(std_a.shape, std_b.shape), c.dtype)
    series, _ = jax.lax.scan(term, Moments(*(zero,) * 4), coefficients, reverse=True, unroll=8)
    return series


def variance_expectations(
    phi: Nonlinearity, variance: Float[Array, "..."], mean: Float[Array, "..."] | None
) -> Moments[Array]:
    """The expectations at correlation 1, where u = v: one-dimensional integrals."""
    std, mean = safe.sqrt(variance), _of_each(mean, variance)
    x, weight = _nodes(_kinks(phi, mean, std), NUM_NODES)
    u = mean[..., None] + std[..., None] * x
    slope = phi.derivative(u) ** 2
    scale = jnp.sum(weight * slope * x**2, -1)
    product = jnp.sum(weight * phi.function(u) ** 2, -1)
    return Moments(product, jnp.sum(weight * slope, -1), scale, scale)


def hermite_coefficients(
    phi: Nonlinearity, std: Float[Array, "*shape"], mean: Array | float
) -> tuple[Float[Array, " terms *shape"], ...]:
    """Hermite coefficients of phi, phi', phi' x and phi' x^2 at mean + std x.

    They refer to normalized Hermite polynomials of x ~ N(0, 1); the first is the expectation.

    Returns:
        The coefficients of the four functions, in this order, (terms, *std.shape) each, with
        terms = ``NUM_TERMS``.
    """
    mean = _of_each(mean, std)
    x, weight = _nodes(_kinks(phi, mean, std), NUM_NODES)
    u = mean[..., None] + std[..., None] * x
    slope = phi.derivative(u)
    functions = [weight * value for value in (phi.function(u), slope, slope * x, slope * x**2)]

    def term(state: tuple[Array, Array], k: Array) -> tuple[Any, tuple[Array, ...]]:
        before, now = state
        after = (x * now - jnp.sqrt(k) * before) / jnp.sqrt(k + 1)
        return (now, after), tuple(jnp.sum(value * now, -1) for value in functions)

    start = (jnp.zeros_like(u), jnp.ones_like(u))
    return jax.lax.scan(term, start, jnp.arange(NUM_TERMS, dtype=u.dtype))[1]


def mean_value(
    phi: Nonlinearity, variance: Float[Array, "*shape"], mean: Array | None
) -> Float[Array, "*shape"]:
    """E[phi(u)] for u of this variance and mean; the mean is 0 if None."""
    std, mean = safe.sqrt(variance), _of_each(mean, variance)
    x, weight = _nodes(_kinks(phi, mean, std), NUM_NODES)
    return jnp.sum(weight * phi.function(mean[..., None] + std[..., None] * x), -1)


def _of_each(mean: Array | float | None, values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The mean of each of these values, which may be given as one number, or None for 0."""
    return jnp.broadcast_to(jnp.asarray(0.0 if mean is None else mean, values.dtype), values.shape)


def mehler(
    first: Sequence[Array], second: Sequence[Array], correlation: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The sum of E[f(x) g(y)] over pairs of functions given by their Hermite coefficients.

    Args:
        first: Coefficients of each f, (terms, ...).
        second: Coefficients of each g, (terms, ...).
        correlation: Correlation of the Gaussian x and y, of the shape to which the coefficients
            broadcast.

    Returns:
        The sum, of the shape of ``correlation``.

    Accuracy:
        That of :func:`batch_expectations`.
    """

    def term(total: Array, both: Any) -> tuple[Array, None]:
        return correlation * total + sum(a * b for a, b in zip(*both, strict=True)), None

    both = (tuple(first), tuple(second))
    return jax.lax.scan(term, jnp.zeros_like(correlation), both, reverse=True)[0]


def quadrature_error(
    phi: Nonlinearity, variance: float, correlation: float = 0.5, mean: float = 0.0
) -> float:
    """Relative error of the quadrature at one point, estimated from using 2/3 of the nodes."""
    std, c, offset = (jnp.asarray(value, float) for value in (variance**0.5, correlation, mean))
    fine = _quadrature(phi, NUM_NODES, std, std, c, offset)
    coarse = _quadrature(phi, 2 * NUM_NODES // 3, std, std, c, offset)
    changes = [abs(a - b) / (abs(a) + 1e-300) for a, b in zip(fine, coarse, strict=True)]
    return float(max(changes))


def clipped(correlation: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The value clipped to [-1, 1]; rounding beyond the ends does not change the derivative."""
    return correlation + jax.lax.stop_gradient(jnp.clip(correlation, -1.0, 1.0) - correlation)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _quadrature(
    phi: Nonlinearity,
    num_nodes: int,
    std_a: Float[Array, "*shape"],
    std_b: Float[Array, "*shape"],
    correlation: Float[Array, "*shape"],
    mean: Float[Array, ""],
) -> Moments[Array]:
    """Iterated integral over x and over the part w of y that is independent of x."""
    rest = safe.sqrt(1.0 - correlation**2)
    x, weight_x = _nodes(_kinks(phi, mean, std_a), num_nodes)
    outer_mean = mean + (std_b * correlation)[..., None] * x
    outer_std = jnp.broadcast_to((std_b * rest)[..., None], outer_mean.shape)
    w, weight_w = _nodes(_kinks(phi, outer_mean, outer_std), num_nodes)
    v = outer_mean[..., None] + outer_std[..., None] * w
    y = (correlation[..., None] * x)[..., None] + rest[..., None, None] * w

    def average(value_u: Array, value_v: Array) -> Array:
        return jnp.sum(weight_x * value_u * jnp.sum(weight_w * value_v, -1), -1)

    u = mean + std_a[..., None] * x
    slope_u, slope_v = phi.derivative(u), phi.derivative(v)
    return Moments(
        average(phi.function(u), phi.function(v)),
        average(slope_u, slope_v),
        average(slope_u * x, slope_v * y),
        average(slope_u * x**2, slope_v),
    )


@_quadrature.defjvp
def _quadrature_jvp(
    phi: Nonlinearity, num_nodes: int, primals: tuple[Array, ...], tangents: tuple[Array, ...]
) -> tuple[Moments[Array], Moments[Array]]:
    """The derivative of the product in c by Price's theorem; the nodes do not see it at c = 1."""
    *fixed, correlation, mean = primals
    *fixed_dot, correlation_dot, mean_dot = tangents
    rule = _quadrature.fun

    def at_fixed_correlation(std_a: Array, std_b: Array, mean: Array) -> Moments[Array]:
        return rule(phi, num_nodes, std_a, std_b, correlation, mean)

    # computed separately, not by the next line, so that higher derivatives use this rule again
    moments = _quadrature(phi, num_nodes, *primals)
    _, dots = jax.jvp(at_fixed_correlation, (*fixed, mean), (*fixed_dot, mean_dot))
    _, along = jax.jvp(
        lambda c: rule(phi, num_nodes, *fixed, c, mean), (correlation,), (correlation_dot,)
    )
    std_a, std_b = fixed
    price = std_a * std_b * moments.derivative * correlation_dot
    total = jax.tree.map(jnp.add, dots, along)
    return moments, total._replace(product=dots.product + price)


def _kinks(
    phi: Nonlinearity, mean: Array | float, std: Float[Array, "*shape"]
) -> Float[Array, "*shape kinks"]:
    """The kinks in units of the standardized variable, (..., kinks), inside the cutoff."""
    if not phi.kinks:
        return jnp.zeros((*std.shape, 0), std.dtype)
    some = std > 0
    scale = jnp.where(some, std, 1.0)
    points = jnp.stack([(kink - mean) / scale for kink in phi.kinks], -1)
    # for a deterministic value, the kink is put on the side that leaves all mass in one piece
    points = jnp.where(some[..., None], points, jnp.sign(points) * CUTOFF)
    return jnp.clip(points, -CUTOFF, CUTOFF)


def _nodes(
    kinks: Float[Array, "*shape kinks"], num_nodes: int
) -> tuple[Float[Array, "*shape nodes"], Float[Array, "*shape nodes"]]:
    """Nodes and Gaussian weights, (..., nodes): Gauss-Legendre on the pieces between kinks.

    Without kinks the nodes are equally spaced: nothing converges faster for an analytic function
    times a Gaussian.

    Returns:
        Nodes, in units of the standardized variable, and weights, which include the density.
    """
    if kinks.shape[-1] == 0:
        x, step = np.linspace(-CUTOFF, CUTOFF, num_nodes, retstep=True)
        density = step * np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        shape = (*kinks.shape[:-1], num_nodes)
        nodes, weights = (jnp.asarray(values, kinks.dtype) for values in (x, density))
        return jnp.broadcast_to(nodes, shape), jnp.broadcast_to(weights, shape)
    node, weight = np.polynomial.legendre.leggauss(num_nodes // 2)
    ends = jnp.full((*kinks.shape[:-1], 1), CUTOFF, kinks.dtype)
    edges = jnp.concatenate([-ends, jnp.sort(kinks, -1), ends], -1)
    centre, half = (edges[..., 1:] + edges[..., :-1]) / 2, (edges[..., 1:] - edges[..., :-1]) / 2
    shape = (*centre.shape, node.size)
    node, weight = (
        jnp.broadcast_to(jnp.asarray(values, kinks.dtype), shape) for values in (node, weight)
    )
    x = centre[..., None] + half[..., None] * node
    weights = half[..., None] * weight
    density = jnp.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    shape = (*kinks.shape[:-1], -1)
    return x.reshape(shape), (weights * density).reshape(shape)
