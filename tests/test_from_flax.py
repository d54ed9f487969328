"""Specifications read from Flax models, against the same specifications written by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_models import (
    CASES,
    REFUSED,
    LinenTransformer,
    OwnLinear,
    ResNetV1,
    SkipInit,
    SmallMLP,
    VisionTransformer,
    vision_transformer,
)
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.network import walk
from meanfield_jax.variants import with_gamma, with_weight_var


def inputs(network: mf.Network, count: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (count, *network.input_shape))


@pytest.mark.parametrize("name", CASES)
def test_a_model_is_read_as_its_specification(name):
    make, specification = CASES[name]
    model, expected = make(), specification()
    found = mf.Network.from_flax(model, inputs(expected))
    assert found.layers == expected.layers
    x = inputs(expected)
    if isinstance(model, nnx.Module):
        sizes = [leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))]
    else:
        sizes = [leaf.size for leaf in jax.tree.leaves(model.init(jax.random.key(0), x)["params"])]
    assert found.num_parameters == sum(sizes)
    assert len(set(found.paths.values())) == len(found.paths) > 1


def test_paths_lead_to_the_layers_of_the_model():
    network = mf.Network.from_flax(SmallMLP(nnx.Rngs(0)), jnp.ones((2, 6)))
    named = network.paths
    assert named["layers/0"] == "layers/0"
    assert named["layers/1"] == "norms/0"
    assert named["layers/4/branch/layers/0"] == "layers/1"
    assert named[f"layers/{len(network.layers) - 1}"] == "head"


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_theory_is_refused_with_its_path(name):
    make, shape, message = REFUSED[name]
    with pytest.raises(mf.SpecError, match=message) as found:
        mf.Network.from_flax(make(), jnp.ones((2, *shape)))
    assert "mf.fisher_operator" in str(found.value)
    assert "\n" not in str(found.value)


def test_factors_and_initializers_of_linen():
    network = mf.Network.from_flax(SkipInit(), jnp.ones((2, 6)))
    residual = network.layers[1]
    assert isinstance(residual, mf.Residual)
    norm, tanh, dense, scale = residual.branch.layers
    assert (norm, dense) == (mf.RMSNorm(eps=1e-6), mf.Dense(16, 2.0, 0.0))
    assert (scale.per, tanh.function) == ("layer", "tanh")
    np.testing.assert_allclose(scale.value, 0.3, rtol=1e-6)
    assert network.paths["layers/1/branch/layers/3"] == "alpha_0"


@pytest.mark.parametrize("make", [lambda: VisionTransformer(nnx.Rngs(0)), LinenTransformer])
def test_a_vision_transformer_is_read_with_the_mean_square_of_its_positions(make):
    model, x = make(), jnp.ones((2, 8, 8, 3))
    given = model if isinstance(model, nnx.Module) else (model, model.init(jax.random.key(0), x))
    network = mf.Network.from_flax(given, x)
    table = given.positions[...] if given is model else given[1]["params"]["positions"]
    assert network.layers[1].bias_var == pytest.approx(float(jnp.mean(table**2)), rel=1e-5)
    positions = network.layers[1].bias_var
    assert network.layers == vision_transformer(positions=positions).layers
    params = nnx.state(given, nnx.Param) if given is model else given[1]["params"]
    assert network.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    doubled = network.replace(
        (network.layers[0], mf.Offset(4 * positions), *network.layers[2:])
    ).apply_to(given)
    moved = doubled.positions[...] if given is model else doubled["params"]["positions"]
    np.testing.assert_allclose(moved, 2 * table, rtol=1e-6)


def test_an_offset_of_channels_is_read():
    class Shifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(8, (3, 3))(x) + self.param("shift", nn.initializers.ones, (1, 1, 1, 8))
            return nn.Dense(2)(nn.relu(x).mean((1, 2)))

    network = mf.Network.from_flax(Shifted(), jnp.ones((2, 4, 4, 3)))
    assert network.layers[1] == mf.Offset(1.0, "channel")


def test_a_subclass_of_a_layer_is_that_layer():
    model = nnx.Sequential(
        OwnLinear(6, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1))
    )
    network = mf.Network.from_flax(model, jnp.ones((2, 6)))
    assert network.layers[0] == mf.Dense(8, 1.0, 0.0)


def test_measured_variances_are_those_of_the_weights():
    model = SmallMLP(nnx.Rngs(0))
    model.head.kernel[...] = 3 * model.head.kernel[...]
    model.head.bias[...] = jnp.arange(4.0)
    network = mf.Network.from_flax(model, jnp.ones((2, 6)), variances="measured")
    head = network.layers[-1]
    expected = 16 * float(jnp.mean(model.head.kernel[...] ** 2))
    np.testing.assert_allclose(head.weight_var, expected, rtol=1e-6)
    np.testing.assert_allclose(head.bias_var, 14 / 4, rtol=1e-6)
    # nothing of the usual fits these weights
    again = mf.Network.from_flax(model, jnp.ones((2, 6)))
    np.testing.assert_allclose(again.layers[-1].weight_var, expected, rtol=1e-6)
    assert again.layers[0].weight_var == 1.0


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_numbers_come_back_into_the_model(kind):
    x = jax.random.normal(jax.random.key(0), (12, *((6,) if kind == "nnx" else (8, 8, 3))))
    if kind == "nnx":
        model = given = SmallMLP(nnx.Rngs(0))
    else:
        model = ResNetV1()
        given = (model, model.init(jax.random.key(1), x))
    network = with_weight_var(with_gamma(mf.Network.from_flax(given, x), 0.25), 2.0)
    changed = network.apply_to(given)
    again = mf.Network.from_flax(
        changed if kind == "nnx" else (model, changed), x, variances="measured"
    )
    before = mf.Network.from_flax(given, x, variances="measured")
    for (path, new), (_, old) in zip(walk(again.body), walk(before.body), strict=True):
        if new.is_norm:
            assert new.gamma == 0.25, path
        elif new.is_weights:
            ratio = 2.0 / dict(walk(mf.Network.from_flax(given, x).body))[path].weight_var
            np.testing.assert_allclose(new.weight_var, ratio * old.weight_var, rtol=1e-5)
    # the model that was passed in is as it was
    assert mf.Network.from_flax(given, x).layers != network.layers


def test_a_model_trained_with_tuned_numbers_is_the_trained_network():
    """One step of both, from the same parameters, on the same batch."""
    x = jax.random.normal(jax.random.key(0), (16, 8, 8, 3))
    model = CASES["ResNetV2"][0]()
    network = with_gamma(mf.Network.from_flax(model, x), 0.5)
    ours, theirs = mf.build(network, rngs=nnx.Rngs(3)), network.apply_to(model)
    named = network.paths
    copied = {}
    for path, value in mf.functional(ours)[1].items():
        layer, _, name = path.rpartition("/")
        copied[f"{named[layer]}/{name}"] = value
    apply, params = mf.functional(theirs)
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in copied.items()}
    ours.eval(), theirs.eval()
    mf.calibrate(ours, x)
    outputs = ours(x)

    def loss(apply, params):
        return jnp.mean(apply(params, x) ** 2)

    ours.train(), theirs.train()
    for module in (ours, theirs):
        for _, inner in nnx.iter_modules(module):
            if isinstance(inner, nnx.Dropout):
                inner.deterministic = True
    apply_ours, params_ours = mf.functional(ours)
    apply, _ = mf.functional(theirs)
    np.testing.assert_allclose(apply(copied, x), outputs, atol=1e-4 * np.abs(outputs).max())
    slopes = jax.grad(lambda p: loss(apply_ours, p))(params_ours)
    expected = jax.grad(lambda p: loss(apply, p))(copied)
    for path, value in slopes.items():
        layer, _, name = path.rpartition("/")
        other = expected[f"{named[layer]}/{name}"]
        assert_close(value, other, "rounding", 10 * np.abs(other).max() + 1e-3, dtype=np.float32)


def test_json_keeps_the_paths():
    network = mf.Network.from_flax(SmallMLP(nnx.Rngs(0)), jnp.ones((2, 6)))
    assert mf.Network.from_json(network.to_json()) == network
    assert network.paths


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Dense, "model='type': not a Flax model"),
        (lambda x: x, "model='function': not a Flax model"),
        (CASES["VGG"][0], "model='its call failed'"),
    ],
)
def test_errors_are_one_line(model, message):
    given = model() if message.endswith("failed'") else model
    with pytest.raises(mf.SpecError, match=message) as found:
        mf.Network.from_flax(given, jnp.ones((2, 7)))
    assert "\n" not in str(found.value)


def test_a_network_of_ones_own_has_no_model():
    with pytest.raises(mf.SpecError, match=r"use Network\.from_flax"):
        mf.mlp([8], inputs=6, outputs=2).apply_to(SmallMLP(nnx.Rngs(0)))
    network = mf.Network.from_flax(SmallMLP(nnx.Rngs(0)), jnp.ones((2, 6)))
    with pytest.raises(mf.SpecError, match="no such parameter"):
        network.apply_to(CASES["VGG"][0]())


@pytest.mark.parametrize("name", ["VGG", "MnistCNN"])
def test_analyze_reads_a_model(name):
    model = CASES[name][0]()
    network = CASES[name][1]()
    x = jax.random.normal(jax.random.key(0), (8, *network.input_shape))
    found, expected = mf.analyze(model, data=x), mf.analyze(network, data=x)
    np.testing.assert_array_equal(found.fisher.eigenvalues, expected.fisher.eigenvalues)
    with pytest.raises(mf.SpecError, match="data=None: a model is read from its run"):
        mf.analyze(model)
    with pytest.raises(mf.SpecError, match=r"Network\.from_flax"):
        mf.build(model, rngs=0)
