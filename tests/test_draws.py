"""The largest eigenvalues of drawn networks: identities, derivatives, and fresh draws."""

import jax
import jax.numpy as jnp
import networks
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close, tolerance

import meanfield_jax as mf

NARROW = mf.mlp([20] * 6, inputs=20, outputs=3, norm=mf.BatchNorm())
NUM_SAMPLES = 24


def operator(network, data, *, statistics="batch", likelihood="gaussian", seed=0):
    """The Fisher operator of the first draw of this seed, made from its parts."""
    first = jax.random.fold_in(jax.random.key(seed), 0)
    model = mf.build(network, rngs=nnx.Rngs(jax.random.split(first)[0]))
    mf.calibrate(model, data)
    return mf.fisher_operator(model, data, statistics=statistics, likelihood=likelihood)


@pytest.mark.parametrize(
    ("network", "options", "layers"),
    [
        pytest.param(networks.SMALL_NORM, {}, (), id="dense"),
        pytest.param(networks.SMALL_NORM, dict(statistics="frozen"), (), id="frozen"),
        pytest.param(networks.SMALL_NORM, dict(likelihood="categorical"), (), id="categorical"),
        pytest.param(networks.SMALL_NORM, {}, ("layers/1", "layers/3"), id="after the norm"),
        pytest.param(networks.CNN_NORM, {}, (), id="convolutions"),
    ],
)
def test_they_are_those_of_the_dense_matrix(network, options, layers):
    data = networks.correlated(12, *network.input_shape).astype(np.float32)
    found = mf.drawn_eigenvalues(network, data, k=3, draws=1, layers=layers, tol=1e-5, **options)
    op = operator(network, data, **options)
    dense = (op.block(*layers) if layers else op).dual.to_dense()
    expected = np.linalg.eigvalsh(np.asarray(dense, float))[::-1][:3]
    assert_close(found.eigenvalues[0], expected, "rounding", dtype=np.float32)
    assert found.status.tolist() == [0]


def of_numbers(numbers) -> jax.Array:
    """The median draw's largest eigenvalue as a function of gamma, weight_var and bias_var."""
    gamma, weight_var, bias_var = numbers
    options = dict(weight_var=weight_var, bias_var=bias_var, norm=mf.BatchNorm(gamma))
    network = mf.mlp([16] * 2, inputs=10, outputs=2, **options)
    return mf.drawn_eigenvalues(network, num_samples=12, draws=3, tol=1e-5).lambda_max


def test_derivatives_are_those_of_differences():
    at, step = np.array([0.8, 1.7, 0.4]), 0.02
    slope = jax.grad(of_numbers)(jnp.asarray(at, jnp.float32))
    differences = [
        (float(of_numbers(at + step * one)) - float(of_numbers(at - step * one))) / (2 * step)
        for one in np.eye(3)
    ]
    # the step's own error, of order step^2, is below 1e-3; nothing depends on biases before a norm
    np.testing.assert_allclose(slope, differences, rtol=4e-3, atol=1e-3)


def test_jit_and_vmap_give_the_numbers_of_single_calls():
    grid = jnp.array([[0.5, 2.0, 0.5], [1.0, 1.5, 0.2]])
    single = [of_numbers(numbers) for numbers in np.asarray(grid)]
    np.testing.assert_allclose(jax.jit(jax.vmap(of_numbers))(grid), single, rtol=1e-4)


def test_a_network_can_be_an_argument_of_a_compiled_function():
    def lambda_max(network):
        return mf.drawn_eigenvalues(network, num_samples=12, draws=2).lambda_max

    for norm in (mf.BatchNorm(), mf.LayerNorm(), mf.ProxyNorm(mf.LayerNorm())):
        network = mf.mlp([16], inputs=8, outputs=2, norm=norm, activation="relu")
        np.testing.assert_allclose(jax.jit(lambda_max)(network), lambda_max(network), rtol=1e-4)


def test_fresh_draws_lie_inside_the_interval():
    found = mf.drawn_eigenvalues(NARROW, num_samples=NUM_SAMPLES, draws=8, seed=1)
    fresh = mf.drawn_eigenvalues(NARROW, num_samples=NUM_SAMPLES, draws=40, seed=2)
    (low, high), tops = found.interval, np.asarray(fresh.eigenvalues[:, 0])
    inside = np.mean((tops > low) & (tops < high))
    # the interval holds 90 % on average over the 8 draws, and varies with them
    assert 0.7 < inside <= 1.0
    # two medians, with the standard errors of medians of normal numbers
    scatter = np.std(np.log(tops), ddof=1) * 1.25 * np.sqrt(1 / 8 + 1 / 40)
    gap = abs(np.log(float(fresh.lambda_max / found.lambda_max)))
    assert gap < tolerance("monte_carlo", standard_error=scatter)
    theory = mf.analyze(NARROW, num_samples=NUM_SAMPLES)
    assert not theory.fisher.within_domain
    assert theory.fisher.lambda_max < 0.8 * fresh.lambda_max  # which is why networks are drawn


def test_wide_networks_agree_with_theory():
    network = networks.dense(mf.BatchNorm(), width=512)
    theory = mf.analyze(network, num_samples=100).fisher
    found = mf.drawn_eigenvalues(network, num_samples=100, draws=4)
    scatter = float(jnp.std(found.eigenvalues[:, 0], ddof=1)) / 2 * 1.25
    assert_close(
        theory.lambda_max,
        found.lambda_max,
        "monte_carlo",
        scale=float(found.lambda_max),
        standard_error=scatter,
        width=128,
    )


def test_analyze_and_learning_rate_use_them():
    options, none = dict(num_samples=NUM_SAMPLES, draws=4), dict(num_samples=NUM_SAMPLES)
    fisher, wide = (mf.analyze(NARROW, **given).fisher for given in (options, none))
    assert fisher.drawn is not None
    assert fisher.lambda_max == fisher.drawn.lambda_max != wide.lambda_max
    assert "draws=8" in wide.domain_reason()
    assert fisher.within_domain
    assert not fisher.domain_reason()
    assert fisher.outlier == wide.outlier
    dataset = mf.analyze(NARROW, **options).to_xarray()
    low, high = dataset.lambda_max_interval.values
    assert low < dataset.lambda_max < high
    assert dataset.lambda_max_drawn.shape == (4,)
    rate, plain = (mf.learning_rate(NARROW, **given) for given in (options, none))
    assert rate.lambda_max == fisher.lambda_max
    assert rate.source == "4 drawn networks"
    after = mf.drawn_eigenvalues(NARROW, layers=rate.decisive, **options).lambda_max
    np.testing.assert_allclose(rate.lambda_after_norms, after)
    assert after != plain.lambda_after_norms


@pytest.mark.parametrize(
    "network",
    [
        networks.SMALL_NORM,
        networks.CNN_NORM,
        mf.preact_resnet([4, 8], blocks=1, inputs=(8, 8, 3), outputs=3, norm=mf.BatchNorm()),
    ],
    ids=["dense", "convolutions", "residual"],
)
def test_decisive_layers_are_layers_of_the_model(network):
    rate = mf.learning_rate(network, num_samples=16)
    names = mf.functional(mf.build(network, rngs=0))[1]
    assert all(any(name.startswith(path + "/") for name in names) for path in rate.decisive)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(draws=0, num_samples=8), "draws=0: must be at least 1"),
        (dict(), "num_samples=None: drawn networks need a batch"),
        (dict(data=np.ones((5, 7))), "does not fit the network"),
        (dict(num_samples=8, layers=["layers/9"]), "there are no parameters under it"),
        (dict(num_samples=8, statistics="wei2019"), "statistics"),
        (dict(num_samples=8, likelihood="poisson"), "likelihood"),
        (dict(num_samples=8, k=10**6), "k=1000000"),
        (dict(num_samples=10**13), "num_samples"),
    ],
)
def test_bad_options_are_one_line(options, words):
    with pytest.raises((mf.SpecError, mf.DataError)) as caught:
        mf.drawn_eigenvalues(networks.SMALL_NORM, **options)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overflow_is_said_and_raised():
    network = mf.mlp([16] * 12, inputs=8, outputs=2, weight_var=1e8)
    found = mf.drawn_eigenvalues(network, num_samples=8, draws=2)
    assert np.isnan(found.eigenvalues).all()
    with pytest.raises(RuntimeError, match="not finite"):
        found.raise_if_failed()


def test_tune_reaches_a_target_for_drawn_networks():
    data = networks.correlated(16, 10).astype(np.float32)
    network = mf.mlp([12] * 2, inputs=10, outputs=2, norm=mf.BatchNorm())
    goal = mf.objectives.target_eta_max(0.3)
    tuned = mf.tune(network, goal, data=data, draws=3, shared=True)
    tuned.raise_if_failed()
    drawn = mf.drawn_eigenvalues(tuned.network, data, draws=3)
    np.testing.assert_allclose(2 * 1.9 / drawn.lambda_max, 0.3, rtol=2e-3)
    with pytest.raises(mf.SpecError, match="draws=3: drawn networks need a batch; pass data"):
        mf.tune(network, goal, draws=3)
