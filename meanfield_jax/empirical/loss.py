"""Losses: their targets, and their mean over samples as a function of the outputs."""

from typing import Any

import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float

from meanfield_jax.checks import array, check_finite, check_labels, targets
from meanfield_jax.errors import DataError, problem

LOSSES = {"squared": "gaussian", "cross_entropy": "categorical", "bernoulli": "bernoulli"}
"""The likelihood whose Fisher matrix is the curvature of each loss."""


def checked_targets(
    loss: str, y: Any, shape: tuple[int, ...], dtype: Any, name: str = "y"
) -> Array:
    """The targets in the form that :func:`mean_loss` takes.

    Args:
        loss: A name of ``LOSSES``.
        y: Labels (n, ...), without the outputs' last axis, or targets of the outputs' shape.
        shape: The shape of the outputs, (n, ..., C).
        dtype: Their dtype.
        name: The argument, for messages.

    Returns:
        Labels for the cross-entropy where labels were given, else targets of the outputs' shape.

    Raises:
        DataError: if they do not fit the outputs.
    """
    if loss == "squared" and len(shape) == 2:
        return targets(name, y, *shape, dtype)
    y = array(name, y)
    if loss == "cross_entropy" and y.shape == shape[:-1]:
        check_labels(name, y, shape[-1])
        return y.astype(int)
    if y.shape != shape:
        labels = f"labels {shape[:-1]} or " * (loss == "cross_entropy")
        remedy = f"pass {labels}targets {shape}"
        raise problem(DataError, f"{name}.shape", y.shape, "does not fit the outputs", remedy)
    check_finite(name, y)
    return y.astype(dtype)


def mean_loss(loss: str, outputs: Float[Array, "n ..."], y: Array) -> Float[Array, ""]:
    """The loss, a mean over samples and a sum over all outputs of a sample.

    Args:
        loss: A name of ``LOSSES``.
        outputs: The outputs, (n, ..., C).
        y: What :func:`checked_targets` returned.

    Returns:
        The loss, ().
    """
    if loss == "squared":
        values = (outputs - y) ** 2 / 2
    elif loss == "bernoulli":
        values = optax.sigmoid_binary_cross_entropy(outputs, y)
    elif y.shape == outputs.shape:
        values = optax.softmax_cross_entropy(outputs, y)
    else:
        values = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return jnp.sum(values) / len(outputs)
