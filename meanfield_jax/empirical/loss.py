"""Losses: their targets, their mean over samples, and their curvature in the outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from meanfield_jax.checks import array, check_finite, check_labels, targets
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.limits import within
from meanfield_jax.precise import einsum

Loss = str | Callable[[Any, Any], Any]
"""The name of a loss, or a function of outputs and targets."""

LOSSES = {"squared": "gaussian", "cross_entropy": "categorical", "bernoulli": "bernoulli"}
"""The likelihood whose Fisher matrix is the curvature of each named loss."""


def check_loss(loss: Any) -> None:
    """Raises SpecError unless it is the name of a loss, or a function."""
    known = loss in LOSSES if isinstance(loss, str) else callable(loss) and _hashable(loss)
    if known:
        return
    remedy = f"use one of {', '.join(LOSSES)}, or a function of outputs and targets"
    raise problem(SpecError, "loss", loss, "unknown", remedy)


def _hashable(loss: Any) -> bool:
    """Whether programs can be kept for it."""
    try:
        hash(loss)
    except TypeError:
        return False
    return True


def checked_targets(
    loss: Loss, y: Any, shape: tuple[int, ...], dtype: Any, name: str = "y"
) -> Array:
    """The targets in the form that :func:`mean_loss` takes.

    Args:
        loss: A name of ``LOSSES``, or a function.
        y: Labels (n, ...), without the outputs' last axis, or targets of the outputs' shape; for a
            function whatever it takes.
        shape: The shape of the outputs, (n, ..., C).
        dtype: Their dtype.
        name: The argument, for messages.

    Returns:
        Labels for the cross-entropy where labels were given, else targets of the outputs' shape.

    Raises:
        DataError: if they do not fit the outputs.
        SpecError: if a function does not return one loss for each sample, or their mean.
    """
    if loss == "squared" and len(shape) == 2:
        return targets(name, y, *shape, dtype)
    y = array(name, y)
    if not isinstance(loss, str):
        _check_function(loss, jax.ShapeDtypeStruct(shape, dtype), y)
        return y
    if loss == "cross_entropy" and y.shape == shape[:-1]:
        check_labels(name, y, shape[-1])
        return y.astype(int)
    if y.shape != shape:
        labels = f"labels {shape[:-1]} or " * (loss == "cross_entropy")
        remedy = f"pass {labels}targets {shape}"
        raise problem(DataError, f"{name}.shape", y.shape, "does not fit the outputs", remedy)
    check_finite(name, y)
    return y.astype(dtype)


def _check_function(
    loss: Callable[[Any, Any], Any], outputs: jax.ShapeDtypeStruct, y: Array
) -> None:
    """Raises SpecError unless the function returns one number for each sample, or one number."""
    found: Any = None
    cause = "must return a loss for each sample, or their mean"
    try:
        found = jax.eval_shape(loss, outputs, y)
    except Exception as error:  # whatever a user's function raises
        said = " ".join(str(error).split())[:200]
        cause = f"fails on outputs {outputs.shape} and targets {y.shape} ({said})"
    shape = getattr(found, "shape", None)
    if shape not in ((), outputs.shape[:1]) or not jnp.issubdtype(found.dtype, jnp.floating):
        remedy = f"return an array {outputs.shape[:1]} or a number"
        raise problem(SpecError, "loss", loss, cause, remedy)


def mean_loss(loss: Loss, outputs: Float[Array, "n ..."], y: Array) -> Float[Array, ""]:
    """The loss, a mean over samples; named ones are a sum over all outputs of a sample.

    Args:
        loss: A name of ``LOSSES``, or a function.
        outputs: The outputs, (n, ..., C).
        y: What :func:`checked_targets` returned.

    Returns:
        The loss, ().
    """
    if not isinstance(loss, str):
        return jnp.mean(loss(outputs, y))
    if loss == "squared":
        values = (outputs - y) ** 2 / 2
    elif loss == "bernoulli":
        values = optax.sigmoid_binary_cross_entropy(outputs, y)
    elif y.shape == outputs.shape:
        values = optax.softmax_cross_entropy(outputs, y)
    else:
        values = optax.softmax_cross_entropy_with_integer_labels(outputs, y)
    return jnp.sum(values) / len(outputs)


def curvature(
    loss: Callable[[Any, Any], Any], outputs: Float[Array, "n ..."], y: Any
) -> Float[Array, "n size size"]:
    """The Hessian of a loss in the outputs of each sample.

    Args:
        loss: A function of outputs and targets, which returns a loss for each sample or their mean.
        outputs: The outputs, (n, ..., C).
        y: Targets, as the function takes them.

    Returns:
        (n, size, size), where size counts all outputs of a sample.

    Raises:
        SpecError: if the function fails, is not convex at these outputs, or couples samples. Under
            jit this is not checked.
    """
    n, size = len(outputs), outputs.size // len(outputs)
    within("MEMORY", "loss", loss, 24.0 * n * size**2)
    y = checked_targets(loss, y, outputs.shape, outputs.dtype)
    found, along, direction = _hessians(loss, outputs, y)
    if isinstance(found, Tracer):
        return found
    hessians = np.asarray(found, float)
    if not np.isfinite(hessians).all():
        cause, remedy = "its second derivative is not finite", "use a loss that has one"
        raise problem(SpecError, "loss", loss, cause, remedy)
    eps = float(jnp.finfo(outputs.dtype).eps) ** 0.5
    scale = np.abs(hessians).max() * size
    error = np.abs(np.einsum("nij,nj->ni", hessians, np.asarray(direction, float)) - along)
    if error.max() > eps * scale * np.abs(direction).max():
        cause = "the loss of one sample depends on the outputs of others"
        remedy = "use a mean over samples"
        raise problem(SpecError, "loss", loss, cause, remedy)
    smallest = float(np.linalg.eigvalsh(hessians).min())
    if smallest < -eps * scale:
        cause = f"not convex at these outputs, its Hessian has an eigenvalue of {smallest:.3g}"
        raise problem(SpecError, "loss", loss, cause, "use a loss that is convex in the outputs")
    return found


@partial(jax.jit, static_argnums=0)
def _hessians(
    loss: Callable[[Any, Any], Any], outputs: Float[Array, "n ..."], y: Array
) -> tuple[Array, Array, Array]:
    """The Hessian of each sample, and what shows whether samples are coupled.

    With equal vectors for all samples a product with the whole Hessian gives a column of each
    sample's own, unless samples are coupled; a product with random vectors shows whether they are.

    Returns:
        The Hessians, the product with the whole Hessian, and the random vectors.
    """
    n, shape = len(outputs), outputs.shape
    flat = outputs.reshape(n, -1)
    slope = jax.grad(lambda values: n * mean_loss(loss, values.reshape(shape), y))

    def along(direction: Array) -> Array:
        return jax.jvp(slope, (flat,), (direction,))[1]

    units = jnp.eye(flat.shape[1], dtype=flat.dtype)
    columns = jax.lax.map(lambda unit: along(jnp.broadcast_to(unit[None], flat.shape)), units)
    direction = jax.random.normal(jax.random.key(0), flat.shape, flat.dtype)
    hessians = jnp.moveaxis(columns, 0, -1)
    return (hessians + hessians.mT) / 2, along(direction), direction


@jax.jit
def square_root(matrices: Float[Array, "n size size"]) -> Float[Array, "n size size"]:
    """The symmetric square root of each matrix; negative eigenvalues count as 0."""
    values, vectors = jnp.linalg.eigh(matrices)
    scaled = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    return einsum("nik,njk->nij", scaled, vectors)
