"""BatchGroupNorm and InstanceEnhancementBatchNorm: definitions, theory against draws, limits."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf

SHAPES = {"vector": (8,), "map": (4, 3, 8)}
NORMS = {
    "groups": mf.BatchGroupNorm(1.3, 0.2, num_groups=4),
    "enhanced": mf.InstanceEnhancementBatchNorm(1.3, 0.2),
}


def batch(shape, seed: int = 0, samples: int = 24):
    return 2 * jax.random.normal(jax.random.key(seed), (samples, *shape)) + 1


def module(norm: mf.Layer, shape) -> nnx.Module:
    return norm.build(shape, nnx.Rngs(0))


def applied(model, x):
    return nnx.merge(*nnx.split(model), copy=True)(x)


# ---- what they compute


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_statistics_of_groups_are_over_batch_positions_and_channels(shape):
    model, x = module(NORMS["groups"], shape), batch(shape)
    groups = np.asarray(x, np.float64).reshape(-1, 4, 2)
    mean, var = groups.mean((0, 2)), groups.var((0, 2))
    z = (groups - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
    expected = (1.3 * z + 0.2).reshape(x.shape)
    assert_close(model(x), expected, "rounding", 5.0, dtype=np.float32)
    assert model.mean[...].shape == (4,)
    assert_close(model.mean[...], 0.01 * mean, "rounding", 1.0, dtype=np.float32)
    assert_close(model.var[...], 0.99 + 0.01 * var, "rounding", 1.0, dtype=np.float32)


@pytest.mark.parametrize("groups", [16, 32, 96])
def test_more_groups_than_channels_are_parts_of_a_map(groups):
    shape = SHAPES["map"]
    norm = mf.BatchGroupNorm(1.3, 0.2, num_groups=groups)
    model, x = module(norm, shape), batch(shape)
    # channel by channel, row by row
    values = np.asarray(x, np.float64).transpose(0, 3, 1, 2).reshape(24, groups, -1)
    mean, var = values.mean((0, 2)), values.var((0, 2))
    z = (values - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
    expected = 1.3 * z.reshape(24, 8, 4, 3).transpose(0, 2, 3, 1) + 0.2
    assert_close(model(x), expected, "rounding", 5.0, dtype=np.float32)
    assert_close(model.mean[...], 0.01 * mean, "rounding", 1.0, dtype=np.float32)
    network = mf.cnn([8], inputs=(*shape[:2], 3), kernel_size=1, stride=1, outputs=2, norm=norm)
    assert mf.build(network, rngs=nnx.Rngs(0))(jnp.ones((2, 4, 3, 3))).shape == (2, 2)
    with pytest.raises(mf.SpecError, match=f"num_groups={groups}: there is no theory for more"):
        mf.analyze(network, num_samples=16)


def test_one_group_a_value_is_batch_norm_per_position():
    shape, x = SHAPES["map"], batch(SHAPES["map"])
    groups = module(mf.BatchGroupNorm(1.3, 0.2, num_groups=96), shape)
    plain = module(mf.BatchNorm(1.3, 0.2, axes="position"), shape)
    expected = np.asarray(plain(x))
    assert_close(groups(x), expected, "rounding", 5.0, dtype=np.float32)


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_as_many_groups_as_channels_are_batch_norm_to_the_bit(shape, jitted):
    groups = module(mf.BatchGroupNorm(1.3, 0.2, num_groups=8), shape)
    plain = module(mf.BatchNorm(1.3, 0.2), shape)
    call = nnx.jit(lambda model, x: model(x)) if jitted else lambda model, x: model(x)
    for step in range(3):
        x = batch(shape, step)
        np.testing.assert_array_equal(call(groups, x), call(plain, x))
        for name in ("mean", "var"):
            a, b = (getattr(model, name)[...] for model in (groups, plain))
            np.testing.assert_array_equal(a, b)
    groups.eval()
    plain.eval()
    np.testing.assert_array_equal(call(groups, x), call(plain, x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statistics", "given"),
    [
        ("batch", dict(data=np.random.default_rng(0).normal(size=(6, 4, 4, 3)))),
        ("batch", dict(num_samples=12)),
        ("frozen", dict(num_samples=12)),
        ("wei2019", dict(num_samples=12)),
    ],
)
def test_theory_of_as_many_groups_as_channels_is_that_of_batch_norm(statistics, given, x64):
    norms = (mf.BatchNorm(1.3, 0.2), mf.BatchGroupNorm(1.3, 0.2, num_groups=8))
    networks = (mf.cnn([8], inputs=(4, 4, 3), norm=norm) for norm in norms)
    fishers = [mf.analyze(net, statistics=statistics, **given).fisher for net in networks]
    for a, b in zip(*map(jax.tree.leaves, fishers), strict=True):
        assert_close(a, b, "rounding", max(1.0, float(np.abs(b).max())))


def gates(x: np.ndarray, slope: float, start: float) -> np.ndarray:
    means = x.mean(tuple(range(1, x.ndim - 1)), keepdims=True)
    return 1 / (1 + np.exp(-(slope * means + start)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_gate_is_that_of_the_definition_and_starts_at_sigmoid_of_minus_one(shape):
    model, plain = module(NORMS["enhanced"], shape), module(mf.BatchNorm(1.3, 0.0), shape)
    x = batch(shape)
    normalized = np.asarray(plain(x), np.float64)
    start = normalized / (1 + np.e) + 0.2
    assert_close(model(x), start, "rounding", 5.0, dtype=np.float32)
    model.gate_scale[...] = jnp.full(8, 0.7)
    expected = gates(np.asarray(x, np.float64), 0.7, -1.0) * normalized + 0.2
    assert_close(model(x), expected, "rounding", 5.0, dtype=np.float32)
    # in evaluation the batch has no say, the sample's own gate has
    model.eval()
    first, alone = np.asarray(model(x))[:1], np.asarray(model(x[:1]))
    assert_close(alone, first, "rounding", 5.0, dtype=np.float32)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_statistics_of_half_precision_are_float32(norm, shape):
    x = (batch(shape) + 100).astype(jnp.bfloat16)
    half, single = module(norm, shape), module(norm, shape)
    y = half(x)
    assert y.dtype == jnp.bfloat16
    assert half.var[...].dtype == jnp.float32
    expected = single(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_mesh_axis_joins_the_batches_of_its_devices(norm, shape):
    whole, split = module(norm, shape), module(norm, shape)
    split.set_attributes(axis_name="data")
    x = batch(shape)
    pieces = x.reshape(4, 6, *shape)
    y = jax.vmap(lambda piece: applied(split, piece), axis_name="data")(pieces)
    expected = np.asarray(whole(x))
    assert_close(y.reshape(x.shape), expected, "rounding", 10.0, dtype=np.float32)


# ---- theory against random networks


@pytest.mark.slow
def test_groups_of_two_are_predicted_as_documented():
    network = mf.mlp([256] * 2, inputs=50, outputs=4, norm=mf.BatchGroupNorm(num_groups=128))
    x = jax.random.normal(jax.random.key(0), (32, 50))
    ratio = float(mf.analyze(network, data=x).fisher.outlier) / draws.outliers(network, x, 6).mean()
    assert 1 < ratio < 1.1


def test_what_goes_through_the_gate_adds_its_square_to_the_outlier(x64):
    def outlier(norm: mf.Layer, width: int) -> float:
        return float(mf.analyze(mf.mlp([width], inputs=50, outputs=4, norm=norm)).fisher.outlier)

    norms = (mf.BatchNorm(), mf.InstanceEnhancementBatchNorm())
    plain, gated = ([outlier(norm, width) for width in (1000, 2000)] for norm in norms)
    # biases and the norm's own parameters are the same at any width
    ratio = (plain[1] - plain[0]) / (gated[1] - gated[0])
    assert_close(ratio, (1 + np.e) ** 2, "rounding", 1000.0)
    assert 13 < plain[1] / gated[1] < 13.83
    opened = outlier(mf.InstanceEnhancementBatchNorm(gate=40.0), 1000)
    assert_close(opened, plain[0], "rounding", 1000.0)


# ---- in use


def test_parameters_are_counted():
    first = mf.mlp([16], inputs=4, outputs=2, norm=NORMS["groups"])
    second = mf.mlp([16], inputs=4, outputs=2, norm=NORMS["enhanced"])
    for network in (first, second):
        params = mf.functional(mf.build(network, rngs=nnx.Rngs(0)))[1]
        assert network.num_parameters == sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: mf.BatchGroupNorm(num_groups=0), ("num_groups=0", "must be an integer")),
        (
            lambda: mf.mlp([12], inputs=4, outputs=2, norm=mf.BatchGroupNorm(num_groups=5)),
            ("layers/1/BatchGroupNorm.num_groups=5", "12 channels", "1, 2, 3, 4, 6, 12"),
        ),
        (
            lambda: mf.cnn(
                [12], inputs=(3, 3, 3), stride=1, outputs=2, norm=mf.BatchGroupNorm(num_groups=24)
            ),
            ("layers/1/BatchGroupNorm.num_groups=24", "12 channels"),
        ),
        (
            lambda: mf.mlp(
                [12], inputs=4, outputs=2, norm=mf.InstanceEnhancementBatchNorm(gate=np.inf)
            ).validate(),
            ("layers/1/InstanceEnhancementBatchNorm.gate=inf", "finite"),
        ),
    ],
)
def test_bad_input_is_one_line(build, expected):
    with pytest.raises(mf.SpecError) as caught:
        build()
    assert "\n" not in str(caught.value)
    for part in expected:
        assert part in str(caught.value)
