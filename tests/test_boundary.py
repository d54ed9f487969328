"""The measured boundary of stable training, and spectra side by side."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import SMALL_NORM
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.experiments import boundary
from meanfield_jax.variants import with_gamma, without_norms

LINEAR = mf.Network((5,), (mf.Dense(2),))


def samples(num_samples: int, inputs: int, outputs: int):
    x = np.random.default_rng(0).normal(size=(num_samples, inputs))
    y = np.eye(outputs)[np.arange(num_samples) % outputs]
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_of_a_linear_model_it_is_the_bound(momentum):
    """The loss is quadratic and its curvature the Fisher matrix: theory is exact."""
    x, y = samples(20, 5, 2)
    found = mf.measured_boundary(LINEAR, x, y, draws=2, momentum=momentum, tol=0.01, num_steps=800)
    curvature = np.linalg.eigvalsh((np.asarray(x @ x.T) + 1) / 20)[-1]
    assert_close(found.predicted, 2 * (1 + momentum) / curvature, "rounding", dtype=np.float32)
    assert np.all(found.boundary <= 1.002 * float(found.predicted[0]))
    assert np.all(found.boundary >= 0.985 * float(found.predicted[0]))


TRUE = np.array([0.02, 0.3, 1.0, 3.3, 50.0])


def test_bisection_brackets_every_boundary():
    low = boundary._bisect(lambda rates: rates <= TRUE, np.ones(5), 1.05)
    assert np.all((low <= TRUE) & (1.05 * low > TRUE))


def test_boundaries_out_of_reach_are_not_numbers_and_the_others_are_found():
    true = np.array([0.0, 0.3, np.inf, 3.3])
    low = boundary._bisect(lambda rates: rates <= true, np.ones(4), 1.05)
    np.testing.assert_array_equal(np.isnan(low), [True, False, True, False])
    alone = boundary._bisect(lambda rates: rates <= true[[1, 3]], np.ones(2), 1.05)
    np.testing.assert_array_equal(low[[1, 3]], alone)


@pytest.mark.parametrize("guess", [0.0, np.inf, np.nan])
def test_a_prediction_that_is_no_rate_comes_to_an_end(guess):
    low = boundary._bisect(lambda rates: rates <= 1.0, np.array([guess, 1.0]), 1.05)
    np.testing.assert_array_equal(np.isnan(low), [True, False])


@pytest.mark.parametrize("answer", [True, False])
def test_answers_after_a_cell_has_ended_do_not_count(answer):
    def bounded(rates):
        return np.where(np.isinf(rates), answer, rates <= TRUE)

    ended = []
    low = boundary._bisect(bounded, np.ones(5), 1.05, ended.append)
    assert np.all((low <= TRUE) & (1.05 * low > TRUE))
    assert sum(ended) == 5


def test_a_boundary_far_away_is_found():
    """Of deep networks it is thousands of times the prediction."""
    true = np.array([3e4, 2e-5])
    low = boundary._bisect(lambda rates: rates <= true, np.ones(2), 1.05)
    assert np.all((low <= true) & (1.05 * low > true))


def test_the_loss_spikes_before_it_is_unbounded():
    x, y = samples(20, 5, 2)
    spike, bounded = (
        mf.measured_boundary(SMALL_NORM, x, y, draws=2, event=event, num_steps=60)
        for event in ("no_spike", "bounded")
    )
    assert np.all(spike.boundary < bounded.boundary)


GAMMAS = (0.5, 2.0)
ALONE = (without_norms(SMALL_NORM), *(with_gamma(SMALL_NORM, gamma) for gamma in GAMMAS))


def test_every_draw_is_the_network_of_its_seed():
    (vanilla, _), (scaled, (_, params)) = boundary._alike(ALONE, range(3, 5))
    assert (vanilla, scaled) == ([0], [1, 2])
    for cell, (row, seed) in enumerate(itertools.product(scaled, range(3, 5))):
        _, expected = mf.functional(mf.build(ALONE[row], rngs=nnx.Rngs(seed)))
        drawn = {name: value[cell] for name, value in params.items()}
        jax.tree.map(np.testing.assert_array_equal, drawn, expected)


@pytest.mark.slow
def test_many_at_once_are_the_same_as_each_alone():
    x, y = samples(20, 5, 2)
    # near the targets, where rounding is not blown up
    options = dict(num_steps=50, residual=1e-3)
    found = mf.measured_boundary(SMALL_NORM, x, y, gammas=GAMMAS, draws=2, seed=3, **options)
    for (row, network), draw in itertools.product(enumerate(ALONE), range(2)):
        alone = mf.measured_boundary(network, x, y, draws=1, seed=3 + draw, **options)
        assert found.boundary[row, draw] == alone.boundary[0, 0]
        assert found.predicted[row] == alone.predicted[0]


def test_under_vmap_as_elsewhere_than_on_cpu_it_is_the_same():
    x, y = samples(20, 5, 2)
    _, (_, models) = boundary._alike(ALONE, range(2))
    predicted = np.repeat([float(mf.analyze(net, data=x).eta_max()) for net in ALONE[1:]], 2)
    together = jax.vmap(lambda *cell: boundary._stays_bounded(*cell, x, y, 0.9, 1e-3, 50))
    for factor, stays in ((0.5, True), (2.0, False)):
        rates = jnp.asarray(factor * predicted, jnp.float32)
        assert np.all(together(models, rates) == stays)
        assert np.all(boundary._stay_bounded(models, rates, x, y, 0.9, 1e-3, 50) == stays)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(y=np.ones((4, 3))), ("y.shape=(4, 3)", "(20, 2)")),
        (dict(draws=0), ("draws=0", "at least 1")),
        (dict(num_steps=0), ("num_steps=0", "at least 1")),
        (dict(tol=0.0), ("tol=0.0", "above 0")),
        (dict(residual=0.0), ("residual=0.0", "above 0")),
        (dict(gammas=(1.0,)), ("gammas=[1.0]", "no norm")),
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
    network = mf.mlp([128] * 2, inputs=64, outputs=10, norm=mf.BatchNorm())
    x, y = samples(100, 64, 10)
    found = mf.measured_boundary(network, x, y, draws=3, residual=1e-3)
    assert 0.9 < float(found.ratio[0]) < 1.1
    published = mf.analyze(network, data=x, statistics="wei2019").eta_max()
    assert found.boundary.min() > 1.1 * float(published)
    # far from the targets the loss is thrown up, and the curvature falls
    far = mf.measured_boundary(network, x, y, draws=3)
    assert np.all(far.boundary > found.boundary)


@pytest.mark.slow
def test_spectra_are_compared_given_the_inputs():
    """One wide layer, whose kernel's eigenvalues are well apart."""
    x = np.random.default_rng(0).normal(size=(30, 3)) * [8.0, 4.0, 2.0]
    x = jnp.asarray(x, jnp.float32)
    network = mf.mlp([2000], inputs=3, outputs=1)
    options = dict(theory="data", draws=4, num_eigenvalues=3, tol=1e-4)
    found = mf.validate(network, x, **options).isel(network=0, mode=0)
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


@pytest.mark.slow
def test_validate_trains_the_networks_that_it_measures():
    x, y = samples(20, 5, 2)
    options = dict(gammas=[1.0], draws=2, seed=3, num_steps=20)
    found = mf.validate(SMALL_NORM, x, y=y, theory="data", **options)
    for event in ("no_spike", "bounded"):
        alone = mf.measured_boundary(SMALL_NORM, x, y, event=event, **options)
        at = found.sel(event=event)
        np.testing.assert_array_equal(at.rate_measured, alone.boundary)
        rate = mf.learning_rate(with_gamma(SMALL_NORM, 1.0), x)
        assert_close(at.rate_predicted[1], getattr(rate, event), "rounding", dtype=np.float32)
        middle = np.median(alone.boundary, -1)
        assert_close(at.rate_ratio, at.rate_predicted / middle, "rounding", dtype=np.float32)
    assert [bool(text) for text in found.rate_domain.values] == [True, False]
    without = mf.validate(SMALL_NORM, x, theory="data", draws=1)
    assert "rate_measured" not in without


def test_eta_max_means_the_same_in_validate_and_in_analyze():
    x, _ = samples(20, 5, 2)
    found = mf.validate(SMALL_NORM, x, gammas=GAMMAS, draws=2, momentum=0.5)
    for gamma in (None, *GAMMAS):
        network = without_norms(SMALL_NORM) if gamma is None else with_gamma(SMALL_NORM, gamma)
        at = found.sel(network="vanilla" if gamma is None else f"gamma={gamma:g}")
        for statistics in ("batch", "frozen"):
            with jax.enable_x64():
                theory = mf.analyze(network, num_samples=20, statistics=statistics)
                expected = float(theory.eta_max(0.5))
            own = at.sel(statistics=statistics)
            assert_close(own.eta_max, expected, "rounding", dtype=np.float32)
            assert_close(own.lambda_max, 3 / expected, "rounding", dtype=np.float32)
            # the largest of the outliers is above their mean
            assert float(own.lambda_max) > float(own.predicted)
    largest = found.measured.max("outlier").median("draw")
    assert_close(found.eta_max_measured, 3 / largest, "rounding", dtype=np.float32)
    assert np.all(found.curve_lambda_max > found.curve)


@pytest.mark.parametrize("number", [0, 21])
def test_more_eigenvalues_than_there_are_is_refused(number):
    with pytest.raises(mf.SpecError, match=f"num_eigenvalues={number}: the kernel has 20"):
        mf.validate(LINEAR, samples(20, 5, 2)[0], num_eigenvalues=number)
