"""The measured boundary of stable training, and spectra side by side."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.experiments import boundary

LINEAR = mf.Network((5,), (mf.Dense(2),))


def samples(num_samples: int, inputs: int, outputs: int):
    x = jax.random.normal(jax.random.key(0), (num_samples, inputs))
    return x, jax.nn.one_hot(jnp.arange(num_samples) % outputs, outputs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_of_a_linear_model_it_is_the_bound(momentum):
    """The loss is quadratic and its curvature the Fisher matrix: theory is exact."""
    x, y = samples(20, 5, 2)
    found = mf.measured_boundary(LINEAR, x, y, draws=2, momentum=momentum, tol=0.01, num_steps=800)
    curvature = jnp.linalg.eigvalsh((x @ x.T + 1) / 20)[-1]
    assert_close(found.predicted, 2 * (1 + momentum) / curvature, "rounding", dtype=np.float32)
    assert np.all(found.boundary <= 1.002 * float(found.predicted[0]))
    assert np.all(found.boundary >= 0.985 * float(found.predicted[0]))


@pytest.mark.parametrize("true", [0.02, 0.3, 1.0, 3.3, 50.0])
def test_bisection_brackets_the_boundary(true):
    low = boundary._bisect(lambda rate: rate <= true, 1.0, 1.05)
    assert low <= true < 1.05 * low


@pytest.mark.parametrize("answer", [True, False])
def test_a_boundary_out_of_reach_is_not_a_number(answer):
    assert np.isnan(boundary._bisect(lambda rate: answer, 1.0, 1.05))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(y=np.ones((4, 3))), ("y.shape=(4, 3)", "(20, 2)")),
        (dict(draws=0), ("draws=0", "at least 1")),
        (dict(num_steps=0), ("num_steps=0", "at least 1")),
        (dict(tol=0.0), ("tol=0.0", "above 0")),
        (dict(residual=0.0), ("residual=0.0", "above 0")),
        (dict(gammas=(1.0,)), ("gammas=[1.0]", "no BatchNorm")),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    x, y = samples(20, 5, 2)
    with pytest.raises((mf.SpecError, mf.DataError)) as error:
        mf.measured_boundary(LINEAR, x, **(dict(y=y) | options))
    assert all(word in str(error.value) for word in words)


@pytest.mark.slow
def test_batch_norm_trains_up_to_the_predicted_rate():
    """The published theory would put the bound 30 % lower."""
    network = mf.mlp([300] * 2, inputs=100, outputs=10, norm=mf.BatchNorm())
    x, y = samples(200, 100, 10)
    found = mf.measured_boundary(network, x, y, draws=3, residual=1e-3)
    assert 0.9 < float(found.ratio[0]) < 1.1
    published = mf.analyze(network, data=x, statistics="wei2019").eta_max()
    assert found.boundary.min() > 1.1 * float(published)
    # far from the targets the loss is thrown up, and the curvature falls
    far = mf.measured_boundary(network, x, y, draws=3)
    assert np.all(far.boundary > found.boundary)


def test_spectra_are_compared_given_the_inputs():
    """One wide layer, whose kernel's eigenvalues are well apart."""
    scale = jnp.array([8.0, 4.0, 2.0])
    x = jax.random.normal(jax.random.key(0), (30, 3)) * scale
    network = mf.mlp([2000], inputs=3, outputs=1)
    found = mf.validate(network, x, draws=4, num_eigenvalues=3, tol=1e-4).isel(network=0, mode=0)
    for rank in range(3):
        draws = found.spectrum_measured[:, rank].values
        predicted = float(found.spectrum_predicted[rank])
        error = standard_error(draws)
        assert_close(draws.mean(), predicted, "monte_carlo", standard_error=error, width=2000 / 30)
    mean, error = found.trace_measured.mean(), standard_error(found.trace_measured)
    # the estimate from random signs has an error of its own, the same in every draw
    signs = float(found.trace_predicted) * np.sqrt(2 / 30)
    predicted = float(found.trace_predicted)
    assert_close(mean, predicted, "monte_carlo", 0, standard_error=np.hypot(error, signs))


@pytest.mark.parametrize("number", [0, 21])
def test_more_eigenvalues_than_there_are_is_refused(number):
    with pytest.raises(mf.SpecError, match=f"num_eigenvalues={number}: the kernel has 20"):
        mf.validate(LINEAR, samples(20, 5, 2)[0], num_eigenvalues=number)
