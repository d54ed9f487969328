"""The theory of a real batch: identities, independent references, finite batches, networks."""

import functools
import subprocess
import sys
from pathlib import Path

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from networks import SMALL_NORM, correlated, wide
from tolerance import assert_close, tolerance

import meanfield_jax as mf
from meanfield_jax.kernel.gaussian import (
    Moments,
    batch_expectations,
    expectations,
    variance_expectations,
)
from meanfield_jax.kernel.kernel import batch_inputs, iid_inputs
from meanfield_jax.kernel.nonlinearities import NONLINEARITIES
from meanfield_jax.kernel.positions import Positions
from meanfield_jax.kernel.sphere import on_sphere
from meanfield_jax.theory import likelihood, memory_plan
from meanfield_jax.theory.passes import on_data

pytestmark = pytest.mark.usefixtures("x64")

REFERENCE = np.load(Path(__file__).parent / "data" / "neural_tangents.npz")
"""Neural Tangents 0.6.6 (jax 0.4.38, float64): kernels ``nngp`` and ``ntk`` of six MNIST digits and
three CIFAR-10 images, weight_var 2, bias_var .5, hidden widths 1000 and channels 30-60-90."""


def orthogonal(num_samples: int) -> np.ndarray:
    """A batch with exactly the second moments of i.i.d. inputs of unit variance."""
    return np.sqrt(num_samples) * np.eye(num_samples)


# ---- identities and references

BLOCK = mf.Residual(
    mf.Sequential((mf.Activation("relu"), mf.Dense(1000), mf.Activation("relu"), mf.Dense(1000)))
)
PUBLISHED = {
    "relu": wide(),
    "erf": wide(activation="erf"),
    "leaky": wide(activation="leaky_relu"),
    "residual_relu": mf.Network(
        (784,), (mf.Dense(1000), BLOCK, BLOCK, mf.Activation("relu"), mf.Dense(10))
    ),
    "cnn_flatten": mf.cnn([30, 60, 90], padding="CIRCULAR"),
    "cnn_mean": mf.cnn([30, 60, 90], padding="CIRCULAR", head="mean"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_kernels_are_those_of_neural_tangents(name):
    if name.startswith("cnn"):
        # its circular windows start a pixel later in each of the three strided layers: 1 + 2 + 4
        x = np.roll(REFERENCE["images"].astype(float), -7, (1, 2))
    else:
        x = (REFERENCE["mnist"] / 255.0 - 0.1307) / 0.3081
    kernel = draws.kernel(PUBLISHED[name], x)
    # the reference's inputs were single precision
    for matrix, field in ((kernel.covariance, "nngp"), (kernel.tangent, "ntk")):
        assert_close(matrix.entries, REFERENCE[f"{name}_{field}"], "rounding", dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "statistics"),
    [("relu", "batch"), ("relu", "frozen"), ("relu", "wei2019"), ("erf", "batch")],
)
def test_a_batch_of_orthogonal_inputs_is_the_ensemble(statistics, activation):
    n = 12
    norm = mf.BatchNorm(1.4)
    network = mf.mlp([300, 400], inputs=n, outputs=3, activation=activation, norm=norm)
    real = mf.analyze(network, data=orthogonal(n), statistics=statistics)
    ideal = mf.analyze(network, num_samples=n, statistics=statistics)
    kind = "quadrature_edge"
    for name in ("covariance", "tangent"):
        matrix, pair = (getattr(theory.kernel, name) for theory in (real, ideal))
        expected = np.where(np.eye(n, dtype=bool), pair.same, pair.other)
        assert_close(matrix.entries, expected, kind, float(pair.same))
    for symbol in ("q", "q_xy", "q_hat", "q_hat_xy", "q_tilde", "q_tilde_xy"):
        a, b = (getattr(theory.order_parameters, symbol) for theory in (real, ideal))
        assert_close(a, b, kind, float(np.abs(b).max()))
    for name in ("trace", "second_moment"):
        assert_close(getattr(real.fisher, name), getattr(ideal.fisher, name), kind)
    if activation == "relu":  # else the bulk is above the outlier
        for name in ("outlier", "bulk", "outlier_high", "outlier_low"):
            assert_close(getattr(real.fisher, name), getattr(ideal.fisher, name), kind)
        for name in ("weights", "biases", "norm"):
            a, b = (getattr(theory.fisher.contributions, name) for theory in (real, ideal))
            assert_close(a, b, kind, float(ideal.fisher.outlier))


@pytest.mark.slow
def test_shares_sum_up_to_the_outlier_and_the_spectrum_to_the_trace():
    network = mf.cnn([5, 6], inputs=(8, 8, 2), outputs=3, norm=mf.BatchNorm())
    fisher = mf.analyze(network, data=correlated(10, 8, 8, 2)).fisher
    shares = fisher.contributions.weights + fisher.contributions.biases + fisher.contributions.norm
    assert_close(shares.sum(), fisher.outlier, "rounding")
    assert_close(3 * fisher.eigenvalues.sum(), fisher.trace, "rounding")
    assert fisher.eigenvalues.shape == (10,)


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, mf.BatchNorm(axes="position")])
def test_pairs_of_positions_that_do_not_count_change_nothing(norm):
    network = mf.cnn([5, 6], inputs=(8, 8, 2), outputs=3, norm=norm)
    x = correlated(6, 8, 8, 2)
    few, all_pairs = (draws.kernel(network, x, modulus=modulus) for modulus in (64, 4))
    assert_close(few.tangent.entries, all_pairs.tangent.entries, "rounding")


def test_positions_are_kept_in_classes_that_convolutions_keep():
    before = Positions((6, 5), 4)
    assert {tuple(pair) for pair in zip(before.first, before.second, strict=True)} == {
        (p, q)
        for p in range(30)
        for q in range(30)
        if (p // 5 - q // 5) % 4 == 0 and (p % 5 - q % 5) % 4 == 0
    }
    np.testing.assert_array_equal(before.first[before.equal], np.arange(30))
    np.testing.assert_array_equal(before.first[before.swapped], before.second)
    assert_close(before.weights.sum(), 1.0, "rounding")
    assert before.after((3, 3), 2) == Positions((3, 3), 2)


# ---- batches of few samples

RATES = {4: 3.0841, 6: 2.0038, 8: 1.7882, 16: 1.5900, 64: 1.4931}


@functools.partial(jax.jit, static_argnums=1, compiler_options=draws.UNFUSED)
def growth(kernel, activation: str):
    """By how much one [BatchNorm, activation, Dense] multiplies the tangent, in the long run."""
    kernel = kernel.replace(tangent=kernel.covariance)
    block = (mf.BatchNorm(eps=0.0, trainable=False), mf.Activation(activation), mf.Dense(9, 1.0, 0))
    sizes = []
    for _ in range(3):
        for layer in block:
            kernel, _ = layer.rule(kernel)
        same, other = kernel.tangent.averages()
        sizes.append(same - other)
    return sizes[-1] / sizes[-2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_samples", "real"), [*((n, False) for n in RATES), (4, True), (16, True)]
)
def test_gradients_grow_as_published_for_any_batch(num_samples, real):
    # Yang et al. 2019 (arXiv:1902.08129): ReLU as in the table, identity (B - 2)/(B - 3)
    if real:
        kernel = batch_inputs(jnp.asarray(orthogonal(num_samples)), "batch", 1)
    else:
        kernel = iid_inputs((), 9, num_samples, "batch", False, jnp.dtype("float64"))
    assert abs(float(growth(kernel, "relu")) - RATES[num_samples]) < 6e-5
    exact = (num_samples - 2) / (num_samples - 3)
    assert abs(float(growth(kernel, "identity")) - exact) < 1e-6


@pytest.mark.parametrize("decay", [0.3, 1.0, 2.0])
def test_averages_over_the_sphere(decay):
    values = np.arange(1, 41.0) ** -decay
    frame, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    result = on_sphere(jnp.asarray(frame * values @ frame.T))
    shares = values / values.sum()
    log_s = np.linspace(-25, 40, 5001)
    s = np.exp(log_s)[:, None]
    density = np.exp(log_s - np.log1p(2 * s * shares).sum(1) / 2) * (log_s[1] - log_s[0])
    shrunk = values / (1 + 2 * s * shares)
    factor = density.sum()
    assert abs(float(result.factor.item()) / factor - 1) < 1e-4
    for matrix, expected in (
        (result.first, density @ shrunk),
        (result.second, (s[:, 0] * density) @ shrunk / factor),
    ):
        actual = np.diag(frame.T @ np.asarray(matrix) @ frame)
        assert np.abs(actual - expected).max() < 5e-3 * values.max()


@pytest.mark.parametrize("rounding", [0.0, 4e-7, -4e-7])
def test_averages_over_the_sphere_of_four_centred_samples(rounding):
    # three equal eigenvalues: E[1/|z|^2] = 1/(3 - 2); the fourth is 0 but for rounding
    centring = np.eye(4) - 0.25
    covariance = centring + rounding / 4
    result = on_sphere(jnp.asarray(covariance, jnp.float32))
    for actual, expected in zip(result, (centring, 3.0, centring), strict=True):
        np.testing.assert_allclose(np.asarray(actual).squeeze(), expected, atol=2e-5)


# ---- activations without a closed form


@pytest.mark.parametrize("name", ["tanh", "gelu", "silu", "relu"])
@pytest.mark.parametrize("mean", [None, 0.4])
def test_series_of_a_batch_equals_quadrature(name, mean):
    phi = NONLINEARITIES[name]
    phi = phi if mean is not None else type(phi)(phi.function, phi.kinks)
    variance = jnp.array([0.5, 1.0, 4.0])
    c = jnp.array([[1.0, 0.9, -0.5], [0.9, 1.0, 0.0], [-0.5, 0.0, 1.0]])
    cov = c * jnp.sqrt(variance[:, None] * variance[None, :])
    mean = None if mean is None else jnp.array(mean)
    exact = expectations(phi, variance[:, None], variance[None, :], cov, mean)
    series = batch_expectations(phi, variance, cov, mean, lambda v: (v[:, None], v[None, :]))
    bound = 1e-6 if name != "relu" else 1e-4
    off = ~np.eye(3, dtype=bool)
    for field in Moments._fields:
        a, b = (np.asarray(getattr(moments, field))[off] for moments in (series, exact))
        assert np.abs(a - b).max() < bound * np.abs(getattr(exact, field)).max()
    own = variance_expectations(phi, variance, mean)
    for field in Moments._fields:
        value = np.diag(getattr(exact, field))
        assert_close(getattr(own, field), value, "quadrature_edge", np.abs(value).max())


# ---- use


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        (np.ones((6, 4)), {}, ("data.shape=(6, 4)", "does not fit the network", "(samples, 5)")),
        (np.ones((3, 5)), {}, ("data.shape=(3, 5)", "4 samples or more")),
        (np.ones((6, 5)), dict(num_samples=6), ("num_samples=6", "leave it out")),
        (np.full((6, 5), np.nan), {}, ("NaN or infinite",)),
        (np.ones((6, 5), np.float16), {}, ("float16", "astype")),
    ],
)
def test_data_that_does_not_fit_is_refused(data, options, words):
    with pytest.raises((mf.SpecError, mf.DataError)) as caught:
        mf.analyze(SMALL_NORM, data=data, **options)
    for word in words:
        assert word in str(caught.value)


def test_more_than_memory_is_refused_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(memory_plan, "MAX_ENTRIES", 1000)
    with pytest.raises(mf.DataError, match="at most 31 samples"):
        mf.analyze(SMALL_NORM, data=np.ones((50, 5)))


def test_more_than_the_machine_has_is_refused(monkeypatch):
    monkeypatch.setattr(memory_plan, "memory_of", lambda devices: 75 * 8 * 10.0**2)
    with pytest.raises(mf.DataError, match="at most 10 samples"):
        mf.analyze(SMALL_NORM, data=correlated(12, 5))
    mf.analyze(SMALL_NORM, data=correlated(10, 5))


@pytest.mark.slow
def test_where_memory_is_short_positions_are_sampled(monkeypatch):
    network = mf.cnn([5], inputs=(16, 16, 2), outputs=3, norm=mf.BatchNorm())
    x = correlated(10, 16, 16, 2)
    # n times the outliers
    exact, *sampled = (
        np.linalg.eigvalsh(draws.kernel(network, x, modulus=modulus).tangent.entries)[-1]
        for modulus in (4, 8, 16)
    )
    kept = []
    monkeypatch.setattr(memory_plan, "MAX_ENTRIES", 2**16)
    monkeypatch.setattr(
        "meanfield_jax.theory.analyze.on_data",
        lambda *arguments: kept.append(arguments[-1]) or on_data(*arguments),
    )
    jax.eval_shape(lambda x: mf.analyze(network, data=x).fisher, x)
    assert kept == [8]
    errors = [abs(value / exact - 1) for value in sampled]
    # noise is the worst case: its windows are alike only where they overlap
    assert 0 < errors[0] < 0.06 < errors[1]


@pytest.mark.slow
def test_several_strong_directions_are_outside_the_domain():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(60, 20))
    network = mf.mlp([1000], inputs=20, outputs=2, norm=mf.BatchNorm(), weight_var=2.0, bias_var=0)
    assert mf.analyze(network, data=noise).fisher.within_domain
    # a linear network keeps the direction that its inputs vary in
    linear = mf.mlp([1000], inputs=20, outputs=2, activation="identity", norm=mf.BatchNorm())
    twice = noise * np.where(np.arange(20) < 2, 10, 0.1)
    assert not mf.analyze(linear, data=twice).fisher.within_domain


@pytest.mark.slow
def test_two_strong_directions_spread_alike_in_a_draw_of_a_narrow_network():
    strong = np.where(np.arange(20) < 2, 10, 0.1)
    x = (np.random.default_rng(0).normal(size=(60, 20)) * strong).astype(np.float32)
    network = mf.mlp([50] * 2, inputs=20, outputs=10, norm=mf.BatchNorm())
    fisher = mf.analyze(network, data=x).fisher
    # the draw's spread against a mean is not what decides
    assert fisher.outlier_high > 2 * fisher.bulk_high
    assert not fisher.within_domain
    operator = mf.fisher_operator(mf.build(network, rngs=nnx.Rngs(1)), x)
    assert mf.top_eigenvalues(operator, 1, tol=1e-2).eigenvalues[0] > 2 * fisher.lambda_max


@pytest.mark.slow
def test_a_batch_from_outside_is_checked_inside_jit():
    x = correlated(12, 5)
    outside = mf.analyze(SMALL_NORM, data=x).fisher.outlier
    analyzed = jax.jit(
        lambda: mf.analyze(SMALL_NORM, data=x).fisher.outlier, compiler_options=draws.UNFUSED
    )
    inside = analyzed()
    assert_close(inside, outside, "edge")
    with pytest.raises(mf.DataError, match="NaN"):
        jax.jit(lambda: mf.analyze(SMALL_NORM, data=np.full((6, 5), np.nan)).fisher.outlier)()


def test_the_spectrum_is_differentiable():
    x = correlated(12, 5)

    def outlier(gamma):
        network = mf.mlp([30], inputs=5, outputs=2, norm=mf.BatchNorm(gamma))
        return mf.analyze(network, data=x).fisher.outlier

    slope = (outlier(1.0 + 1e-4) - outlier(1.0 - 1e-4)) / 2e-4
    assert abs(float(jax.grad(outlier)(1.0) / slope) - 1) < 1e-6


SHARDED = """
import jax, numpy as np, meanfield_jax as mf
from jax.sharding import NamedSharding, PartitionSpec
x = np.random.default_rng(0).normal(size=(16, 5)).astype("float32")
network = mf.mlp([30] * 2, inputs=5, outputs=2, norm=mf.BatchNorm())
mesh = jax.make_mesh((4,), ("samples",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("samples")))
whole, parts = (mf.analyze(network, data=data).fisher.eigenvalues for data in (x, rows))
assert len(rows.sharding.device_set) == 4
np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-4 * whole[0])
"""


@pytest.mark.slow
def test_a_batch_sharded_over_devices_gives_the_same(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    subprocess.run([sys.executable, "-c", SHARDED], check=True)


# ---- categorical likelihood


def exact_categorical(theory: mf.Theory, p: np.ndarray) -> np.ndarray:
    """Eigenvalues of the whole (n C) x (n C) matrix, descending."""
    tangent = np.asarray(theory.kernel.tangent.entries)
    num_samples, num_outputs = p.shape
    root = np.sqrt(p)
    # B B^T = diag p - p p^T
    factor = root[:, :, None] * (np.eye(num_outputs) - root[:, :, None] * root[:, None, :])
    matrix = np.einsum("ilk,ij,jlm->ikjm", factor, tangent, factor)
    size = num_samples * num_outputs
    return np.linalg.eigvalsh(matrix.reshape(size, size) / num_samples)[::-1]


@pytest.mark.slow
def test_flat_classes_divide_the_spectrum_by_their_number():
    x = correlated(12, 5)
    plain = mf.analyze(SMALL_NORM, data=x).fisher
    flat = np.full((12, 2), 0.5)
    theory = mf.analyze(SMALL_NORM, data=x, likelihood="categorical", probabilities=flat)
    expected = np.zeros(24)
    expected[:12] = np.asarray(plain.eigenvalues) / 2
    assert_close(theory.fisher.eigenvalues, expected, "rounding", expected[0])
    assert_close(exact_categorical(theory, flat), expected, "rounding", expected[0])
    assert_close(theory.fisher.trace, plain.trace / 4, "rounding")


@pytest.mark.slow
def test_classes_of_a_draw(monkeypatch):
    x = correlated(12, 5)
    network = SMALL_NORM
    model = mf.build(network, rngs=nnx.Rngs(0))
    p = np.asarray(jax.nn.softmax(model(jnp.asarray(x, jnp.float32))), float)
    p /= p.sum(1, keepdims=True)
    theory = mf.analyze(network, data=x, likelihood="categorical", probabilities=p)
    exact = exact_categorical(theory, p)
    assert_close(theory.fisher.eigenvalues, exact, "rounding", exact[0])

    # what is left out of a large matrix lowers the top and keeps the trace; the program is traced
    # with this limit, as no other test has as many samples
    monkeypatch.setattr(likelihood, "COUPLED", 12)
    x, p = x[:11], p[:11]
    theory = mf.analyze(network, data=x, likelihood="categorical", probabilities=p)
    few, exact = theory.fisher, exact_categorical(theory, p)
    assert_close(few.eigenvalues.sum(), exact.sum(), "rounding")
    assert 0.9 * exact[0] < few.eigenvalues[0] < exact[0]


@pytest.mark.parametrize("data", [None, correlated(60, 8)], ids=["iid", "data"])
@pytest.mark.parametrize("norm", [None, mf.BatchNorm()], ids=["vanilla", "batch_norm"])
def test_classes_of_random_networks(norm, data):
    network = mf.mlp([400] * 2, inputs=8, outputs=4, norm=norm)
    given = dict(num_samples=60) if data is None else dict(data=data.astype(np.float32))
    fisher = mf.analyze(network, likelihood="categorical", **given).fisher
    draws = mf.drawn_eigenvalues(network, likelihood="categorical", draws=12, **given)
    tops = np.asarray(draws.eigenvalues[:, 0])
    standard_error = tops.std(ddof=1) / np.sqrt(len(tops))
    allowed = tolerance("monte_carlo", tops.mean(), standard_error=standard_error, width=60)
    # theory's own networks scatter as these do, on data over 4 of them
    assert abs(float(fisher.lambda_max) - tops.mean()) < allowed + 2 * standard_error


def test_two_classes_of_independent_logits():
    # without a bias, BatchNorm leaves two i.i.d. samples uncorrelated after an odd function
    network = mf.mlp([50], inputs=9, outputs=2, activation="erf", norm=mf.BatchNorm(), bias_var=0.0)
    theory = mf.analyze(network, likelihood="categorical")
    same, other = theory.kernel.moment.averages()
    assert abs(other) < 1e-6 * same
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    p = 1 / (1 + np.exp(-points * np.sqrt(2 * float(same))))
    mean = np.sum(weights * p * (1 - p)) / weights.sum()
    error = np.std(np.random.default_rng(0).choice(p * (1 - p), 10**5, p=weights / weights.sum()))
    allowed = 4 * error / np.sqrt(16 * 4096)
    np.testing.assert_allclose(theory.fisher.information, [0, 2 * mean], atol=2 * allowed)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(likelihood="poisson"), ("likelihood='poisson'", "gaussian, categorical")),
        (dict(probabilities=np.ones((6, 2)) / 2), ("Gaussian", "likelihood='categorical'")),
        (dict(likelihood="categorical", probabilities=np.ones((6, 2))), ("sum to 1", "softmax")),
        (dict(likelihood="categorical", probabilities=np.ones((5, 2)) / 2), ("(6, 2)",)),
    ],
)
def test_class_probabilities_that_do_not_fit_are_refused(options, words):
    with pytest.raises(mf.SpecError) as error:
        mf.analyze(SMALL_NORM, data=np.ones((6, 5)), **options)
    assert all(word in str(error.value) for word in words)
