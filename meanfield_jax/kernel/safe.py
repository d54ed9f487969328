"""Square root, arcsine and division whose derivatives stay finite at the edge of their domain.

Kernels reach the edge exactly: the correlation of a sample with itself is 1, and a BatchNorm with
gamma = 0 has variance 0. The textbook forms return the right value there but NaN derivatives.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float


def sqrt(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Square root of max(x, 0); where x <= 0, derivatives of every order are 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def geometric_mean(a: Float[Array, "..."], b: Float[Array, "..."]) -> Float[Array, "..."]:
    """sqrt(a b) for a, b >= 0, even if their product is out of range; exactly a where a = b."""
    size = lax.stop_gradient(jnp.maximum(a, b))
    return size * sqrt(divide(a, size) * divide(b, size))


def divide(numerator: Array, denominator: Array) -> Float[Array, "..."]:
    """Quotient, and 0 with zero derivatives where the denominator is 0."""
    nonzero = denominator != 0
    return jnp.where(nonzero, numerator / jnp.where(nonzero, denominator, 1.0), 0.0)


def asin(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Arcsine of x clipped to [-1, 1]; the derivative is 0 at and beyond the ends."""
    inside = jnp.abs(x) < 1
    edge = jnp.sign(x) * (jnp.pi / 2)
    return jnp.where(inside, jnp.arcsin(jnp.where(inside, x, 0.0)), edge)
