"""LayerNorm, GroupNorm, InstanceNorm: identities, Flax, and networks against their theory."""

import dataclasses
import math

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from flax import nnx
from networks import conv, correlated, dense
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.kernel.kernel import batch_inputs, iid_inputs
from meanfield_jax.theory import memory_plan
from meanfield_jax.theory.compiled import without_widths

RELU = mf.Activation("relu")
GAMMA = 1.3
MAP = (4, 4, 6)
MISSING = ("instance", 1)
"""No norm of vectors."""

NORMS = {
    "layer": mf.LayerNorm(GAMMA, 0.2),
    "group": mf.GroupNorm(GAMMA, 0.2, num_groups=2),
    "instance": mf.InstanceNorm(GAMMA, 0.2),
}


def plain(name: str) -> mf.Layer:
    return dataclasses.replace(NORMS[name], beta=0.0)


# ---- identities of the theory


def test_a_layer_norm_sets_every_second_moment_to_gamma_squared(x64):
    norm = mf.LayerNorm(GAMMA, eps=0.0)
    order = mf.analyze(dense(norm, "identity", 50)).order_parameters
    assert_close(order.q_hat[1:], GAMMA**2, "rounding")
    kernel = mf.analyze(
        mf.Network((20,), (mf.Dense(50), norm, mf.Dense(3, 1.0, 0.0))), data=correlated(9, 20)
    ).kernel
    assert_close(kernel.covariance.diagonal(), GAMMA**2, "rounding")


@pytest.mark.parametrize("data", [False, True])
def test_the_scale_of_the_weights_in_front_does_not_matter(data, x64):
    def theory(weight_var):
        norm = mf.LayerNorm(GAMMA, 0.1, eps=0.0, trainable=False)
        layers = (mf.Dense(50, weight_var, 0.0), norm, RELU, mf.Dense(3))
        network = mf.Network((20,), layers)
        return mf.analyze(network, data=correlated(9, 20) if data else None)

    one, other = theory(1.0), theory(9.0)
    moments = zip(*(jax.tree.leaves(t.kernel.moment) for t in (one, other)), strict=True)
    for a, b in moments:
        assert_close(a, b, "rounding", 10.0)
    if not data:
        # the gradient with respect to the weights in front is that much shorter
        weights = one.fisher.contributions.weights[0], 9 * other.fisher.contributions.weights[0]
        assert_close(*weights, "rounding", float(one.fisher.outlier))


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
def test_statistics_and_the_number_of_samples_do_not_matter(name, x64):
    network = mf.cnn([6], inputs=(3, 2, 2), stride=1, head="mean", norm=plain(name))
    theories = [
        mf.analyze(network, statistics=statistics, num_samples=n)
        for statistics, n in (("batch", None), ("frozen", 7))
    ]
    for theory in theories:
        for name in ("tangent_same", "tangent_other"):
            expected = getattr(theories[0].fisher, name)
            assert_close(getattr(theory.fisher, name), expected, "rounding")


def test_orthogonal_inputs_are_the_ensemble(x64):
    n = 12
    network = mf.mlp([300, 400], inputs=n, outputs=3, norm=mf.LayerNorm(1.4))
    real = draws.kernel(network, np.sqrt(n) * np.eye(n))
    ideal = mf.analyze(network).kernel
    for name in ("covariance", "tangent"):
        matrix, pair = getattr(real, name), getattr(ideal, name)
        expected = np.where(np.eye(n, dtype=bool), pair.same, pair.other)
        assert_close(matrix.entries, expected, "quadrature_edge", float(pair.same))


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMS)
def test_orthogonal_images_are_the_ensemble(name, x64):
    n, shape = 3, (3, 2)
    size = n * math.prod(shape)
    x = np.sqrt(size) * np.eye(size).reshape(n, *shape, size)
    inner = (mf.Conv(40), plain(name), RELU)
    network = mf.Network(x.shape[1:], (*inner, mf.GlobalMeanPool(), mf.Dense(3)))
    real, ideal = draws.kernel(network, x), mf.analyze(network).kernel
    for field in ("covariance", "tangent"):
        matrix, pair = getattr(real, field), getattr(ideal, field)
        expected = np.where(np.eye(n, dtype=bool), pair.same, pair.other)
        assert_close(matrix.entries, expected, "rounding", 100 * float(pair.same))


def kernel_after(norm: mf.Layer, x: np.ndarray | None = None):
    """After one Conv and the norm."""
    network = mf.Network((4, 4, 20), (mf.Conv(20),))
    if x is None:
        start = iid_inputs((4, 4), 20, None, "batch", True, jnp.dtype("float64"))
    else:
        start = batch_inputs(jnp.asarray(x), "batch", 1)
    return norm.rule(network.body.propagate(start)[0])[0]


@pytest.mark.parametrize("real", [False, True])
def test_an_instance_norm_leaves_mean_zero_and_variance_gamma_squared(real, x64):
    kernel = kernel_after(
        mf.InstanceNorm(GAMMA, eps=0.0), correlated(5, 4, 4, 20) if real else None
    )
    for mean in jax.tree.leaves(kernel.covariance.position_means()):
        assert_close(mean, 0.0, "rounding", 10.0)
    variances = kernel.covariance.sample_mean(kernel.covariance.diagonal())
    assert_close(variances, GAMMA**2, "rounding", 10.0)
    # a length that does not change passes no gradient on
    tangent = kernel.effective_tangent
    for mean in tangent.position_means()[:2]:
        for entry in jax.tree.leaves(mean):
            size = np.abs(np.asarray(jax.tree.leaves(tangent)[0])).max()
            assert_close(entry, 0.0, "rounding", 10.0 * size)


def test_many_channels_in_a_group_are_a_layer_norm(x64):
    def kernel(norm):
        network = mf.cnn([10**6], inputs=(4, 4, 2), stride=1, outputs=3, norm=norm, head="mean")
        return mf.analyze(network).kernel

    one, other = kernel(mf.GroupNorm(GAMMA, num_groups=1)), kernel(mf.LayerNorm(GAMMA))
    for field in ("covariance", "tangent"):
        a, b = (getattr(kernel, field) for kernel in (one, other))
        for entry in ("same", "other"):
            assert abs(float(getattr(a, entry) / getattr(b, entry)) - 1) < 1e-5


@pytest.mark.slow
def test_groups_of_one_channel_are_an_instance_norm(x64):
    def tangent(norm):
        network = mf.cnn([6], inputs=(4, 4, 2), stride=1, norm=norm)
        return draws.predicted(network, correlated(4, 4, 4, 2))

    one, other = tangent(mf.GroupNorm(GAMMA, num_groups=6)), tangent(mf.InstanceNorm(GAMMA))
    assert_close(one, other, "rounding", 100.0)


@pytest.mark.parametrize(("name", "modulus"), [("layer", 32), ("group", 1), ("instance", 1)])
def test_pairs_of_positions_are_kept_where_they_count(name, modulus, monkeypatch, x64):
    network, x = conv(plain(name), width=6), jnp.asarray(correlated(4, 8, 8, 2))
    known = without_widths(network.body)
    assert memory_plan.modulus_for(*known, x, "batch") == modulus
    # where memory is short an even sample stands for them; half of it is left to all else
    with monkeypatch.context() as patched:
        patched.setenv("MEANFIELD_JAX_MAX_MEMORY", str(35 * 8 * 16**2 * 4**2))
        assert memory_plan.modulus_for(*known, x, "batch") == max(modulus, 4)
        with memory_plan.room(1.0):
            assert memory_plan.modulus_for(*known, x, "batch") == modulus
    monkeypatch.setattr(memory_plan, "MAX_ENTRIES", 16**2 * 4**2 // 2)
    assert memory_plan.modulus_for(*known, x, "batch") == max(modulus, 4)


# ---- deep networks


def relu_map(c):
    """E[relu relu] of unit variances: the arc-cosine kernel of degree 1."""
    return (np.sqrt(1 - c * c) + c * (np.pi - np.arccos(c))) / (2 * np.pi)


@pytest.mark.slow
@pytest.mark.parametrize(("weight_var", "bias_var"), [(2.0, 0.1), (0.5, 0.4)])
def test_fixed_points_are_those_of_the_closed_form(weight_var, bias_var, x64):
    norm = mf.LayerNorm(GAMMA, eps=0.0)
    point = mf.fixed_point(mf.Sequential((mf.Dense(100, weight_var, bias_var), norm, RELU)))
    weights = weight_var * GAMMA**2
    q = bias_var + weights / 2
    assert_close(point.q, q, "rounding")
    assert_close(point.chi_q, 0.0, "rounding", 1.0)
    assert_close(point.chi_1, weights / (2 * q), "rounding")
    assert_close(point.growth, weights / (2 * q), "rounding")

    # with biases equal inputs attract: c* = 1
    gap = scipy.optimize.brentq(
        lambda c: (bias_var + weights * relu_map(c)) / q - c, 0, 1.0, xtol=1e-13
    )
    assert_close(point.c, gap, "quadrature")
    grid = mf.phase_diagram(
        mf.Sequential((mf.Dense(100), norm, RELU)),
        weight_var=np.array([weight_var, 2 * weight_var]),
        bias_var=np.array([bias_var]),
    )
    assert_close(grid.q.values[:, 0], [q, bias_var + weights], "rounding")


# ---- the Flax module


def values(shape, num_samples: int = 5) -> jax.Array:
    return jnp.asarray(3 * np.random.default_rng(0).normal(size=(num_samples, *shape)) + 2)


@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in NORMS for shape in ((12,), MAP) if (name, len(shape)) != MISSING],
)
def test_the_module_is_the_formula(name, shape, x64):
    x = np.asarray(values(shape))
    # a group's values in the last axis
    groups = {"layer": 1, "group": 2, "instance": shape[-1]}[name]
    split = np.moveaxis(x.reshape(5, -1, groups, shape[-1] // groups), 1, 2).reshape(5, groups, -1)
    standard = (split - split.mean(-1, keepdims=True)) / np.sqrt(
        split.var(-1, keepdims=True) + 1e-5
    )
    standard = standard.reshape(5, groups, -1, shape[-1] // groups)
    expected = GAMMA * np.moveaxis(standard, 1, 2).reshape(x.shape) + 0.2
    module = NORMS[name].build(shape, nnx.Rngs(0))
    # parameters are float32
    assert_close(module(jnp.asarray(x)), expected, "rounding", 10.0, dtype=np.float32)


def test_modules_agree_where_groups_do():
    x = values(MAP).astype(jnp.float32)

    def outputs(spec):
        return spec.build(MAP, nnx.Rngs(0))(x)

    for spec, groups in ((mf.LayerNorm(), 1), (mf.InstanceNorm(), 6)):
        expected = outputs(mf.GroupNorm(num_groups=groups))
        assert_close(outputs(spec), expected, "rounding", dtype=np.float32, scale=1.0)


@pytest.mark.parametrize("name", NORMS)
def test_the_module_is_that_of_flax(name):
    options = dict(epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    flax = {
        "layer": lambda: nnx.LayerNorm(6, reduction_axes=(1, 2, 3), **options),
        "group": lambda: nnx.GroupNorm(6, 2, **options),
        "instance": lambda: nnx.InstanceNorm(6, **options),
    }[name]()
    flax.scale[...], flax.bias[...] = jnp.full(6, GAMMA), jnp.full(6, 0.2)
    x = values(MAP).astype(jnp.float32)
    own = NORMS[name].build(MAP, nnx.Rngs(0))(x)
    assert_close(own, flax(x), "rounding", 1.0, dtype=np.float32)


def test_maps_constant_over_positions_become_the_offset():
    x = jnp.broadcast_to(values((1, 1, 6)), (5, *MAP))
    y = NORMS["instance"].build(MAP, nnx.Rngs(0))(x)
    assert_close(y, 0.2, "rounding", 1e3, dtype=np.float32)


@pytest.mark.parametrize("name", NORMS)
def test_samples_do_not_meet_in_the_module(name):
    module = NORMS[name].build(MAP, nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (5, *MAP))
    alone = jnp.concatenate([module(x[i : i + 1]) for i in range(5)])
    np.testing.assert_array_equal(module(x), alone)
    module.eval()
    np.testing.assert_array_equal(module(x), alone)


@pytest.mark.parametrize("name", NORMS)
def test_half_precision_has_single_precision_statistics(name):
    module = NORMS[name].build(MAP, nnx.Rngs(0))
    # sums over 96 numbers near 100 would lose their fluctuations
    x = (100 + jax.random.normal(jax.random.key(0), (5, *MAP))).astype(jnp.bfloat16)
    y = module(x)
    assert y.dtype == jnp.bfloat16
    expected = module(x.astype(jnp.float32))
    eps = float(jnp.finfo(jnp.bfloat16).eps)
    assert np.abs(np.asarray(y, float) - expected).max() <= eps * np.abs(expected).max()


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("trainable", [True, False])
def test_scale_and_offset_learn_or_not(name, trainable):
    spec = dataclasses.replace(NORMS[name], trainable=trainable)
    module = spec.build(MAP, nnx.Rngs(0))
    parameters = jax.tree.leaves(nnx.state(module, nnx.Param))
    assert sum(leaf.size for leaf in parameters) == spec.num_parameters(MAP)
    assert bool(parameters) == trainable
    np.testing.assert_array_equal(module.scale[...], np.float32(GAMMA))
    np.testing.assert_array_equal(module.bias[...], np.float32(0.2))


class Own(nnx.Module):
    """A user's own network around one of these norms."""

    def __init__(self, norm: mf.Layer, rngs: nnx.Rngs):
        self.first = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = norm.build((4, 4, 6), rngs)
        self.head = nnx.Linear(96, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.first(x))).reshape(len(x), -1))


@pytest.mark.parametrize("name", NORMS)
def test_in_a_users_own_model(name):
    model = Own(NORMS[name], nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (6, 4, 4, 3))
    op = mf.fisher_operator(model, x, batch_size=2)
    assert mf.top_eigenvalues(op, k=1).raise_if_failed().eigenvalues[0] > 0
    assert {path for path in op.paths if path.startswith("norm")} == {"norm/scale", "norm/bias"}


# ---- what is refused


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: mf.Network((8,), (mf.LayerNorm(), mf.Dense(3))),
            ("layers/0/LayerNorm=(8,)", "random weights", "after a Dense or Conv"),
        ),
        (
            lambda: mf.Network((8,), (mf.Dense(4), RELU, mf.LayerNorm(), mf.Dense(3))),
            ("layers/2/LayerNorm=(4,)",),
        ),
        (
            lambda: mf.mlp([60], inputs=8, outputs=3, norm=mf.GroupNorm()),
            ("layers/1/GroupNorm.num_groups=32", "does not divide 60", "use 1, 2"),
        ),
        (
            lambda: mf.mlp([64], inputs=8, outputs=3, norm=mf.GroupNorm()),
            ("layers/1/GroupNorm.num_groups=32", "2 values has no expectation", "fewer groups"),
        ),
        (lambda: mf.GroupNorm(num_groups=0), ("GroupNorm.num_groups=0", "must be an integer")),
        (
            lambda: mf.mlp([60], inputs=8, outputs=3, norm=mf.InstanceNorm()),
            ("layers/1/InstanceNorm=(60,)", "(height, width, channels)", "LayerNorm"),
        ),
        (
            lambda: mf.cnn([6, 6], inputs=(4, 4, 3), norm=mf.InstanceNorm()),
            ("layers/4/InstanceNorm=(1, 1, 6)", "no expectation", "larger maps"),
        ),
    ],
)
def test_what_the_theory_does_not_cover_is_refused(build, words):
    with pytest.raises(mf.SpecError) as caught:
        build()
    assert all(word in str(caught.value) for word in words)


# ---- networks


@pytest.mark.slow
def test_the_derivative_of_the_deviation_vanishes_with_the_width():
    errors = []
    for width in (8, 64):
        network = mf.mlp([width], inputs=width, outputs=4, norm=mf.LayerNorm(GAMMA))
        values = draws.summaries(draws.tangents(network, 16, 512))
        fisher = mf.analyze(network).fisher
        expected = np.array([fisher.tangent_same, fisher.tangent_other])
        errors.append(np.abs(values.mean(0) / expected - 1))
        assert (errors[-1] < 1.5 / width + 4 * standard_error(values) / expected).all()
    assert errors[0].max() > 0.05


def test_small_groups_are_outside_the_domain():
    def few(norm, side):
        network = mf.Network((side, side, 8), (mf.Conv(16), norm, RELU, mf.Flatten(), mf.Dense(2)))
        return mf.analyze(network, num_samples=50).fisher

    # three of four numbers that sum to 0 are free: 3 / (3 - 2)
    assert_close(few(mf.InstanceNorm(), 2).variance_fluctuation, 3.0, "rounding", dtype=np.float32)
    assert not few(mf.InstanceNorm(), 2).within_domain
    assert "vary in more directions" in few(mf.InstanceNorm(), 2).domain_reason()
    assert few(mf.GroupNorm(num_groups=1), 4).variance_fluctuation < 1.1
    assert few(mf.BatchNorm(), 4).variance_fluctuation == 1
