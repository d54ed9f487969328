"""Theory against networks drawn at random: the one Monte Carlo harness of the tests.

The networks are made by ``build`` under jit, by a generator of random numbers that compiles fast,
and their tangent kernels come from dense Jacobians: no line of the operators is used.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.kernel.kernel import Kernel
from meanfield_jax.theory.compiled import known_numbers, without_widths
from meanfield_jax.theory.memory_plan import modulus_for
from meanfield_jax.theory.passes import on_data

NUM_VECTORS = 3
"""Eigenvectors of the predicted kernel whose quadratic forms are compared."""

ON_CPU = jax.default_backend() == "cpu"
UNFUSED = {"xla_disable_hlo_passes": "fusion"} if ON_CPU else None
"""Options under which a program that holds a whole theory compiles faster on CPU."""

QUICK = UNFUSED | {"xla_backend_optimization_level": 0} if ON_CPU else None
"""The same for small arrays, with which no time is spent."""

TOGETHER = 16
"""Draws of one call, so that any number of draws shares a program."""


@functools.partial(jax.jit, static_argnames=("network", "statistics"))
def _tangents(network: mf.Network, statistics: str, keys, x):
    def draw(key, x):
        model = mf.build(network, rngs=nnx.Rngs(key))
        if statistics == "frozen":
            mf.calibrate(model, x)
            model.eval()
        apply, params = mf.functional(model)
        rows = [
            leaf.reshape(len(x), network.output_shape[0], -1)
            for leaf in jax.tree.leaves(jax.jacrev(apply)(params, x))
        ]
        jacobian = jnp.concatenate(rows, -1)
        products = jnp.einsum("ikp,jkp->ij", jacobian, jacobian, precision="highest")
        return products / network.output_shape[0]

    return jax.vmap(draw)(keys, x)


def tangents(
    network: mf.Network, x: Any, draws: int, *, statistics: str = "batch", seed: int = 1
) -> np.ndarray:
    """The tangent kernels of random networks, averaged over the outputs, (draws, n, n).

    Args:
        network: The specification, its numbers floats.
        x: A batch, (n, *input_shape); or a number n: Gaussian inputs, others for each draw.
        draws: How many networks, a multiple of ``TOGETHER``.
        statistics: "batch", or "frozen" after a calibration on the batch.
        seed: Of all draws.
    """
    rng, found = np.random.default_rng(seed), []
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), draws)
    with jax.enable_x64(False):
        for first in range(0, draws, TOGETHER):
            if isinstance(x, int):
                inputs = rng.normal(size=(TOGETHER, x, *network.input_shape))
            else:
                inputs = np.broadcast_to(x, (TOGETHER, *np.shape(x)))
            part = keys[first : first + TOGETHER]
            found.append(_tangents(network, statistics, part, inputs.astype(np.float32)))
    return np.concatenate(found)


@functools.partial(jax.jit, static_argnames=("statistics", "modulus"), compiler_options=QUICK)
def _kernel(body, widths, x, statistics: str, modulus: int) -> Kernel:
    return on_data(body, widths, x, statistics, modulus).kernel


def kernel(
    network: mf.Network, x: Any, statistics: str = "batch", modulus: int | None = None
) -> Kernel:
    """That of the outputs on a batch by theory, in float64.

    It is ``mf.analyze(network, data=x).kernel``, but as its own program, without what else there is
    in a theory, which compiles several times as fast. Other widths share the program.

    Args:
        network: The specification.
        x: A batch, (n, *input_shape).
        statistics: As in ``mf.analyze``.
        modulus: Of the pairs of positions that are kept; None: that of ``mf.analyze``.
    """
    with jax.enable_x64():
        x = jnp.asarray(x, float)
        known = without_widths(known_numbers(network.body))
        modulus = modulus or modulus_for(*known, x, statistics)
        return jax.device_get(_kernel(*known, x, statistics, modulus))


def predicted(network: mf.Network, x: Any, statistics: str = "batch") -> np.ndarray:
    """The tangent kernel on a batch by theory, in float64, (n, n)."""
    return kernel(network, x, statistics).tangent.entries


def summaries(matrix: np.ndarray, vectors=()) -> np.ndarray:
    """Mean on the diagonal, mean off it, and the quadratic forms of vectors, (..., numbers)."""
    matrix = np.asarray(matrix, np.float64)
    n = matrix.shape[-1]
    trace, total = np.trace(matrix, axis1=-2, axis2=-1), matrix.sum((-2, -1))
    forms = [np.einsum("i,...ij,j", vector, matrix, vector) for vector in vectors]
    return np.stack([trace / n, (total - trace) / (n * (n - 1)), *forms], -1)


def assert_mean(values: Any, expected: Any, width: float, scale: Any = None) -> None:
    """The mean over draws, the leading axis, is as expected.

    To four standard errors and what finite width may cost.
    """
    values = np.asarray(values, np.float64)
    error = standard_error(values)
    options = dict(standard_error=error, width=width)
    assert_close(values.mean(0), expected, "monte_carlo", scale, **options)


def assert_meets_theory(
    network: mf.Network, x: Any, width: float, draws: int = 32, statistics: str = "batch"
) -> None:
    """Theory on a batch, or of n Gaussian inputs, is the mean over draws of networks.

    Args:
        network: The specification.
        x: A batch, or n.
        width: The smallest width; differences of 3/width are allowed, see ``tolerance``.
        draws: How many networks.
        statistics: As in ``tangents``.
    """
    measured = tangents(network, x, draws, statistics=statistics)
    if isinstance(x, int):
        with jax.enable_x64():
            fisher = mf.analyze(network, num_samples=x, statistics=statistics).fisher
        assert_mean(summaries(measured), [fisher.tangent_same, fisher.tangent_other], width)
        return
    expected = predicted(network, x, statistics)
    vectors = np.linalg.eigh(expected)[1][:, -NUM_VECTORS:].T
    assert_mean(summaries(measured, vectors), summaries(expected, vectors), width)


def outliers(network: mf.Network, x: Any, draws: int, statistics: str = "batch") -> np.ndarray:
    """Mean of the C largest eigenvalues of the Fisher matrix of each draw, by Lanczos, (draws,).

    Args:
        network: The specification.
        x: As in ``tangents``.
        draws: How many networks.
        statistics: As in ``tangents``.
    """
    means = []
    for seed in range(draws):
        inputs = x
        if isinstance(x, int):
            inputs = np.random.default_rng(seed).normal(size=(x, *network.input_shape))
        inputs = jnp.asarray(inputs, jnp.float32)
        model = mf.build(network, rngs=nnx.Rngs(100 + seed))
        if statistics == "frozen":
            mf.calibrate(model, inputs)
        operator = mf.fisher_operator(model, inputs, statistics=statistics)
        found = mf.top_eigenvalues(operator, network.output_shape[0], tol=1e-3).raise_if_failed()
        means.append(float(found.eigenvalues.mean()))
    return np.array(means)
