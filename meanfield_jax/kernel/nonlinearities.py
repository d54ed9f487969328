"""The activation functions that have a name, and the closed forms of their expectations."""

import jax
import jax.numpy as jnp
from jax import Array

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import Moments, Nonlinearity, clipped


def rectifier(slope: float) -> Nonlinearity:
    """max(x, slope x): piecewise linear, hence phi'(u) u = phi(u)."""

    def closed_form(variance_a: Array, variance_b: Array, covariance: Array) -> Moments[Array]:
        scale = safe.geometric_mean(variance_a, variance_b)
        c = clipped(safe.divide(covariance, scale))
        angle = jnp.pi / 2 + safe.asin(c)
        first = (safe.sqrt(1.0 - c**2) + c * angle) / jnp.pi
        product = (1 - slope) ** 2 / 2 * first + slope * c
        derivative = (1 - slope) ** 2 / 2 * angle / jnp.pi + slope
        square = (1 - slope) ** 2 / 2 * (angle + c * safe.sqrt(1.0 - c**2)) / jnp.pi + slope
        return Moments(scale * product, derivative, product, square)

    def function(x: Array) -> Array:
        return jax.nn.relu(x) if slope == 0 else jax.nn.leaky_relu(x, slope)

    return Nonlinearity(function, kinks=(0.0,), closed_form=closed_form)


def _erf_moments(variance_a: Array, variance_b: Array, covariance: Array) -> Moments[Array]:
    wide = (1 + 2 * variance_a) * (1 + 2 * variance_b)
    determinant = wide - 4 * covariance**2
    derivative = 4 / jnp.pi / jnp.sqrt(determinant)
    std_product = safe.geometric_mean(variance_a, variance_b)
    # phi' phi' is itself a Gaussian factor, which shrinks the covariance to cov / determinant
    return Moments(
        2 / jnp.pi * safe.asin(2 * covariance / jnp.sqrt(wide)),
        derivative,
        derivative * safe.divide(covariance, std_product) / determinant,
        derivative
        * (1 + 2 * variance_b - 2 * safe.divide(covariance**2, variance_a))
        / determinant,
    )


def _identity_moments(variance_a: Array, variance_b: Array, covariance: Array) -> Moments[Array]:
    correlation = safe.divide(covariance, safe.geometric_mean(variance_a, variance_b))
    one = jnp.ones_like(covariance)
    return Moments(covariance, one, correlation, one)


def _identity(x: Array) -> Array:
    return x


def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


NONLINEARITIES: dict[str, Nonlinearity] = {
    "relu": rectifier(0.0),
    "leaky_relu": rectifier(0.1),
    "tanh": Nonlinearity(jnp.tanh),
    "erf": Nonlinearity(jax.scipy.special.erf, closed_form=_erf_moments),
    "gelu": Nonlinearity(_gelu),
    "gelu_tanh": Nonlinearity(jax.nn.gelu),
    "silu": Nonlinearity(jax.nn.silu),
    "sigmoid": Nonlinearity(jax.nn.sigmoid),
    "softplus": Nonlinearity(jax.nn.softplus),
    "elu": Nonlinearity(jax.nn.elu, kinks=(0.0,)),
    "selu": Nonlinearity(jax.nn.selu, kinks=(0.0,)),
    "relu6": Nonlinearity(jax.nn.relu6, kinks=(0.0, 6.0)),
    "hard_silu": Nonlinearity(jax.nn.hard_silu, kinks=(-3.0, 3.0)),
    "identity": Nonlinearity(_identity, closed_form=_identity_moments),
}
"""The activation functions that have a name; ``leaky_relu`` has slope 0.1, ``gelu_tanh`` is the
approximation that is the default of Flax."""
