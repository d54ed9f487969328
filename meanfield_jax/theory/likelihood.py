"""Likelihoods of the Fisher matrix: squared loss, or softmax outputs with cross-entropy."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from meanfield_jax.checks import check_choice
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.precise import einsum

LIKELIHOODS = ("gaussian", "categorical")

COUPLED = 1000
"""Size of the matrix that couples kernel eigenvectors and classes of a categorical likelihood."""


def class_information(
    network: Network, likelihood: str, probabilities: Array | None, num_samples: int | None
) -> Float[Array, "n_or_1 outputs outputs"] | None:
    """S = diag p - p p^T for every sample; None for a Gaussian likelihood."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "gaussian":
        if probabilities is not None:
            cause, remedy = "a Gaussian likelihood uses none", "use likelihood='categorical'"
            raise problem(SpecError, "probabilities", "(given)", cause, remedy)
        return None
    num_outputs = network.num_outputs
    within("MEMORY", "likelihood", likelihood, 8 * num_outputs**2 * (num_samples or 1))
    dtype = jnp.result_type(float, *jax.tree.leaves(network))
    if probabilities is None:
        return _covariance(jnp.full((1, num_outputs), 1 / num_outputs, dtype))
    p, known = jnp.asarray(probabilities, dtype), not isinstance(probabilities, Tracer)
    if p.ndim != 2 or p.shape[1] != num_outputs or num_samples not in (None, p.shape[0]):
        remedy = f"pass ({num_samples or 'samples'}, {num_outputs}), rows of softmax outputs"
        raise problem(SpecError, "probabilities.shape", p.shape, "does not fit", remedy)
    if known:
        given = np.asarray(probabilities)
        if not (np.all(given >= 0) and np.allclose(given.sum(1), 1, atol=1e-3)):
            remedy = "pass softmax outputs, not logits"
            raise problem(SpecError, "probabilities", "(array)", "rows must sum to 1", remedy)
    return _covariance(p)


class Outputs(NamedTuple):
    """The outputs in three numbers, so that theory is not compiled for how many there are.

    Attributes:
        largest: The largest eigenvalue of their mean information.
        mean: Its mean eigenvalue.
        number: How many there are in effect.
    """

    largest: Array | float
    mean: Array | float
    number: Array | float


def mean_information(
    num_outputs: int, classes: Float[Array, "n_or_1 outputs outputs"] | None, dtype: Any
) -> tuple[Outputs, dict[str, Any]]:
    """Eigenvalues of the mean information of the outputs, and the multiplicity in F.

    Returns:
        What a pass needs to know of the outputs, and two attributes of :class:`Fisher`.
    """
    if classes is None:
        # jnp.ones would be compiled for each number of outputs
        ones = jax.device_put(np.ones(num_outputs, dtype))
        outputs = Outputs(1.0, 1.0, float(num_outputs))
        return outputs, dict(information=ones, multiplicity=num_outputs)
    found = jnp.linalg.eigvalsh(classes.mean(0))
    outputs = Outputs(found[-1], found.mean(), found.sum() ** 2 / jnp.sum(found**2))
    return outputs, dict(information=found, multiplicity=1)


def of_outputs(
    eigenvalues: Float[Array, " n"],
    vectors: Float[Array, "n n"],
    classes: Float[Array, "n_or_1 outputs outputs"] | None,
) -> Float[Array, " all"]:
    """The eigenvalues of F from those of T/n for one output, ascending."""
    if classes is None:
        return eigenvalues
    num_samples, num_outputs = len(vectors), classes.shape[-1]
    classes = jnp.broadcast_to(classes, (num_samples, num_outputs, num_outputs))
    coupled = min(num_samples, max(COUPLED // num_outputs, 1))
    scaled = vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))[None]
    top, rest = scaled[:, num_samples - coupled :], scaled[:, : num_samples - coupled]
    matrix = einsum("ia,ib,ikl->akbl", top, top, classes)
    large = jnp.linalg.eigvalsh(matrix.reshape(coupled * num_outputs, -1))
    small = jnp.linalg.eigvalsh(einsum("ia,ikl->akl", rest**2, classes))
    return jnp.sort(jnp.concatenate([large, small.ravel()]))


def _covariance(
    probabilities: Float[Array, "n outputs"],
) -> Float[Array, "n outputs outputs"]:
    """diag(p) - p p^T for class probabilities p."""
    outer = probabilities[:, :, None] * probabilities[:, None, :]
    identity = jnp.eye(probabilities.shape[-1], dtype=outer.dtype)
    return probabilities[:, :, None] * identity[None] - outer
