"""Theory against networks: top eigenvalues of real Fisher matrices, small enough for every run."""

import jax
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.empirical.lanczos import top_eigenvalues

DRAWS, OUTPUTS, NUM_SAMPLES = 4, 10, 200
FC = mf.mlp([500] * 2, inputs=400, outputs=OUTPUTS, norm=mf.BatchNorm(1.0))
DEEP = mf.mlp([500] * 3, inputs=400, outputs=OUTPUTS, norm=mf.BatchNorm(1.0))
VANILLA = mf.mlp([500] * 2, inputs=400, outputs=OUTPUTS)
CONV = mf.cnn([30, 60], inputs=(16, 16, 3), norm=mf.BatchNorm(1.0, axes="position"))


def outliers(network: mf.Network, statistics: str, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """Mean of the C largest eigenvalues of each draw of parameters and inputs, (DRAWS,)."""
    means = []
    for draw in range(DRAWS):
        x = jax.random.normal(jax.random.key(draw), (num_samples, *network.input_shape))
        model = mf.build(network, rngs=nnx.Rngs(100 + draw))
        if statistics == "frozen":
            mf.calibrate(model, x)
        op = mf.fisher_operator(model, x, statistics=statistics)
        found = top_eigenvalues(op, k=OUTPUTS, tol=1e-3).raise_if_failed()
        means.append(float(found.eigenvalues.mean()))
    return np.array(means)


def check(network: mf.Network, statistics: str, width: float, num_samples: int = NUM_SAMPLES):
    draws = outliers(network, statistics, num_samples)
    theory = mf.analyze(network, statistics=statistics, num_samples=num_samples)
    assert_close(
        draws.mean(),
        float(theory.fisher.outlier),
        "monte_carlo",
        standard_error=standard_error(draws),
        width=width,
    )
    return draws


@pytest.mark.slow
def test_fully_connected_network_in_training():
    check(FC, "batch", width=500)


@pytest.mark.slow
def test_fully_connected_network_in_evaluation():
    check(FC, "frozen", width=400)


@pytest.mark.slow
def test_fully_connected_network_without_normalization():
    check(VANILLA, "batch", width=400)


@pytest.mark.slow
def test_convolutional_network_in_training():
    check(CONV, "batch", width=60, num_samples=100)


@pytest.mark.slow
def test_the_published_theory_lies_between_training_and_evaluation():
    batch, frozen = (outliers(DEEP, statistics) for statistics in ("batch", "frozen"))
    theory = mf.analyze(DEEP, statistics="wei2019", num_samples=NUM_SAMPLES)
    published = float(theory.fisher.outlier)
    assert batch.mean() + 4 * standard_error(batch) < published
    assert published < frozen.mean() - 4 * standard_error(frozen)
