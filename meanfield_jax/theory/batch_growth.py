"""The exact growth of gradients with BatchNorm on a small batch."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from meanfield_jax.arguments import checked
from meanfield_jax.checks import scalar
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.gaussian import Nonlinearity
from meanfield_jax.layers import Activation

NUM_NODES = 256
"""Gauss-Legendre nodes on each piece between kinks."""

REACH = 8.0
"""Where the density of a component is cut off on large batches, in standard deviations."""


@checked(gamma=scalar, beta=scalar)
def batch_growth(
    activation: str | Activation,
    num_samples: int,
    *,
    gamma: float | Array = 1.0,
    beta: float | Array = 0.0,
) -> Float[Array, ""]:
    r"""The growth of squared gradients per block [Dense, BatchNorm, activation] on a batch of n.

    A unit's normalized values on the batch are sqrt(n) u, where u is uniform on the unit sphere of
    the n - 1 dimensions orthogonal to (1, ..., 1). With phi evaluated at gamma sqrt(n) u + beta,
    the growth is

    .. math:: \frac{n \gamma^2}{n-3} \frac{E[\phi_a'^2 (1 - 1/n - u_a^2)]
        + E[\phi_a' \phi_b' (1/n + u_a u_b)]}{E[\phi_a^2] - E[\phi_a \phi_b]}

    for two samples a, b of the batch. The variances of weights and biases drop out, and eps = 0.
    :func:`fixed_point` returns the same quantity as ``growth`` for any block, but with u taken to
    be Gaussian. That is exact for n -> infinity and, with beta = 0, for functions that are linear
    on each side of 0; it is 15 % too large for tanh at n = 8.

    Args:
        activation: A name, or an :class:`Activation`.
        num_samples: n, at least 4: for fewer Gaussian values the mean inverse variance diverges.
        gamma: Scale of the BatchNorm.
        beta: Offset of the BatchNorm.

    Returns:
        The growth, (); differentiable in gamma and beta.

    Raises:
        SpecError: for fewer than 4 samples.

    Accuracy:
        1e-9 relative for gamma up to 3. For ReLU 1e-8 on a batch of 4 and 1e-12 on larger ones
        (compared with the closed form, tests/test_fixed_point.py).

    Example:
        >>> import meanfield_jax as mf
        >>> print(f"{mf.batch_growth('relu', 8):.4f}")
        1.7882

    Source:
        Yang et al. 2019 (arXiv:1902.08129), sections 3 and 4. Departure: a single formula for all
        functions, from the Jacobian (sqrt(n)/|Hz|) (H - u u^T) of the normalized values.
    """
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 4:
        cause = "the inverse variance in a BatchNorm has no expectation for fewer than 4 samples"
        raise problem(SpecError, "num_samples", num_samples, cause, "pass an integer >= 4")
    phi = (Activation(activation) if isinstance(activation, str) else activation).nonlinearity
    gamma, beta = jnp.asarray(gamma, float), jnp.asarray(beta, float)
    share = 1 / num_samples
    # x and y stand for sqrt(n) u_a and sqrt(n) u_b
    c = -1 / (num_samples - 1)
    kinks = _kinks(phi, gamma, beta)
    # where the kink of b enters and leaves the range of values that b can take, given a
    reach = jnp.sqrt((1 - c**2) * jnp.maximum(num_samples - 1 - kinks**2, 0))
    kinks = jnp.concatenate([kinks, c * kinks - reach, c * kinks + reach], -1)
    x, weight = _component(kinks, num_samples - 1)
    slope_a, value_a = phi.derivative(gamma * x + beta), phi.function(gamma * x + beta)
    # given x, y = c x + rest, where the rest is a component on the remaining sphere
    left = num_samples - 1 - x**2
    radius = jnp.sqrt(left * (1 - c**2) / (num_samples - 2))
    w, inner = _component(_kinks(phi, gamma * radius, beta + gamma * c * x), num_samples - 2)
    y = c * x[:, None] + radius[:, None] * w
    slope_b, value_b = phi.derivative(gamma * y + beta), phi.function(gamma * y + beta)

    def mean(at_a: Array, at_b: Array | None = None) -> Array:
        return jnp.sum(weight * at_a * (1.0 if at_b is None else jnp.sum(inner * at_b, -1)))

    same = mean(slope_a**2 * (1 - share - share * x**2))
    other = share * (mean(slope_a, slope_b) + mean(slope_a * x, slope_b * y))
    variance = mean(value_a**2) - mean(value_a, value_b)
    return num_samples / (num_samples - 3) * gamma**2 * (same + other) / variance


def _kinks(
    phi: Nonlinearity, scale: Float[Array, "..."], mean: Float[Array, "..."]
) -> Float[Array, "*shape kinks"]:
    """The values of x at which scale x + mean is a kink."""
    shape = jnp.broadcast_shapes(scale.shape, mean.shape)
    points = [jnp.broadcast_to((kink - mean) / scale, shape) for kink in phi.kinks]
    return jnp.stack(points, -1) if points else jnp.zeros((*shape, 0))


def _component(
    kinks: Float[Array, "*shape kinks"], dimension: int
) -> tuple[Float[Array, "*shape nodes"], Float[Array, "*shape nodes"]]:
    """Nodes and weights for one component of a uniform vector of length sqrt(dimension).

    With x = sqrt(d) sin(t) the density (1 - x^2/d)^((d-3)/2) becomes cos(t)^(d-2), which has no
    singularity for d >= 2; it is integrated between the kinks.

    Returns:
        Nodes and weights; the weights add up to 1.
    """
    reach = min(np.pi / 2, REACH / np.sqrt(dimension))
    root = np.sqrt(dimension)
    edges = [jnp.full(kinks.shape[:-1], sign * reach)[..., None] for sign in (-1, 1)]
    inside = jnp.clip(jnp.sort(kinks, -1) / root, -np.sin(reach), np.sin(reach))
    edges = jnp.concatenate([edges[0], jnp.arcsin(inside), edges[1]], -1)
    half = (edges[..., 1:] - edges[..., :-1])[..., None] / 2
    node, weight = (
        jnp.broadcast_to(jnp.asarray(values, kinks.dtype), (*half.shape[:-1], NUM_NODES))
        for values in np.polynomial.legendre.leggauss(NUM_NODES)
    )
    t = edges[..., :-1, None] + half * (1 + node)
    density = half * weight * jnp.cos(t) ** (dimension - 2)
    shape = (*kinks.shape[:-1], -1)
    density = density.reshape(shape)
    return root * jnp.sin(t).reshape(shape), density / density.sum(-1, keepdims=True)
