"""ProxyNorm: its statistics, its rule against integrals, its module, theory against networks."""

import dataclasses
import functools
import math

import draws
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from flax import nnx
from oracles import SMOOTH
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.kernel.kernel import iid_inputs
from meanfield_jax.layers.proxy_norm import proxy_normalize, proxy_statistics
from meanfield_jax.variants import with_gamma, with_norms, without_norms

RELU_MEAN, RELU_VAR = 1 / math.sqrt(2 * math.pi), 0.5 - 1 / (2 * math.pi)
GAMMA, BETA = 1.3, 0.2


# ---- the proxy


def test_quantiles_of_a_rectified_gaussian(x64):
    mean, var = proxy_statistics(jax.nn.relu, jnp.float64(2.0), jnp.float64(0.0))
    # exact up to the tails that no quantile reaches, as the docstring says
    assert mean / (2 * RELU_MEAN) - 1 == pytest.approx(-0.00094, abs=1e-5)
    assert var / (4 * RELU_VAR) - 1 == pytest.approx(-0.00648, abs=1e-5)


def test_the_identity_keeps_the_proxys_mean_and_deviation(x64):
    mean, var = proxy_statistics(
        lambda x: x, jnp.array([2.0, -1.0]), jnp.array([0.3, 0.0]), 0.4, jnp.array([0.0, 0.5])
    )
    assert_close(mean, [2 * 0.4 + 0.3, -0.4], "rounding", 1.0)
    assert_close(var / np.array([4, 2.25]), [0.99498] * 2, "printed", printed="0.99498")


def test_a_gaussian_input_comes_out_with_mean_0_and_variance_1(x64):
    points = np.random.default_rng(0).normal(size=(200_000, 2))
    scale, bias = jnp.array([1.3, 0.5]), jnp.array([0.2, -0.4])
    y = jnp.asarray(points * np.asarray(scale) + np.asarray(bias))
    out = proxy_normalize(y, jnp.tanh, scale, bias, jnp.zeros(2), jnp.zeros(2), 0.0)
    error = 1 / math.sqrt(len(points))
    # the quantiles' variance is half a percent low
    assert_close(out.mean(0), [0, 0], "monte_carlo", 0.0, standard_error=error)
    assert np.abs(out.var(0) - 1).max() < 4 * math.sqrt(2) * error + 0.007


# ---- the rule


def after(norm: mf.ProxyNorm, correlation: float, upstream: float = 0.0):
    """The kernel after ProxyNorm of two samples, with this tangent before it."""
    start = iid_inputs((), 1, None, "batch", False, jnp.dtype("float64"))
    start = start.replace(
        covariance=start.covariance.replaced(jnp.float64(1.0), jnp.float64(correlation)),
        tangent=start.tangent.full(upstream),
    )
    return norm.propagate(start)[0]


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("activation", ["erf", "gelu"])
def test_moments_and_parameters_are_integrals_over_both_values(trainable, activation, x64):
    norm = mf.ProxyNorm(
        mf.LayerNorm(GAMMA, BETA, eps=0.0, trainable=trainable[0]),
        mf.Activation(activation),
        trainable=trainable[1],
    )
    kernel = after(norm, correlation := 0.6)

    # Gauss-Hermite over (y_a, y_b), functions and derivatives of the module itself
    node, weight = np.polynomial.hermite_e.hermegauss(80)
    weight = weight / weight.sum()
    phi = norm.activation.nonlinearity.function

    def output(parameters, y):
        gamma, beta, *tildes = parameters
        return proxy_normalize(gamma * y + beta, phi, gamma, beta, *tildes, norm.eps)

    def values(y):
        parameters = jnp.array([GAMMA, BETA, 0.0, 0.0])
        kept = jnp.array([trainable[0]] * 2 + [trainable[1]] * 2)
        slopes = jax.vmap(lambda point: jax.grad(output)(parameters, point))(y.ravel())
        return output(parameters, y), (slopes * kept[None]).reshape(*y.shape, 4)

    for entry, c in (("same", 1.0), ("other", correlation)):
        y_a = node[:, None] * np.ones(80)
        y_b = jnp.asarray(c * y_a + math.sqrt(1 - c**2) * node)
        y_a = jnp.asarray(y_a)
        out_a, slope_a = values(y_a)
        out_b, slope_b = values(y_b)
        both = weight[:, None] * weight
        expected = np.sum(both * out_a * out_b)
        assert_close(getattr(kernel.covariance, entry), expected, "quadrature", 1.0)
        expected = np.sum(both[..., None] * slope_a * slope_b)
        # by Mehler's series
        assert_close(getattr(kernel.tangent, entry), expected, "quadrature_edge", 1.0)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.5, 0.99])
def test_after_a_rectifier_the_constant_is_gone(correlation, x64):
    kernel = after(mf.ProxyNorm(mf.LayerNorm(eps=0.0)), correlation)
    mean, var = proxy_statistics(jax.nn.relu, jnp.float64(1.0), jnp.float64(0.0))
    angle = math.pi / 2 + math.asin(correlation)
    both = (math.sqrt(1 - correlation**2) + correlation * angle) / (2 * math.pi)
    expected = (both - 2 * RELU_MEAN * mean + mean**2) / (var + 0.03)
    assert_close(kernel.covariance.other, expected, "quadrature", 1.0)
    if correlation == 0:
        # what is left is the error of the quantiles' mean, squared
        assert 0 < kernel.covariance.other < 5e-7


def test_gradients_grow_as_after_batch_norm(x64):
    """E[phi'^2] / Var(phi) = pi / (pi - 1) a layer for ReLU: the price is the same."""
    norm = mf.ProxyNorm(mf.LayerNorm(eps=0.0, trainable=False), trainable=False)
    kernel = after(norm, 0.0, upstream=1.0)
    # the quantiles' mean is a little off, the variance around it too
    growth = float(kernel.tangent.same / kernel.covariance.same)
    assert growth == pytest.approx(math.pi / (math.pi - 1), rel=1e-6)


@pytest.mark.slow
def test_the_same_rule_on_a_batch_and_on_exchangeable_samples(x64):
    # samples whose second moments are those of i.i.d. inputs: orthogonal, of length 1
    x = math.sqrt(6) * jnp.eye(6)
    network = mf.mlp(
        [50] * 2,
        inputs=6,
        outputs=3,
        norm=mf.ProxyNorm(mf.LayerNorm(GAMMA, BETA)),
        activation="erf",
    )
    on_data, iid = mf.analyze(network, data=x), mf.analyze(network, num_samples=6)
    for name in ("tangent_same", "tangent_other", "trace"):
        # Mehler's series against quadrature
        assert_close(getattr(on_data.fisher, name), getattr(iid.fisher, name), "difference")


@pytest.mark.parametrize("norm", [mf.ProxyNorm(), mf.ProxyNorm(mf.LayerNorm(trainable=False))])
def test_the_layers_shares_sum_up_to_the_outlier(norm, x64):
    fisher = mf.analyze(mf.mlp([50] * 2, inputs=6, outputs=3, norm=norm)).fisher
    shares = fisher.contributions
    total = sum(getattr(shares, kind).sum() for kind in ("weights", "biases", "norm"))
    assert_close(total, fisher.tangent_other, "rounding", float(fisher.tangent_same))
    assert "layers/1" in shares.layers
    assert ("layers/1/norm" in shares.layers) == norm.norm.trainable


def test_without_parameters_nothing_is_added():
    fixed = mf.ProxyNorm(mf.LayerNorm(trainable=False), trainable=False)
    network = mf.mlp([50], inputs=6, outputs=3, norm=fixed)
    assert mf.analyze(network).fisher.contributions.layers == ("layers/0", "layers/2")
    assert network.num_parameters == 6 * 50 + 50 + 50 * 3 + 3


# ---- the specification


def test_it_goes_where_a_norm_goes():
    norm = mf.ProxyNorm(mf.LayerNorm(0.7))
    inside = mf.ProxyNorm(mf.LayerNorm(0.7), mf.Activation("tanh"))
    network = mf.mlp([50], inputs=6, outputs=3, norm=norm, activation="tanh")
    assert network.layers[1] == inside
    resnet = mf.preact_resnet([4], inputs=(4, 4, 3), norm=norm, activation="tanh")
    assert resnet.layers[1].branch.layers[0] == inside
    assert mf.Network.from_json(network.to_json()) == network


def test_changes_reach_the_norm_inside():
    network = mf.mlp([50], inputs=6, outputs=3, norm=mf.ProxyNorm())
    assert with_gamma(network, 0.3).layers[1].norm.gamma == 0.3
    assert not with_norms(network, trainable=False).layers[1].norm.trainable
    assert without_norms(network) == mf.mlp([50], inputs=6, outputs=3)


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (lambda: mf.ProxyNorm(eps=-1.0), ("layers/1/ProxyNorm.eps=-1.0", "not negative")),
        (lambda: mf.ProxyNorm(mf.LayerNorm(math.nan)), ("layers/1/norm/LayerNorm.gamma=nan",)),
        (
            lambda: mf.ProxyNorm(mf.BatchNorm()),
            ("layers/1/ProxyNorm.norm='BatchNorm'", "GroupNorm"),
        ),
        (lambda: mf.ProxyNorm(mf.Dense(3)), ("layers/1/ProxyNorm.norm='Dense'", "LayerNorm")),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(build, parts):
    with pytest.raises(mf.SpecError) as info:
        mf.mlp([50], inputs=6, outputs=3, norm=build()).validate()
    assert "\n" not in str(info.value)
    for part in parts:
        assert part in str(info.value)


def test_a_norm_without_scale_is_refused():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Unscaled(mf.LayerNorm):
        def build(self, shape, rngs):
            return nnx.LayerNorm(shape[-1], use_scale=False, use_bias=False, rngs=rngs)

    network = mf.mlp([50], inputs=6, outputs=3, norm=mf.ProxyNorm(Unscaled()))
    with pytest.raises(
        mf.SpecError, match=r"ProxyNorm.norm='LayerNorm': its module has no scale; use LayerN"
    ):
        mf.build(network, rngs=nnx.Rngs(0))


# ---- the module


def module(dtype=jnp.float32) -> nnx.Module:
    """One on 16 channels, with random parameters, as a function of its input."""
    built = mf.ProxyNorm(activation=mf.Activation("gelu")).build((16,), nnx.Rngs(0))
    graphdef, params = nnx.split(built)
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf + 0.3 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, moved))


def test_the_module_against_numpy():
    built = module()
    x = np.random.default_rng(0).normal(2.0, 3.0, (5, 16))
    scale, bias, beta, gamma = (
        np.asarray(value[...], np.float64)
        for value in (built.norm.scale, built.norm.bias, built.beta_tilde, built.gamma_tilde)
    )
    phi = SMOOTH["gelu"][0]
    y = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    points = scipy.stats.norm.ppf((np.arange(256)[:, None] + 0.5) / 256)
    proxy = phi(scale * (beta + (1 + gamma) * points) + bias)
    expected = (phi(scale * y + bias) - proxy.mean(0)) / np.sqrt(proxy.var(0) + 0.03)
    assert_close(built(jnp.asarray(x, jnp.float32)), expected, "rounding", 3.0, dtype=np.float32)


def test_half_precision_keeps_its_dtype_and_float32_statistics():
    built = module()
    x = jax.random.normal(jax.random.key(0), (6, 16)).astype(jnp.bfloat16)
    out = built(x)
    assert out.dtype == jnp.bfloat16
    # the norm's output and the own one are rounded to 8 bits
    error = np.abs(np.asarray(out, np.float32) - np.asarray(built(x.astype(jnp.float32))))
    assert error.max() < 3 * 2.0**-8 * np.abs(np.asarray(out, np.float32)).max()


@pytest.mark.parametrize("training", [True, False])
def test_a_samples_output_does_not_depend_on_its_batch(training):
    network = mf.mlp([32] * 3, inputs=6, outputs=3, norm=mf.ProxyNorm())
    model = mf.build(network, rngs=nnx.Rngs(0))
    model.train() if training else model.eval()
    sample, mates, others = jax.random.normal(jax.random.key(0), (3, 8, 6))
    one = model(jnp.concatenate([sample[:1], mates]))
    two = model(jnp.concatenate([sample[:1], 100 * others]))
    np.testing.assert_array_equal(one[0], two[0])


def test_decay_can_be_for_the_tildes_alone():
    model = mf.build(mf.mlp([8], inputs=6, outputs=3, norm=mf.ProxyNorm()), rngs=nnx.Rngs(0))
    params = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))

    def tildes(params):
        names = jax.tree_util.keystr
        return jax.tree.map_with_path(lambda path, _: "tilde" in names(path), params)

    rule = optax.add_decayed_weights(0.5, mask=tildes)
    updates, _ = rule.update(jax.tree.map(jnp.zeros_like, params), rule.init(params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        expected = 0.5 if "tilde" in jax.tree_util.keystr(path) else 0.0
        np.testing.assert_array_equal(leaf, expected)


# ---- theory meets network


@functools.partial(jax.jit, static_argnums=(1, 2))
def second_moments(key, network: mf.Network, num_samples: int):
    """Before the last layer of a draw: of one input, and of two, averaged over units."""
    model = mf.build(network, rngs=nnx.Rngs(key))
    x = jax.random.normal(jax.random.fold_in(key, 1), (num_samples, *network.input_shape))
    for inner in model.layers[:-1]:
        x = inner(x)
    products = x @ x.T / x.shape[-1]
    same = jnp.trace(products) / num_samples
    return jnp.stack(
        [same, (products.sum() - same * num_samples) / num_samples / (num_samples - 1)]
    )


def vectors(width: int, beta: float) -> mf.Network:
    norm = mf.ProxyNorm(mf.LayerNorm(GAMMA, beta))
    return mf.mlp([width] * 4, inputs=width, outputs=1, norm=norm)


def maps(width: int, beta: float) -> mf.Network:
    norm = mf.ProxyNorm(mf.GroupNorm(GAMMA, beta, num_groups=4))
    return mf.cnn([width] * 2, inputs=(6, 6, width), outputs=1, norm=norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "width", "beta"),
    [
        (vectors, 128, 0.0),
        (vectors, 128, 0.4),
        (maps, 32, 0.0),
    ],
)
def test_moments_are_those_of_random_networks(build, width, beta):
    network = build(width, beta)
    keys = jax.random.split(jax.random.key(0, impl="unsafe_rbg"), 64)
    found = jax.vmap(lambda key: second_moments(key, network, 16))(keys)
    order = mf.analyze(network).order_parameters
    expected = [order.q_hat[-1], order.q_hat_xy[-1]]
    draws.assert_mean(found, expected, width, scale=float(order.q_hat[-1]))
