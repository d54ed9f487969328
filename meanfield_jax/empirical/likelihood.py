"""The likelihood's part of a Fisher matrix: a factor of the information of each output."""

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from meanfield_jax.empirical.linearized import Product
from meanfield_jax.precise import einsum

LIKELIHOODS = ("gaussian", "categorical", "bernoulli")


def likelihood_factor(
    likelihood: str,
    outputs: Float[Array, "n ..."],
    root: Float[Array, "n size size"] | None = None,
) -> tuple[Product, Product]:
    """Products with B and with B^T, where B B^T = Lambda for every sample.

    Categorical: B = diag(s) (1 - s s^T), s = sqrt(p). Bernoulli: B = diag(sqrt(p (1 - p))).

    Args:
        likelihood: One of ``LIKELIHOODS``.
        outputs: The outputs, (n, ..., C).
        root: B itself, symmetric, which replaces the likelihood's; None for that.

    Returns:
        Two functions that act on arrays of the outputs' shape.
    """
    if root is not None:
        rows = root.shape[:2]

        def rotate(u: Array) -> Array:
            return einsum("nij,nj->ni", root, u.reshape(rows)).reshape(u.shape)

        return rotate, rotate
    if likelihood == "gaussian":
        return (lambda u: u), (lambda u: u)
    if likelihood == "bernoulli":
        # computed from |f|, so that nothing overflows
        decay = jnp.exp(-jnp.abs(outputs) / 2)
        root = decay / (1 + decay**2)
        return (lambda u: root * u), (lambda u: root * u)
    root = jnp.sqrt(jax.nn.softmax(outputs, axis=-1))

    def project(u: Array) -> Array:
        return u - root * jnp.sum(root * u, axis=-1, keepdims=True)

    return (lambda u: root * project(u)), (lambda u: project(root * u))
