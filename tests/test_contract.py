"""What every layer owes: found by walking the classes, each with one row in ``EXAMPLES``."""

import dataclasses
import math
import re
from pathlib import Path

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close, standard_error, tolerance

import meanfield_jax as mf
from meanfield_jax.layers import LAYERS, Norm
from meanfield_jax.layers.pool import Pool
from meanfield_jax.network import normalizes_over_batch
from meanfield_jax.pytree import pytree

WEIGHT_VAR, BIAS_VAR, GAMMA = 1.7, 0.3, 1.3
STARTS = {"scale": GAMMA, "factor": 0.7, "gate_bias": mf.InstanceEnhancementBatchNorm().gate}
NUM_SAMPLES = 48
RELU = mf.Activation("relu")


def dense(width: int) -> mf.Dense:
    return mf.Dense(width, WEIGHT_VAR, BIAS_VAR)


def conv(width: int, **options) -> mf.Conv:
    return mf.Conv(width, weight_var=WEIGHT_VAR, bias_var=BIAS_VAR, **options)


def vector(*layers) -> mf.Network:
    """Inputs and outputs around the layers, which are given a width to start from."""
    return mf.Network((layers[0].width,), (*layers, dense(2)))


def image(width: int, *layers) -> mf.Network:
    return mf.Network((4, 4, width), (*layers, dense(2)))


# A small network that rests on the layer, by its width. A new layer class adds a row here.
EXAMPLES = {
    "Dense": lambda width: vector(dense(width), dense(width)),
    "Activation": lambda width: vector(dense(width), mf.Activation("erf")),
    "BatchNorm": lambda width: vector(dense(width), mf.BatchNorm(GAMMA), RELU),
    "LayerNorm": lambda width: vector(dense(width), mf.LayerNorm(GAMMA), RELU),
    "ProxyNorm": lambda width: vector(dense(width), mf.ProxyNorm(mf.LayerNorm(GAMMA))),
    "BatchGroupNorm": lambda width: vector(
        dense(width), mf.BatchGroupNorm(GAMMA, num_groups=width // 4), RELU
    ),
    "InstanceEnhancementBatchNorm": lambda width: vector(
        dense(width), mf.InstanceEnhancementBatchNorm(GAMMA), RELU
    ),
    "CrossIterationBatchNorm": lambda width: vector(
        dense(width), mf.CrossIterationBatchNorm((dense(width), mf.BatchNorm(GAMMA))), RELU
    ),
    "GroupNorm": lambda width: image(
        width, conv(width), mf.GroupNorm(GAMMA, num_groups=2), mf.Flatten()
    ),
    "InstanceNorm": lambda width: image(width, conv(width), mf.InstanceNorm(GAMMA), mf.Flatten()),
    "Conv": lambda width: image(width, conv(width, stride=2), mf.Flatten()),
    "Flatten": lambda width: image(width, mf.Flatten()),
    "GlobalMeanPool": lambda width: image(width, conv(width), RELU, mf.GlobalMeanPool()),
    "Sequential": lambda width: vector(dense(width), mf.Sequential((RELU, dense(width)))),
    "Residual": lambda width: vector(
        dense(width), mf.Residual(mf.Sequential((RELU, dense(width)))), RELU
    ),
    "AvgPool": lambda width: image(width, conv(width), mf.AvgPool(), RELU, mf.Flatten()),
    "MaxPool": lambda width: image(width, conv(width), mf.MaxPool(), RELU, mf.Flatten()),
    "Dropout": lambda width: vector(dense(width), RELU, mf.Dropout(0.0)),
    "RMSNorm": lambda width: vector(dense(width), mf.RMSNorm(GAMMA), RELU),
    "Scale": lambda width: vector(
        dense(width), mf.Residual(mf.Sequential((dense(width), mf.Scale(0.7)))), RELU
    ),
    "Concat": lambda width: vector(
        dense(width), mf.Concat((dense(width), mf.Sequential((RELU, dense(2 * width))))), RELU
    ),
    "Product": lambda width: vector(
        dense(width), mf.Product(dense(width), mf.Sequential((dense(width), mf.Activation("erf"))))
    ),
    "MixPositions": lambda width: image(
        width,
        conv(width),
        RELU,
        mf.MixPositions((5, 3), WEIGHT_VAR, BIAS_VAR),
        RELU,
        mf.MixPositions((4, 4), WEIGHT_VAR, BIAS_VAR),
        mf.Flatten(),
    ),
    "SelfAttention": lambda width: image(
        width,
        conv(width),
        mf.LayerNorm(GAMMA, over_positions=False),
        mf.SelfAttention(4, *(WEIGHT_VAR,) * 4, use_bias=False),
        RELU,
        mf.Flatten(),
    ),
    "Offset": lambda width: image(width, conv(width), mf.Offset(BIAS_VAR), RELU, mf.Flatten()),
    "Repeat": lambda width: vector(
        dense(width), mf.Repeat(mf.Sequential((RELU, dense(width))), times=3)
    ),
}
LAYER_NAMES = sorted(EXAMPLES)
APPROXIMATE = {"MaxPool": 0.04}
"""The error of rules that are approximate at any width, as their docstrings state it."""


def example(name: str, width: int = 8) -> mf.Network:
    return EXAMPLES[name](width)


def leaves_of(network: mf.Network):
    """The numbers of a network as one vector, and the way back."""
    leaves, treedef = jax.tree.flatten(network)

    def rebuild(vector) -> mf.Network:
        return jax.tree.unflatten(treedef, [vector[index] for index in range(len(leaves))])

    return np.asarray(leaves), rebuild


def summary(network: mf.Network):
    """Every number of a theory, flat."""
    theory = mf.analyze(network, num_samples=NUM_SAMPLES)
    parts = jax.tree.leaves((theory.fisher, theory.order_parameters, theory.kernel.moment))
    return jnp.concatenate([jnp.ravel(part) for part in parts])


def test_every_layer_class_has_an_example():
    def subclasses(cls):
        return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))

    own = {
        c
        for c in subclasses(mf.Layer) - {mf.Layer, Norm, Pool}
        if c.__module__.startswith("meanfield_jax")
    }
    assert {c.__name__ for c in own} == set(LAYERS), "decorate the class with @layer"
    assert set(LAYERS) == set(EXAMPLES), "add a row to EXAMPLES"
    for name in EXAMPLES:
        assert name in example(name).to_json()


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_json_round_trip(name):
    network = example(name)
    assert mf.Network.from_json(network.to_json()) == network


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_dtypes_follow_the_mode(name):
    network = example(name)
    single = summary(network)
    assert single.dtype == jnp.float32
    with jax.enable_x64():
        double = summary(network)
    assert double.dtype == jnp.float64
    assert_close(single, double, "rounding", np.abs(double).max(), dtype=np.float32)


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_jit_and_vmap_over_every_number_equal_a_loop(name, x64):
    base, rebuild = leaves_of(example(name))
    change = 0.2 * base + 0.1
    # one row for every number that moves, one for all and one for none
    changes = np.concatenate([np.diag(change), change[None], np.zeros_like(change)[None]])
    moved = jnp.asarray(base + changes)
    rows = jax.jit(
        jax.vmap(lambda vector: summary(rebuild(vector))), compiler_options=draws.UNFUSED
    )(moved)
    for row, vector in zip(rows, moved, strict=True):
        expected = summary(rebuild([float(value) for value in vector]))
        assert_close(row, expected, "quadrature", np.abs(expected).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_derivatives_equal_central_differences(name, x64):
    base, rebuild = leaves_of(example(name))

    def value(vector):
        fisher = mf.analyze(rebuild(vector), num_samples=NUM_SAMPLES).fisher
        return jnp.log(fisher.outlier) + jnp.log(fisher.tangent_same)

    direction = np.random.default_rng(0).normal(size=base.shape)

    def derivatives(vector):
        (value_here, gradient), (_, curvature) = jax.jvp(
            jax.value_and_grad(value), (vector,), (jnp.asarray(direction),)
        )
        return value_here, gradient, curvature

    # the center, both sides of it in the direction, both sides in every number
    step = 1e-5  # the cube root of eps
    sides = np.concatenate([np.zeros_like(base)[None], direction[None], np.eye(len(base))])
    points = base + step * np.concatenate([sides, -sides[1:]])
    values, gradients, curvatures = jax.jit(
        lambda points: jax.lax.map(derivatives, points), compiler_options=draws.UNFUSED
    )(jnp.asarray(points))
    up, down = values[1 : len(sides)], values[len(sides) :]
    differences = (up - down) / (2 * step)

    size = np.abs(gradients[0]).max() + 1
    # an offset's derivative at 0 is 0 by symmetry or covered by the direction
    moving = base != 0
    assert_close(gradients[0][moving], differences[1:][moving], "difference", size)
    assert_close(gradients[0] @ direction, differences[0], "difference", 10 * size)
    slopes = (gradients[1] - gradients[len(sides)]) / (2 * step)
    assert_close(curvatures[0], slopes, "second_difference", size)


# ---- parity with the Flax network


def parameters(network: mf.Network, key) -> dict:
    return mf.functional(mf.build(network, rngs=nnx.Rngs(key)))[1]


@pytest.mark.parametrize("name", LAYER_NAMES)
def test_the_flax_network_draws_the_declared_variances(name):
    network = example(name, 40)
    drawn_values = parameters(network, 7)
    for path, value in drawn_values.items():
        kind, value = path.rpartition("/")[2], np.asarray(value, np.float64)
        repeats = "block" in path
        if kind == "kernel":
            fan_in = math.prod(value.shape[repeats:-1])
            expected, drawn = WEIGHT_VAR, value * math.sqrt(fan_in)
        elif kind == "offset" or (kind == "bias" and f"{path[:-4]}kernel" in drawn_values):
            expected, drawn = BIAS_VAR, value
        else:
            np.testing.assert_array_equal(value, np.float32(STARTS.get(kind, 0)))
            continue
        # the variance of a Gaussian's square is 2 (its variance)^2
        error = expected * math.sqrt(2 / value.size)
        assert_close((drawn**2).mean(), expected, "monte_carlo", 0, standard_error=error)
        error = math.sqrt(expected / value.size)
        assert_close(drawn.mean(), 0.0, "monte_carlo", 0, standard_error=error)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYER_NAMES)
def test_the_tangent_kernel_is_that_of_random_networks(name):
    # on a batch the error falls as the width doubles twice
    errors, noises = [], []
    shape = example(name).input_shape
    x = np.tile(np.random.default_rng(0).normal(size=(16, *shape[:-1], 4)), shape[-1] // 4)
    for width in (8, 32):
        # of the same inputs, so that theory is the same program
        network = dataclasses.replace(example(name, width), input_shape=shape)
        found = draws.tangents(network, x, 512)
        expected = draws.predicted(network, x)
        size = np.linalg.norm(expected)
        errors.append(np.linalg.norm(found.mean(0) - expected) / size)
        noises.append(np.linalg.norm(standard_error(found)) / size)
    assert errors[0] < 1
    rounding = tolerance("rounding", dtype=np.float32)
    assert errors[1] < max(errors[0] / 2, 4 * noises[1], rounding, APPROXIMATE.get(name, 0))

    # on Gaussian inputs
    found = draws.summaries(draws.tangents(example(name, 48), NUM_SAMPLES, 16))
    fisher = mf.analyze(example(name, 48), num_samples=NUM_SAMPLES).fisher
    # the variance's own derivative, which BatchNorm's rule leaves out, is O(1/samples)
    normalized = normalizes_over_batch(example(name).body)
    effective = 1 / (1 / 48 + (1.5 / NUM_SAMPLES if normalized else 0))
    expected = [fisher.tangent_same, fisher.tangent_other]
    draws.assert_mean(found, expected, effective, scale=float(fisher.tangent_same))


# ---- combinators are what they stand for


def unrolled(times: int, *block) -> mf.Network:
    return mf.Network((6,), (dense(8), *(block * times), RELU, dense(2)))


def repeated(times: int, *block) -> mf.Network:
    repeat = mf.Repeat(mf.Sequential(block), times=times)
    return mf.Network((6,), (dense(8), repeat, RELU, dense(2)))


BLOCKS = {
    "plain": (RELU, dense(8)),
    "normed": (mf.BatchNorm(GAMMA), RELU, dense(8)),
    "offset": (mf.BatchNorm(GAMMA, 0.2), mf.Activation("erf"), dense(8)),
    "ends_in_norm": (dense(8), mf.BatchNorm(GAMMA, 0.2)),
}


@pytest.mark.parametrize(
    ("name", "statistics"), [("plain", "batch"), ("offset", "batch"), ("ends_in_norm", "frozen")]
)
def test_repeat_is_its_block_written_out(name, statistics, x64):
    network, written_out = repeated(3, *BLOCKS[name]), unrolled(3, *BLOCKS[name])
    assert network.num_parameters == written_out.num_parameters
    a, b = (
        mf.analyze(spec, statistics=statistics, num_samples=20) for spec in (network, written_out)
    )
    scale = float(b.fisher.tangent_same)
    for one, other in zip(jax.tree.leaves(a.fisher), jax.tree.leaves(b.fisher), strict=True):
        assert_close(one, other, "rounding", scale)
    order = zip(
        jax.tree.leaves(a.order_parameters), jax.tree.leaves(b.order_parameters), strict=True
    )
    for one, other in order:
        assert_close(one, other, "rounding", np.abs(other).max())
    assert len(a.fisher.contributions.layers) == len(set(a.fisher.contributions.layers))


def test_a_repeated_flax_block_computes_its_repetitions_one_after_the_other():
    block = BLOCKS["normed"]
    model = mf.build(repeated(3, *block), rngs=nnx.Rngs(0))
    apply, params = mf.functional(model)
    apply_out, params_out = mf.functional(mf.build(unrolled(3, *block), rngs=nnx.Rngs(1)))
    moved = {}
    for path, value in params.items():
        _, index, *rest = path.split("/")
        if rest[0] != "block":
            index = int(index) + (0 if index == "0" else 3 * len(block) - 1)
            moved[f"layers/{index}/{rest[-1]}"] = value
            continue
        for time in range(3):
            moved[f"layers/{1 + 3 * time + int(rest[2])}/{rest[-1]}"] = value[time]
    assert moved.keys() == params_out.keys()
    x = jax.random.normal(jax.random.key(2), (10, 6))
    expected = np.asarray(apply_out(moved, x))
    assert_close(apply(params, x), expected, "rounding", np.abs(expected).max(), dtype=np.float32)


def test_each_repetition_has_its_own_parameters():
    values = parameters(repeated(3, *BLOCKS["plain"]), 0)["layers/1/block/layers/1/kernel"]
    assert values.shape == (3, 8, 8)
    assert np.abs(values[0] - values[1]).min() > 0


def test_a_sequential_inside_is_its_layers_in_place(x64):
    first = mf.Network(
        (6,), (mf.Sequential((dense(8), mf.Sequential((mf.BatchNorm(), RELU)))), dense(2))
    )
    second = mf.Network((6,), (dense(8), mf.BatchNorm(), RELU, dense(2)))
    assert first.num_parameters == second.num_parameters
    np.testing.assert_array_equal(summary(first), summary(second))
    paths = mf.analyze(first).fisher.contributions.layers
    assert paths == ("layers/0/layers/0", "layers/0/layers/1/layers/0", "layers/1")


def test_residual_adds_moments_and_tangents(x64):
    branch = mf.Residual(mf.Sequential((RELU, mf.Dense(8, 1.1, 0.4))))
    theory = mf.analyze(mf.Network((6,), (dense(8), branch, mf.Dense(2, 1.0, 0.0))))
    q, q_xy = WEIGHT_VAR + BIAS_VAR, BIAS_VAR
    c = q_xy / q
    hat = q / (2 * math.pi) * (math.sqrt(1 - c**2) + c * (math.pi / 2 + math.asin(c)))
    slope = (math.pi / 2 + math.asin(c)) / (2 * math.pi)
    assert_close(theory.order_parameters.q[-1], q + 0.4 + 1.1 * q / 2, "rounding")
    assert_close(theory.order_parameters.q_xy[-1], q_xy + 0.4 + 1.1 * hat, "rounding")
    first_same, first_other = 6 + 1, 1
    inner_same = 8 * q / 2 + 1 + 1.1 * first_same / 2
    inner_other = 8 * hat + 1 + 1.1 * first_other * slope
    last_same = 8 * theory.order_parameters.q[-1] + 1 + first_same + inner_same
    last_other = 8 * theory.order_parameters.q_xy[-1] + 1 + first_other + inner_other
    assert_close(theory.fisher.tangent_same, last_same, "rounding")
    assert_close(theory.fisher.tangent_other, last_other, "rounding")


def test_what_scatters_in_a_draw_is_the_share_of_a_branch(x64):
    def width_before(weight_var):
        branch = mf.Residual(mf.Sequential((mf.Dense(8, weight_var, 0.0),)))
        network = mf.Network((6,), (dense(8), branch, mf.Dense(2, 1.0, 0.0)))
        return float(mf.analyze(network).fisher.draw_width[0]) ** 2 / 2  # two outputs

    # the last layer alone, the whole branch as well, half of the sum
    assert width_before(1e-12) == pytest.approx(1 / 8)
    assert width_before(1e12) == pytest.approx(2 / 8)
    assert width_before(1.0) == pytest.approx(1 / 8 + 0.5**2 / 8)


def test_a_residual_flax_block_adds_its_input():
    model = mf.build(mf.Network((6,), (mf.Residual(dense(6)),)), rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, 6))
    inner = model.layers[0].branch(x)
    np.testing.assert_array_equal(model(x), x + inner)


def test_classes_of_as_many_fields_have_structures_of_their_own():
    """Else a program compiled for one could be run for the other."""

    @pytree
    class One:
        a: float
        b: float

    @pytree
    class Other:
        a: float
        b: float

    one, other = map(jax.tree.structure, (One(1.0, 2.0), Other(1.0, 2.0)))
    assert one != other
    assert jax.tree.unflatten(one, [1.0, 2.0]) == One(1.0, 2.0)


def test_all_classes_of_the_package_are_registered_alike():
    sources = Path(mf.__file__).parent.rglob("*.py")
    registered = {p.name for p in sources if re.search(r"@.*register_dataclass", p.read_text())}
    assert registered == set()


def test_no_two_layers_have_the_same_structure():
    """Else a program compiled for one could be run for the other."""
    structures = {}
    for name, cls in LAYERS.items():
        inner = cls(*{"Dense": (3,), "Conv": (3,), "Activation": ("relu",)}.get(name, ()))
        structures[name] = jax.tree.structure(inner)
    for one, a in structures.items():
        for other, b in structures.items():
            assert (a == b) == (one == other), (one, other)
