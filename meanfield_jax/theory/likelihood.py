"""Likelihoods of the Fisher matrix: squared loss, or softmax outputs with cross-entropy."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from meanfield_jax.checks import check_choice
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.gram_matrix import GramMatrix
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.precise import einsum, matmul
from meanfield_jax.theory.fisher import Fisher
from meanfield_jax.theory.passes import Found

LIKELIHOODS = ("gaussian", "categorical")

COUPLED = 1000
"""Size of the matrix that couples kernel eigenvectors and classes of a categorical likelihood."""

SAMPLES = 4096
"""Samples of which each drawn network's mean information is computed, for i.i.d. inputs."""

NETWORKS, NETWORKS_ON_DATA = 16, 4
"""Drawn networks over whose logits a categorical likelihood is averaged."""


def check_likelihood(
    network: Network, likelihood: str, probabilities: Array | None, num_samples: int | None
) -> None:
    """Raises SpecError if the likelihood, or the class probabilities, cannot be used."""
    check_choice("likelihood", likelihood, LIKELIHOODS)
    if likelihood == "gaussian":
        if probabilities is not None:
            cause, remedy = "a Gaussian likelihood uses none", "use likelihood='categorical'"
            raise problem(SpecError, "probabilities", "(given)", cause, remedy)
        return
    num_outputs = network.num_outputs
    within("MEMORY", "likelihood", likelihood, 8 * num_outputs**2 * (num_samples or 1))
    if probabilities is None:
        return
    p, known = jnp.asarray(probabilities), not isinstance(probabilities, Tracer)
    if p.ndim != 2 or p.shape[1] != num_outputs or num_samples not in (None, p.shape[0]):
        remedy = f"pass ({num_samples or 'samples'}, {num_outputs}), rows of softmax outputs"
        raise problem(SpecError, "probabilities.shape", p.shape, "does not fit", remedy)
    if known:
        given = np.asarray(probabilities)
        if not (np.all(given >= 0) and np.allclose(given.sum(1), 1, atol=1e-3)):
            remedy = "pass softmax outputs, not logits"
            raise problem(SpecError, "probabilities", "(array)", "rows must sum to 1", remedy)


def of_outputs(
    found: Found, num_outputs: int, likelihood: str, probabilities: Array | None
) -> Fisher:
    """The statistics of F for all outputs, from those for one.

    Args:
        found: The results of a pass.
        num_outputs: C.
        likelihood: One of ``LIKELIHOODS``.
        probabilities: Class probabilities, (n, C); None: those of random networks, whose logits are
            Gaussian with the covariance that the pass found.

    Returns:
        The statistics, without the number of parameters.
    """
    fisher, dtype = found.fisher, found.kernel.dtype
    if likelihood == "gaussian":
        # jnp.ones would be compiled for each number of outputs
        ones = jax.device_put(np.ones(num_outputs, dtype))
        width = fisher.draw_width * num_outputs**0.5
        return dataclasses.replace(
            fisher, draw_width=width, information=ones, multiplicity=num_outputs
        )
    p = None if probabilities is None else jnp.asarray(probabilities, dtype)
    if found.vectors is None:
        return _categorical(fisher, found.kernel.moment.averages(), p, num_outputs)
    moment = found.kernel.moment
    assert isinstance(moment, GramMatrix)
    return _categorical_on_data(fisher, found.vectors, moment.entries, p, num_outputs)


@partial(jax.jit, static_argnames="num_outputs")
def _categorical(
    fisher: Fisher, logits: Any, p: Float[Array, "n outputs"] | None, num_outputs: int
) -> Fisher:
    """For i.i.d. inputs; ``logits`` are the variance and the covariance of two samples."""
    if p is not None:
        return _informed(fisher, jnp.linalg.eigvalsh(_covariance(p).mean(0))[None])
    same, other = logits
    shared = jnp.sqrt(jnp.clip(other, 0, same))
    own = jnp.sqrt(jnp.maximum(same - jnp.maximum(other, 0), 0))

    def one(key: Array) -> Array:
        common, single = jax.random.split(key)
        logits = shared * jax.random.normal(common, (1, num_outputs), same.dtype)
        logits += own * jax.random.normal(single, (SAMPLES, num_outputs), same.dtype)
        p = jax.nn.softmax(logits)
        return jnp.linalg.eigvalsh(jnp.diag(p.mean(0)) - matmul(p.T, p) / SAMPLES)

    keys = jax.random.split(jax.random.key(0), NETWORKS)
    return _informed(fisher, jax.lax.map(one, keys))


@partial(jax.jit, static_argnames="num_outputs")
def _categorical_on_data(
    fisher: Fisher,
    vectors: Float[Array, "n n"],
    moment: Float[Array, "n n"],
    p: Float[Array, "n outputs"] | None,
    num_outputs: int,
) -> Fisher:
    """For a batch; ``moment`` is the covariance of the logits of all samples."""
    num_samples, dtype = len(vectors), vectors.dtype

    def one(p: Array) -> tuple[Array, Array]:
        classes = _covariance(p)
        assert fisher.eigenvalues is not None
        found = _coupled(fisher.eigenvalues[::-1], vectors, classes)
        return jnp.linalg.eigvalsh(classes.mean(0)), found[::-1]

    def drawn(key: Array) -> tuple[Array, Array]:
        # rounding errors are no more than this
        floor = num_samples * jnp.finfo(dtype).eps * jnp.trace(moment) / num_samples
        root = jnp.linalg.cholesky(moment + floor * jnp.eye(num_samples, dtype=dtype))
        normal = jax.random.normal(key, (num_samples, num_outputs), dtype)
        return one(jax.nn.softmax(matmul(root, normal)))

    if p is not None:
        spectra, eigenvalues = (each[None] for each in one(p))
    else:
        keys = jax.random.split(jax.random.key(0), NETWORKS_ON_DATA)
        spectra, eigenvalues = jax.lax.map(drawn, keys)
    return _informed(dataclasses.replace(fisher, eigenvalues=eigenvalues.mean(0)), spectra)


def _informed(fisher: Fisher, spectra: Float[Array, "networks outputs"]) -> Fisher:
    """The statistics with the eigenvalues of the outputs' mean information in each network."""
    information = spectra.mean(0)
    largest, mean = information[-1], information.mean()
    # how many outputs there are in effect
    number = jnp.mean(spectra.sum(1) ** 2 / jnp.sum(spectra**2, 1))
    return dataclasses.replace(
        fisher,
        contributions=jax.tree.map(lambda part: largest * part, fisher.contributions),
        bulk_contributions=mean * fisher.bulk_contributions,
        draw_width=jnp.sqrt(number) * fisher.draw_width,
        information=information,
        multiplicity=1,
    )


def _coupled(
    eigenvalues: Float[Array, " n"],
    vectors: Float[Array, "n n"],
    classes: Float[Array, "n outputs outputs"],
) -> Float[Array, " all"]:
    """The eigenvalues of F from those of T/n for one output, ascending."""
    num_samples, num_outputs = len(vectors), classes.shape[-1]
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
