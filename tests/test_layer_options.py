"""Options of layers, and layers after one another, against networks drawn at random."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_models import mlp_mixer, vision_transformer
from tolerance import standard_error

import meanfield_jax as mf
from meanfield_jax.kernel.gram_matrix import GramMatrix
from meanfield_jax.kernel.positions import Positions
from meanfield_jax.layers.pool import Values, largest

RELU, WIDTH = mf.Activation("relu"), 48


def dense(width: int = WIDTH, **options) -> mf.Dense:
    return mf.Dense(width, 1.5, 0.2, **options)


def conv(width: int = WIDTH, kernel_size: int = 3, **options) -> mf.Conv:
    return mf.Conv(width, kernel_size, weight_var=1.5, bias_var=0.2, **options)


def vector(*layers) -> mf.Network:
    return mf.Network((12,), (*layers, dense(2)))


def image(*layers) -> mf.Network:
    return mf.Network((4, 4, 12), (*layers, dense(2)))


def grown(*layers) -> mf.Concat:
    """The block of a DenseNet: what comes in, and beside it what these layers make of it."""
    return mf.Concat((mf.Sequential(), mf.Sequential(layers)))


SILU = mf.Activation("silu")
PROJECTION = mf.Residual(mf.Sequential((RELU, dense())), mf.Sequential((dense(),)))
NETWORKS = {
    "no bias": vector(dense(use_bias=False), RELU),
    "multiplier": vector(dense(multiplier=2.0), RELU, dense(multiplier=0.3), RELU),
    "groups": image(conv(groups=2), RELU, conv(groups=4, multiplier=0.5), RELU, mf.Flatten()),
    "dilation": image(conv(dilation=2), RELU, mf.Flatten()),
    "padding": image(conv(padding=2), RELU, conv(padding=0, use_bias=False), RELU, mf.Flatten()),
    "stride": image(conv(stride=2, padding=1), RELU, mf.GlobalMeanPool()),
    "projection": vector(dense(), PROJECTION, RELU),
    "projection of a map": image(
        conv(),
        RELU,
        mf.Residual(
            mf.Sequential((conv(stride=2), RELU, conv())),
            mf.Sequential((conv(kernel_size=1, stride=2),)),
        ),
        mf.GlobalMeanPool(),
    ),
    "norm of channels": image(conv(), mf.LayerNorm(over_positions=False), RELU, mf.Flatten()),
    "norm without offset": vector(dense(), mf.LayerNorm(1.3, 0.4, use_bias=False), RELU),
    "factor of a layer": vector(
        dense(), mf.Residual(mf.Sequential((RELU, dense(), mf.Scale(0.5, "layer")))), RELU
    ),
    "constant factor": vector(dense(), RELU, mf.Scale(-1.5, "none")),
    "RMSNorm after ReLU": vector(dense(), RELU, mf.RMSNorm(1.2)),
    "padded pools": image(conv(), mf.AvgPool(3, 2, "SAME"), RELU, mf.AvgPool(2, 1), mf.Flatten()),
    "dense blocks": image(
        conv(),
        grown(RELU, conv(2 * WIDTH)),
        grown(RELU, conv()),
        RELU,
        conv(stride=2),
        mf.Flatten(),
    ),
    "dense blocks with LayerNorm": vector(
        dense(),
        *(grown(mf.LayerNorm(1.2), RELU, dense()),) * 2,
        *(mf.RMSNorm(0.8), RELU),
    ),
    "a sum after a concatenation": vector(
        dense(), grown(dense()), mf.Residual(mf.Sequential((RELU, dense(2 * WIDTH)))), RELU
    ),
    "a sum of concatenations": vector(
        dense(),
        grown(dense()),
        mf.Residual(mf.Concat((dense(), mf.Sequential((RELU, dense()))))),
        RELU,
    ),
    "parts that are pooled": image(
        conv(), grown(conv()), mf.MaxPool(2, 2), RELU, mf.AvgPool(2, 1), mf.GlobalMeanPool()
    ),
    "repeated parts": vector(
        dense(),
        grown(RELU, dense()),
        mf.Repeat(mf.Residual(mf.Sequential((RELU, dense(2 * WIDTH)))), times=2),
        RELU,
    ),
    "SwiGLU": vector(
        dense(), mf.RMSNorm(), mf.Product(mf.Sequential((dense(), SILU)), dense()), dense(), RELU
    ),
    "a gate of the inputs themselves": image(
        conv(), RELU, mf.Product(mf.Sequential(), mf.Sequential((conv(), RELU))), mf.Flatten()
    ),
    "attention": image(
        conv(), mf.LayerNorm(over_positions=False), mf.SelfAttention(8), RELU, mf.GlobalMeanPool()
    ),
    "attention with a temperature": image(
        conv(), RELU, mf.SelfAttention(8, 1.5, 2.0, 1.0, 0.7, use_bias=False), RELU, mf.Flatten()
    ),
    "offsets of positions": image(conv(), mf.Offset(0.5), RELU, mf.GlobalMeanPool()),
    "offsets of channels": image(
        conv(), RELU, mf.Offset(0.5, "channel"), conv(), mf.BatchNorm(), RELU, mf.Flatten()
    ),
    "dropout": vector(dense(), RELU, mf.Dropout(0.0), dense(), RELU),
}
APPROXIMATE = {
    "ReLU after the sum": (
        0.06,
        vector(dense(), RELU, mf.Residual(mf.Sequential((dense(), RELU, dense()))), RELU),
    ),
    "LayerNorm after the sum": (
        0.05,
        vector(dense(), RELU, mf.Residual(dense()), mf.LayerNorm(), RELU),
    ),
    "MLP-Mixer": (0.12, mlp_mixer(WIDTH, blocks=1)),
    "vision transformer": (0.08, vision_transformer(WIDTH, heads=6)),
    "overlapping maxima": (0.10, image(conv(), mf.MaxPool(3, 2, "SAME"), RELU, mf.Flatten())),
    "depthwise": (
        0.08,
        image(conv(), mf.BatchNorm(), RELU, conv(groups=WIDTH), mf.BatchNorm(), RELU, mf.Flatten()),
    ),
}
"""A network, and the relative error of its tangent kernel that is allowed."""


def check(network: mf.Network, allowed: float = 0.0) -> None:
    x = np.random.default_rng(0).normal(size=(12, *network.input_shape))
    found = draws.tangents(network, x, 128)
    expected = draws.predicted(network, x)
    size = np.linalg.norm(expected)
    error = np.linalg.norm(found.mean(0) - expected) / size
    noise = np.linalg.norm(standard_error(found)) / size
    # corrections of the width are of the size of its inverse
    assert error < max(4 * noise, allowed, 1 / WIDTH), (error, noise)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_this_option_meet_their_theory(name):
    check(NETWORKS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_rules_err_by_no_more_than_they_say(name):
    allowed, network = APPROXIMATE[name]
    check(network, allowed)


@pytest.mark.parametrize("name", [*NETWORKS, *APPROXIMATE])
def test_parameters_are_those_of_the_flax_network(name):
    network = NETWORKS.get(name) or APPROXIMATE[name][1]
    params = mf.functional(mf.build(network, rngs=0))[1]
    assert network.num_parameters == sum(value.size for value in params.values())
    assert mf.Network.from_json(network.to_json()) == network


def test_the_larger_of_two_gaussians_has_these_moments():
    """Unequal variances and means, two samples: against draws of the four values."""
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(4, 4))
    covariance, means = factor @ factor.T / 4, np.array([0.3, -0.2, 0.0, 0.5])
    tangent = np.diag(rng.uniform(1, 2, 4)) + 0.5

    def matrix(full):
        entries = full.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 2, 2)
        return GramMatrix(jnp.asarray(entries), Positions((2, 1), 1))

    values = Values(matrix(covariance), matrix(tangent), jnp.asarray(means.reshape(2, 2)))
    larger = largest(values, axis=0, size=2, step=1)
    drawn = rng.multivariate_normal(means, covariance, size=400_000).reshape(-1, 2, 2)
    top, place = drawn.max(1), drawn.argmax(1)
    error = 6 / np.sqrt(len(drawn))
    np.testing.assert_allclose(larger.means.ravel(), top.mean(0), atol=error)
    np.testing.assert_allclose(larger.covariance.entries[0], np.cov(top.T), atol=error + 0.01)
    full = tangent.reshape(2, 2, 2, 2)
    expected = [[full[place[:, i], i, place[:, j], j].mean() for j in (0, 1)] for i in (0, 1)]
    np.testing.assert_allclose(larger.tangent.entries[0], expected, atol=2 * error + 0.01)


# ---- parametrizations


def mlp(width: int) -> mf.Network:
    return mf.mlp([width] * 3, inputs=16, outputs=4)


def test_the_neural_tangent_parametrization_has_parameters_of_variance_one():
    network = mlp(64).in_parametrization("ntk")
    for value in mf.functional(mf.build(network, rngs=0))[1].values():
        if value.ndim == 2:
            assert abs(float(np.var(value)) - 1) < 6 * np.sqrt(2 / value.size)
    outputs = [
        float(mf.analyze(mlp(width).in_parametrization("ntk"), num_samples=20).fisher.tangent_same)
        for width in (64, 4096)
    ]
    # the biases of a wide network have a share of order 1
    assert abs(outputs[1] / outputs[0] - 1) < 0.01


def test_maximal_update_makes_the_outliers_independent_of_width(x64):
    def outlier(network):
        return float(mf.analyze(network, num_samples=20).fisher.outlier)

    standard = [outlier(mlp(width)) for width in (64, 4096)]
    assert 50 < standard[1] / standard[0] < 64
    for make in (mlp, lambda w: mf.cnn([w] * 2, inputs=(8, 8, 3), head="mean")):
        found = [outlier(make(w).in_parametrization("mup", make(64))) for w in (64, 512, 4096)]
        assert found[0] == pytest.approx(outlier(make(64)), rel=1e-12)
        np.testing.assert_allclose(found, found[-1], rtol=0.04)


def test_a_network_computes_the_same_in_every_parametrization():
    network = mlp(32)
    x = jax.random.normal(jax.random.key(0), (5, 16))
    outputs = [mf.build(spec, rngs=3)(x) for spec in (network, network.in_parametrization("ntk"))]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4)


def test_wrong_parametrizations_are_refused():
    with pytest.raises(mf.SpecError, match="kind='sp'"):
        mlp(8).in_parametrization("sp")
    with pytest.raises(mf.SpecError, match=r"base=.*same structure"):
        mlp(8).in_parametrization("mup")
    with pytest.raises(mf.SpecError, match=r"multiplier=0\.0: must be finite and positive"):
        vector(dense(multiplier=0.0)).validate()
