"""Numbers known beforehand: printed reference values, closed formulas, the published recursions."""

import draws
import jax
import numpy as np
import published
import pytest
from tolerance import assert_close, assert_printed

import meanfield_jax as mf

# The reference values are those of the limit of the published theory: no eps in BatchNorm's
# denominator and only weights and biases as parameters.
EXACT = dict(eps=0.0, trainable=False)
WIDTHS = [784, 1000, 1000, 1000, 10]
MAPS = [3, 30, 60, 90]


def fc(gamma: float | None = None, depth: int = 3, **options) -> mf.Network:
    """FC 784-1000-1000-1000-10, ReLU, weight_var 2, bias_var .5, unless options say otherwise.

    Other numbers share the compiled program, other widths would not.
    """
    norm = None if gamma is None else mf.BatchNorm(gamma, **EXACT)
    widths = WIDTHS[1 : depth + 1]
    return mf.mlp(widths, inputs=WIDTHS[0], outputs=WIDTHS[-1], norm=norm, **options)


def conv(gamma: float | None = None) -> mf.Network:
    """Conv 30-60-90 on 32x32x3, 3x3 stride 2, flatten."""
    norm = None if gamma is None else mf.BatchNorm(gamma, **EXACT)
    return mf.cnn(MAPS[1:], padding="CIRCULAR", norm=norm)


def small_conv(gamma: float | None, stride: int, padding: str = "SAME") -> mf.Network:
    """Conv 8-16 on 12x12x3, 3x3, flatten."""
    norm = None if gamma is None else mf.BatchNorm(gamma, **EXACT)
    options = dict(stride=stride, padding=padding, norm=norm)
    return mf.cnn([8, 16], inputs=(12, 12, 3), outputs=5, **options)


def weights_only(network: mf.Network, statistics: str = "batch") -> float:
    return float(mf.analyze(network, statistics=statistics).fisher.contributions.weights.sum())


@pytest.fixture(autouse=True)
def _exact(x64):
    """Reference values are float64."""


# ---- fully connected, without normalization


def test_vanilla_order_parameters_shares_and_learning_rate():
    theory = mf.analyze(fc())
    order, shares = theory.order_parameters, theory.fisher.contributions
    assert_printed(order.q, "2.5 3.000000 3.5 4")
    assert_printed(order.q_xy, ".5 1.561744 2.368391 3.064789")
    assert_printed(shares.weights, "0 263.666494 688.112593 1282.394425")
    assert_printed(shares.weights.sum(), "2234.173512")
    assert_printed(mf.eta_max(shares.weights.sum(), momentum=0.9), "1.7008527e-3")
    assert_printed(theory.fisher.tangent_other, "2236.686929")
    assert_printed(theory.fisher.tangent_same, "5288.000000")


def test_largest_eigenvalue_of_one_vanilla_draw():
    # measured 2461 (n = 1000)
    lambda_max = float(mf.analyze(fc(), num_samples=1000).fisher.lambda_max)
    assert abs(lambda_max / 2461 - 1) < 0.01


# ---- fully connected, BatchNorm

WEIGHTS_ONLY = [
    (0.1, "1.607306", "3.615126", "1.591549"),
    (0.5, "47.525434", "90.378162", "39.788736"),
    (1.0, "229.890473", "361.512649", "159.154943"),
    (2.0, "1045.313947", "1446.050596", "636.619772"),
    (3.0, "2432.293133", "3253.613839", "1432.394488"),
]
WITH_BIASES = [
    (0.5, "48.721268", "92.683237", "40.788736"),
    (1.0, "231.357140", "363.918595", "160.154943"),
    (2.0, "1047.113947", "1448.860026", "637.619772"),
]
PUBLISHED_SHARES = [
    (0.1, "1.53e-4 .015603 1.591549"),
    (0.5, "1.105243 6.631456 39.788736"),
    (1.0, "17.683883 53.051648 159.154943"),
    (2.0, "125.752054 282.942121 636.619772"),
    (3.0, "321.395993 678.502652 1432.394488"),
]
STATISTICS = ("wei2019", "frozen", "batch")


@pytest.mark.parametrize(("gamma", *STATISTICS), WEIGHTS_ONLY)
def test_batch_norm_outlier_of_the_weights(gamma, wei2019, frozen, batch):
    for statistics, printed in zip(STATISTICS, (wei2019, frozen, batch), strict=True):
        assert_printed(weights_only(fc(gamma), statistics), printed)


@pytest.mark.parametrize(("gamma", *STATISTICS), WITH_BIASES)
def test_batch_norm_outlier_with_biases(gamma, wei2019, frozen, batch):
    for statistics, printed in zip(STATISTICS, (wei2019, frozen, batch), strict=True):
        assert_printed(mf.analyze(fc(gamma), statistics=statistics).fisher.outlier, printed)


@pytest.mark.parametrize(("gamma", "printed"), PUBLISHED_SHARES)
def test_batch_norm_shares_of_the_published_recursion(gamma, printed):
    shares = mf.analyze(fc(gamma), statistics="wei2019").fisher.contributions.weights
    assert_printed(shares[1:], printed)


# Measured, mean of the ten outliers of one draw, scale and offset constant.
FINITE = [(0.1, 2.5993), (0.5, 41.059), (1.0, 161.253), (2.0, 642.03), (3.0, 1443.32)]


@pytest.mark.parametrize(("gamma", "measured"), FINITE)
def test_batch_norm_outlier_of_a_thousand_samples(gamma, measured):
    outlier = float(mf.analyze(fc(gamma), num_samples=1000).fisher.outlier)
    assert abs(outlier / measured - 1) < 0.005


def test_finite_n_tends_to_the_limit():
    limit = float(mf.analyze(fc(1.0)).fisher.outlier)
    gaps = [
        abs(float(mf.analyze(fc(1.0), num_samples=n).fisher.outlier) - limit)
        for n in (1_000, 10_000, 100_000)
    ]
    assert_close(gaps[1] / gaps[0], 0.1, "monte_carlo", width=300)
    assert_close(gaps[2] / gaps[1], 0.1, "monte_carlo", width=300)


@pytest.mark.parametrize("weight_var", [0.7, 2.0])
@pytest.mark.parametrize("bias_var", [0.0, 0.5])
@pytest.mark.parametrize("depth", [1, 3])
def test_batch_mode_outlier_knows_only_gamma_and_the_last_width(depth, weight_var, bias_var):
    for gamma in (0.3, 1.0, 2.5):
        network = fc(gamma, depth, weight_var=weight_var, bias_var=bias_var)
        expected = 1000 * gamma**2 / (2 * np.pi) + 1
        assert_close(mf.analyze(network).fisher.outlier, expected, "rounding")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("below", "above", "network"), [(2.87, 2.89, fc), (2.85, 2.87, conv)], ids=["fc", "conv"]
)
def test_published_batch_norm_lowers_lambda_max_up_to_gamma_of_about_2_9(below, above, network):
    vanilla = weights_only(network(), "wei2019")
    assert weights_only(network(below), "wei2019") < vanilla
    assert weights_only(network(above), "wei2019") > vanilla


# ---- statistics of the whole spectrum (Karakida, Akaho & Amari 2019)


@pytest.mark.parametrize("num_samples", [None, 1, 300])
def test_mean_second_moment_trace_and_bulk(num_samples):
    network = fc()
    fisher = mf.analyze(network, num_samples=num_samples).fisher
    same, other, size = 5288.0, 2236.686929, network.num_parameters
    assert size == 2_797_010
    share = 0.0 if num_samples is None else 1 / num_samples
    second = 10 / size * ((1 - share) * other**2 + share * same**2)
    outlier, bulk = share * same + (1 - share) * other, share * (same - other)
    assert_close(fisher.mean, 10 * same / size, "printed", printed="0.00000001")
    assert_close(fisher.second_moment / second, 1.0, "printed", printed="0.0000001")
    assert_close(fisher.outlier, outlier, "printed", printed="0.000001")
    assert_close(fisher.bulk, bulk, "printed", printed="0.000001")
    assert_close(fisher.trace, 10 * same, "rounding")
    # one draw: layer l's contribution times (1 + sqrt(10 l'/1000))^2, l' layers after it
    after = np.sqrt(10 * np.array([3, 2, 1, 0]) / 1000)
    total = fisher.contributions.weights + fisher.contributions.biases
    assert_close(fisher.outlier_high, total @ (1 + after) ** 2, "rounding")
    assert_close(fisher.outlier_low, total @ (1 - after) ** 2, "rounding")
    assert fisher.lambda_max == max(fisher.outlier_high, fisher.bulk)


def test_moments_are_those_of_outliers_bulk_and_zeros():
    n = 300
    fisher = mf.analyze(fc(1.0), num_samples=n).fisher
    outlier, bulk = float(fisher.outlier), float(fisher.bulk)
    eigenvalues = np.concatenate([np.full(10, outlier), np.full(10 * (n - 1), bulk)])
    assert_close(fisher.trace, eigenvalues.sum(), "rounding")
    assert_close(fisher.mean, eigenvalues.sum() / fisher.num_parameters, "rounding")
    second = (eigenvalues**2).sum() / fisher.num_parameters
    # theorem 1 has C/P ((n-1)/n T_other^2 + T_same^2/n): the same sum
    assert_close(fisher.second_moment, second, "rounding")


# ---- convolutions


def test_vanilla_convolution():
    assert_printed(weights_only(conv()), "2289.4187")
    assert_printed(weights_only(conv(), "wei2019"), "2289.4187")


@pytest.mark.parametrize(
    ("statistics", "printed"),
    [("wei2019", "262.6057"), ("frozen", "315.3383"), ("batch", "229.1831")],
)
def test_batch_norm_convolution(statistics, printed):
    assert_printed(weights_only(conv(1.0), statistics), printed)


@pytest.mark.parametrize("gamma", [None, 1.5])
def test_the_published_theory_takes_zero_padding_as_circular(gamma):
    zero, circular = (
        weights_only(small_conv(gamma, 2, padding), "wei2019") for padding in ("SAME", "CIRCULAR")
    )
    assert_close(zero, circular, "rounding")


# ---- the published recursions, layer by layer

SYMBOLS = ("q", "q_xy", "q_hat", "q_hat_xy", "q_tilde", "q_tilde_xy")


def check_recursion(network: mf.Network, recursion: published.Recursion) -> None:
    theory = mf.analyze(network, statistics="wei2019")
    for symbol in SYMBOLS:
        expected = getattr(recursion, symbol)
        actual = getattr(theory.order_parameters, symbol)
        assert_close(actual, expected, "rounding", max(np.abs(expected)))
    shares = theory.fisher.contributions
    linear = [path in theory.order_parameters.layers for path in shares.layers]
    assert_close(shares.weights[np.array(linear)], recursion.f, "rounding", recursion.lambda_max)


@pytest.mark.parametrize("gamma", [None, 0.5, 3.0])
@pytest.mark.parametrize(("weight_var", "bias_var"), [(2.0, 0.5), (1.3, 0.0), (0.6, 2.0)])
def test_published_recursion_fully_connected(gamma, weight_var, bias_var):
    widths = [60, 300, 50, 200, 7]
    norm = None if gamma is None else mf.BatchNorm(gamma, **EXACT)
    network = mf.mlp(
        widths[1:-1],
        inputs=widths[0],
        outputs=widths[-1],
        norm=norm,
        weight_var=weight_var,
        bias_var=bias_var,
    )
    check_recursion(network, published.fully_connected(widths, weight_var, bias_var, gamma))


@pytest.mark.parametrize("gamma", [None, 1.5])
@pytest.mark.parametrize("stride", [1, 2])
def test_published_recursion_convolutional(gamma, stride):
    recursion = published.convolutional(12, [3, 8, 16], 3, stride, 5, 2.0, 0.5, gamma)
    check_recursion(small_conv(gamma, stride), recursion)


def test_the_recursions_themselves_give_the_printed_numbers():
    assert_printed(published.fully_connected(WIDTHS, 2.0, 0.5, None).lambda_max, "2234.173512")
    for gamma, printed, _, _ in WEIGHTS_ONLY:
        assert_printed(published.fully_connected(WIDTHS, 2.0, 0.5, gamma).lambda_max, printed)
    maps = (32, MAPS, 3, 2, 10, 2.0, 0.5)
    assert_printed(published.convolutional(*maps, None).lambda_max, "2289.4187")
    assert_printed(published.convolutional(*maps, 1.0).lambda_max, "262.6057")


# ---- growth of gradients in batch mode


@pytest.mark.parametrize(
    ("activation", "printed"), [("relu", "1.466942"), ("tanh", "1.17781"), ("identity", "1.0")]
)
def test_batch_mode_gradients_grow_per_layer_at_the_known_rate(activation, printed):
    network = fc(1.0, activation=activation, bias_var=0.3)
    tildes = mf.analyze(network).order_parameters.q_tilde
    # the first layer, whose inputs are not activations, and the output layer are different
    assert_printed(tildes[1] / tildes[2], printed)


def test_published_gradients_do_not_grow_without_biases():
    tildes = mf.analyze(fc(1.0, bias_var=0.0), statistics="wei2019").order_parameters.q_tilde
    assert_close(tildes[1] / tildes[2], 1.0, "rounding")


# rate(B) = (J0 + B - 1) / ((B - 3) (1 - J1)) - 1 / (B - 3): exact in the batch, which the wide
# theory approaches from B of about a hundred on
@pytest.mark.parametrize(("batch", "rate"), [(128, "1.4797"), (256, "1.4732")])
def test_growth_rate_at_finite_batch_follows_yang_2019(batch, rate):
    c = -1 / (batch - 1)
    j0 = (np.pi - np.arccos(c)) / np.pi
    j1 = (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi
    formula = (j0 + batch - 1) / ((batch - 3) * (1 - j1)) - 1 / (batch - 3)
    assert_printed(formula, rate)
    order = mf.analyze(fc(1.0), num_samples=batch).order_parameters
    assert_close(order.q_tilde[1] / order.q_tilde[2], formula, "monte_carlo", width=batch)


def test_theory_differentiates_the_learning_rate_in_gamma():
    def eta(gamma):
        return mf.analyze(fc(gamma)).eta_max(0.9)

    slopes = jax.jit(jax.grad(eta), compiler_options=draws.UNFUSED)
    for gamma in (0.5, 2.0):
        outlier = 1000 * gamma**2 / (2 * np.pi) + 1
        slope = -3.8 / outlier**2 * 1000 * gamma / np.pi
        assert_close(slopes(gamma), slope, "rounding")
