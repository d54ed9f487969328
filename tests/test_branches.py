"""Concat, Product, MixPositions, SelfAttention: identities, what users do with them, errors."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import CASES, dense_net
from networks import correlated
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.variants import with_weight_var

RELU, ERF = mf.Activation("relu"), mf.Activation("erf")


def dense(width: int = 8, **options) -> mf.Dense:
    return mf.Dense(width, 1.5, 0.2, **options)


def conv(width: int = 8, kernel_size: int = 3, **options) -> mf.Conv:
    return mf.Conv(width, kernel_size, weight_var=1.5, bias_var=0.2, **options)


def vector(*layers) -> mf.Network:
    return mf.Network((6,), (dense(), *layers, dense(2)))


def image(*layers) -> mf.Network:
    return mf.Network((4, 4, 6), (conv(), *layers, dense(2)))


def sequential(*layers) -> mf.Sequential:
    return mf.Sequential(layers)


def concat(*branches) -> mf.Concat:
    return mf.Concat(branches)


def assert_same_theory(one: mf.Network, other: mf.Network) -> None:
    """Covariance and tangent of the outputs on a batch."""
    x = correlated(10, *one.input_shape)
    a, b = (draws.kernel(network, x) for network in (one, other))
    for matrix in ("covariance", "tangent"):
        expected = getattr(b, matrix).entries
        assert_close(getattr(a, matrix).entries, expected, "rounding", np.abs(expected).max())


@pytest.mark.parametrize("norm", [mf.BatchNorm(1.3, 0.2), mf.LayerNorm(1.3), mf.RMSNorm(0.7)])
def test_branches_of_one_kind_are_one_wider_layer(norm, x64):
    parts = concat(dense(3), concat(dense(4), dense(5)))
    assert_same_theory(vector(parts, norm, ERF), vector(dense(12), norm, ERF))


@pytest.mark.parametrize("norm", [mf.BatchNorm(1.3, 0.2), mf.InstanceNorm(0.7), mf.Scale(0.6)])
def test_what_acts_on_channels_acts_on_those_of_every_branch(norm, x64):
    branch = sequential(RELU, conv(4))
    outside = image(concat(mf.Sequential(), branch), norm, ERF, mf.GlobalMeanPool())
    inside = concat(sequential(norm, ERF), sequential(*branch.layers, norm, ERF))
    assert_same_theory(outside, image(inside, mf.GlobalMeanPool()))


def test_a_concatenation_of_the_same_values_is_seen_as_these_by_dense(x64):
    twice = concat(mf.Sequential(), mf.Sequential())
    once, both = vector(RELU), vector(RELU, twice)
    a, b = (mf.analyze(network, num_samples=20) for network in (once, both))
    assert_close(b.kernel.covariance.same, a.kernel.covariance.same, "rounding")
    # twice the weights, and all that comes from before as often as before
    own = [t.fisher.tangent_same - t.fisher.contributions.biases[-1] for t in (a, b)]
    hat = a.order_parameters.q_hat[-1]
    assert_close(own[1] - own[0], 8 * hat, "rounding", float(own[1]))


def test_a_product_with_a_constant_gate_is_a_factor(x64):
    half = mf.Activation(lambda x: 0 * x + 0.5)
    gated = vector(mf.Product(dense(), sequential(dense(use_bias=False), half)))
    scaled = vector(dense(), mf.Scale(0.5, "none"))
    a, b = (mf.analyze(network).fisher for network in (gated, scaled))
    assert_close(a.tangent_same, b.tangent_same, "quadrature")
    assert_close(a.tangent_other, b.tangent_other, "quadrature")


def test_products_commute(x64):
    gate = sequential(dense(), ERF)
    assert_same_theory(vector(mf.Product(dense(), gate)), vector(mf.Product(gate, dense())))


def test_mixing_all_positions_into_one_is_a_depthwise_convolution(x64):
    mixed = mf.MixPositions((1, 1), 1.5, 0.2)
    window = conv(8, 4, padding="VALID", groups=8)
    one, other = (image(RELU, layer, mf.Flatten()) for layer in (mixed, window))
    assert_same_theory(one, other)
    a, b = (mf.analyze(network, num_samples=20).fisher for network in (one, other))
    assert_close(a.tangent_same, b.tangent_same, "rounding")
    assert_close(a.tangent_other, b.tangent_other, "rounding")


def test_a_layer_norm_removes_what_all_channels_share(x64):
    """The bias of a position, and the mean of the activation before it."""
    norm = mf.LayerNorm(over_positions=False)

    def tangent(activation, **options):
        mixed = mf.MixPositions((3, 1), 1.5, **options)
        network = image(mf.Activation(activation), mixed, norm, mf.Flatten())
        return mf.analyze(network, num_samples=10).raise_if_failed().kernel.tangent.same

    assert_close(tangent("erf", bias_var=0.7), tangent("erf", use_bias=False), "rounding")
    # |x| + 1 and |x| differ by a constant that is 0 after the norm
    constant, none = (lambda x: jnp.abs(x) + 1.0), jnp.abs
    assert_close(tangent(constant), tangent(none), "quadrature_edge", 10)


def test_attention_to_one_position_is_two_layers_of_weights(x64):
    alone, norm = (conv(8, 4, padding="VALID"), RELU), mf.SelfAttention(2, 1.5, value_var=0.7)
    values = mf.Conv(8, 1, weight_var=0.7, bias_var=0.0)
    outputs = mf.Conv(8, 1, weight_var=1.5, bias_var=0.0)
    assert_same_theory(
        image(*alone, norm, mf.Flatten()), image(*alone, values, outputs, mf.Flatten())
    )


def test_attention_without_queries_is_the_mean_over_positions(x64):
    attention = mf.SelfAttention(2, 1.5, query_var=0.0, value_var=0.7)
    mean = mf.GlobalMeanPool(), mf.Dense(8, 0.7, 0.0), mf.Dense(8, 1.5, 0.0)
    one, other = image(RELU, attention, mf.Flatten()), image(RELU, *mean)
    x = correlated(10, *one.input_shape)
    a, b = (draws.kernel(network, x).covariance.entries for network in (one, other))
    assert_close(a, b, "rounding", np.abs(b).max())


def test_counts_of_parameters_add_up():
    network = dense_net()
    params = mf.functional(mf.build(network, rngs=0))[1]
    assert network.num_parameters == sum(value.size for value in params.values())
    labels = mf.analyze(network, num_samples=8).fisher.contributions.layers
    assert len(set(labels)) == len(labels)
    assert "layers/2/branches/1/layers/0/parts/1" in labels


MIXED = sequential(mf.LayerNorm(over_positions=False), mf.MixPositions((6, 1), 1.5, 0.2), RELU)
TUNED = {
    "concatenation": vector(concat(dense(), sequential(mf.LayerNorm(), RELU, dense())), RELU),
    "gate": vector(mf.LayerNorm(), mf.Product(dense(), sequential(dense(), ERF)), dense(), RELU),
    "mixer": image(mf.Residual(sequential(MIXED, mf.MixPositions((4, 4)))), RELU, mf.Flatten()),
}


@pytest.mark.parametrize("name", TUNED)
def test_networks_with_these_layers_are_tuned(name):
    network = TUNED[name]
    target = 1.2 * float(mf.analyze(network, num_samples=20).eta_max())
    objective = mf.objectives.target_eta_max(target)
    tuned = mf.tune(network, objective, over="weight_var", num_samples=20, shared=True)
    assert float(tuned.after.eta_max()) == pytest.approx(target, rel=1e-3)


@pytest.mark.slow
def test_networks_with_these_layers_are_compared_with_other_norms():
    x, y = mf.data.load("digits", num_samples=40, flatten=True)
    grown = concat(mf.Sequential(), sequential(mf.BatchNorm(), RELU, dense()))
    gated = mf.BatchNorm(), mf.Product(dense(), sequential(dense(), ERF)), dense(10)
    network = mf.Network((64,), (dense(), grown, grown, *gated))
    options = dict(batch_sizes=[20], learning_rates=[0.01], epochs=1, seeds=1, draws=1)
    found = mf.compare(network, (x, y), test=(x, y), norms=["none", "batch", "layer"], **options)
    assert np.isfinite(found.predicted).all()
    assert np.isfinite(found.measured).all()


def test_a_learning_rate_names_the_layers_that_decide():
    grown = concat(mf.Sequential(), sequential(mf.BatchNorm(), RELU, dense()))
    network = vector(grown, mf.BatchNorm(), RELU)
    rate = mf.learning_rate(network, num_samples=20)
    assert rate.decisive == ("layers/2", "layers/4")
    operator = mf.fisher_operator(mf.build(network, rngs=0), jnp.ones((8, 6)))
    operator.block(*rate.decisive)


def test_numbers_come_back_into_halves_of_a_layer():
    module = CASES["GatedCNN"][0]()
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    variables = module.init(jax.random.key(1), x)
    network = mf.Network.from_flax((module, variables), x)
    assert network.paths["layers/0/first/layers/0"] == "Conv_0[0:8]"
    product = network.layers[0]
    wider = with_weight_var(mf.Network((8, 8, 3), (product.second, *network.layers[1:])), 4.0)
    changed = network.replace((mf.Product(product.first, wider.layers[0]), *network.layers[1:]))
    kernel = changed.apply_to((module, variables))["params"]["Conv_0"]["kernel"]
    before = variables["params"]["Conv_0"]["kernel"]
    np.testing.assert_array_equal(kernel[..., :8], before[..., :8])
    np.testing.assert_allclose(kernel[..., 8:], 2 * before[..., 8:], rtol=1e-6)


def test_models_have_the_theory_of_their_specification():
    for name in ("DenseNet", "GatedMLP", "MLPMixer"):
        make, specification = CASES[name]
        network = specification()
        x = jax.random.normal(jax.random.key(0), (8, *network.input_shape))
        found, expected = mf.analyze(make(), data=x), mf.analyze(network, data=x)
        np.testing.assert_allclose(
            found.fisher.eigenvalues, expected.fisher.eigenvalues, rtol=1e-6, atol=1e-6
        )


WRONG = {
    "no branches": (lambda: vector(concat()), "Concat.branches=.*no branches"),
    "other strides": (
        lambda: image(concat(conv(), conv(stride=2)), mf.Flatten()),
        "layers/1/Concat input shape=.*same strides",
    ),
    "groups": (
        lambda: image(concat(conv(), conv()), conv(groups=2), mf.Flatten()),
        "layers/2/Conv.groups=2: after a Concat",
    ),
    "group norm": (
        lambda: image(concat(conv(), conv()), mf.GroupNorm(num_groups=2), RELU, mf.Flatten()),
        r"layers/2/GroupNorm=\(8, 8\): after a Concat.*BatchNorm",
    ),
    "repeated": (
        lambda: vector(mf.Repeat(concat(dense(4), dense(4)), times=2)),
        "Repeat input parts=.*end the block",
    ),
    "other parts": (
        lambda: vector(concat(dense(2), dense(6)), mf.Residual(concat(dense(4), dense(4)))),
        "Residual input parts=.*Dense or Conv",
    ),
    "no weights of its own": (
        lambda: vector(mf.Product(mf.Sequential(), sequential(RELU))),
        "Product.first=.*Dense or Conv",
    ),
    "other shapes": (lambda: vector(mf.Product(dense(4), dense(5))), "Product input shape=.*equal"),
    "a product of parts": (
        lambda: vector(concat(dense(4), dense(4)), mf.Product(mf.Sequential(), dense())),
        "Product input parts=.*end both branches",
    ),
    "activation of a product": (
        lambda: vector(mf.Product(dense(), dense()), RELU),
        "layers/2/Activation.function=.*Gaussian",
    ),
    "mixed vectors": (lambda: vector(mf.MixPositions((2, 2))), "input shape=.*use Dense"),
    "attention of vectors": (lambda: vector(mf.SelfAttention(2)), "input shape=.*use Dense"),
    "heads": (lambda: image(mf.SelfAttention(3)), "num_heads=3: it does not divide 8 channels"),
    "one number": (lambda: image(mf.MixPositions((2,))), r"positions=\(2,\): not a pair"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_told_in_one_line(name):
    make, message = WRONG[name]
    with pytest.raises(mf.SpecError, match=message) as found:
        make()
    assert "\n" not in str(found.value)


def test_outputs_of_several_variances_have_no_theory():
    network = mf.Network((6,), (dense(), concat(dense(1), sequential(RELU, dense(1)))))
    with pytest.raises(mf.SpecError, match=r"outputs=\(1, 1\).*Dense"):
        mf.analyze(network)
