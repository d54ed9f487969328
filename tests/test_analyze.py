"""The pass over a network: backward parameters, positions, batches, depth, transformations."""

import functools
import math
import time

import draws
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import xarray as xr
from flax import nnx
from networks import CNN_NORM, SMALL
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.kernel.kernel import STATISTICS, iid_inputs
from meanfield_jax.theory.compiled import known_numbers, without_widths
from meanfield_jax.theory.passes import _iid
from meanfield_jax.variants import with_gamma

RELU = mf.Activation("relu")
EXACT = dict(eps=0.0, trainable=False)


@pytest.fixture(autouse=True)
def _exact(x64):
    """The theory is checked in float64."""


def run(network: mf.Network, statistics="batch", num_samples=None, all_positions=False):
    """The kernel after the last layer."""
    *positions, channels = network.input_shape
    start = iid_inputs(
        tuple(positions), channels, num_samples, statistics, all_positions, jnp.dtype("float64")
    )
    return jax.device_get(propagated(known_numbers(network), start))


@jax.jit
def propagated(network, start):
    return network.body.propagate(start)[0]


NETWORKS = {
    "vanilla": SMALL,
    "norm": mf.mlp([30, 20], inputs=8, outputs=3, norm=mf.BatchNorm(1.3, 0.2), activation="erf"),
    "cnn": with_gamma(CNN_NORM, 1.3),
    "pooled": mf.cnn([4], inputs=(6, 6, 3), head="mean", norm=mf.BatchNorm(axes="position")),
    "repeat": mf.Network(
        (8,),
        (
            mf.Dense(16),
            mf.Repeat(mf.Sequential((mf.BatchNorm(1.3), RELU, mf.Dense(16))), times=4),
            mf.Residual(mf.Sequential((RELU, mf.Dense(16)))),
            mf.Dense(3),
        ),
    ),
}


# ---- backward order parameters and shares


def backward(network_widths, weight_var, bias_var, gamma) -> tuple[list[float], list[float]]:
    """The published recursion with s^2 in the place of q: that of frozen statistics."""
    recursion = published.fully_connected(network_widths, weight_var, bias_var, gamma)
    depth = len(recursion.q)
    same, other = [1.0] * depth, [1.0] * depth
    for layer in reversed(range(depth - 1)):
        s2 = recursion.q[layer] - recursion.q_xy[layer]
        same[layer] = gamma**2 * weight_var / 2 / s2 * same[layer + 1]
        other[layer] = gamma**2 * weight_var / 4 / s2 * other[layer + 1]
    return same, other


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_backward_parameters_of_frozen_statistics_follow_the_recursion(gamma):
    widths = [60, 300, 50, 200, 7]
    network = mf.mlp(widths[1:-1], inputs=60, outputs=7, norm=mf.BatchNorm(gamma, **EXACT))
    order = mf.analyze(network, statistics="frozen").order_parameters
    same, other = backward(widths, 2.0, 0.5, gamma)
    assert_close(order.q_tilde, same, "rounding", max(same))
    assert_close(order.q_tilde_xy, other, "rounding", max(other))


def test_backward_parameters_of_a_vanilla_network_follow_the_published_recursion():
    order = mf.analyze(NETWORKS["vanilla"]).order_parameters
    recursion = published.fully_connected([8, 30, 20, 3], 2.0, 0.5, None)
    assert_close(order.q_tilde, recursion.q_tilde, "rounding", 1.0)
    assert_close(order.q_tilde_xy, recursion.q_tilde_xy, "rounding", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "statistics", "num_samples"),
    [
        ("norm", "batch", None),
        # a number and no None is one program
        *(("norm", statistics, n) for statistics in STATISTICS for n in (16, 10**9)),
        *((name, "batch", 16) for name in NETWORKS if name != "norm"),
    ],
)
def test_shares_add_up_to_the_outlier(name, statistics, num_samples):
    network = NETWORKS[name]
    fisher = mf.analyze(network, statistics=statistics, num_samples=num_samples).fisher
    shares = fisher.contributions
    total = shares.weights.sum() + shares.biases.sum() + shares.norm.sum()
    assert_close(total, fisher.outlier, "rounding", np.abs(fisher.tangent_same))
    assert len(shares.layers) == shares.weights.size == shares.norm.size


def test_shares_name_the_layers_with_parameters():
    theory = mf.analyze(NETWORKS["repeat"])
    blocks = [f"layers/1/block[{time}]/layers" for time in range(4)]
    inner = [f"{block}/{index}" for block in blocks for index in (0, 2)]
    last = ["layers/2/branch/layers/1", "layers/3"]
    assert list(theory.fisher.contributions.layers) == ["layers/0", *inner, *last]
    assert list(theory.order_parameters.layers) == ["layers/0", *inner[1::2], *last]


def test_a_constant_scale_has_no_share():
    network = mf.mlp([30], inputs=8, outputs=3, norm=mf.BatchNorm(trainable=False))
    shares = mf.analyze(network).fisher.contributions
    assert shares.layers == ("layers/0", "layers/3")
    assert np.all(shares.norm == 0)


# ---- positions


def circular(**options) -> mf.Network:
    return mf.cnn([4, 6], inputs=(8, 6, 3), padding="CIRCULAR", stride=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "network",
    [
        circular(),
        circular(norm=mf.BatchNorm(1.3)),
        circular(norm=mf.BatchNorm(1.3, axes="position")),
        mf.cnn([4, 6], inputs=(6, 5, 3), padding="VALID", kernel_size=2, stride=1),
        mf.cnn([4, 6], inputs=(6, 5, 3), norm=mf.BatchNorm(1.3, axes="position")),
    ],
    ids=["plain", "channel", "position", "valid", "zero_padding"],
)
def test_keeping_all_pairs_of_positions_changes_nothing_before_a_flatten_head(network):
    equal, all_pairs = (run(network, all_positions=keep) for keep in (False, True))
    for field in ("covariance", "tangent"):
        for entry in ("same", "other"):
            a, b = (getattr(getattr(kernel, field), entry) for kernel in (all_pairs, equal))
            assert_close(a, b, "rounding")


def test_pairs_of_positions_matter_before_a_mean():
    network = mf.cnn([4], inputs=(6, 6, 3), head="mean")
    equal, all_pairs = (run(network, all_positions=keep) for keep in (False, True))
    assert abs(all_pairs.tangent.same / equal.tangent.same - 1) > 0.1
    assert_close(mf.analyze(network).fisher.tangent_same, all_pairs.tangent.same, "rounding")


def test_distinct_positions_of_an_input_are_uncorrelated():
    kernel = iid_inputs((3, 2), 5, None, "batch", True, jnp.dtype("float64"))
    np.testing.assert_array_equal(kernel.covariance.same.reshape(6, 6), np.eye(6))
    assert not kernel.covariance.other.any()
    assert kernel.positions == (3, 2)


# ---- finite batches


@pytest.mark.parametrize("num_samples", [2, 7, 1000])
@pytest.mark.parametrize("axes", ["channel", "position"])
@pytest.mark.parametrize("shape", [(5,), (3, 4, 2)], ids=["vector", "map"])
def test_rows_of_the_matrices_after_a_batch_norm_sum_to_zero(shape, axes, num_samples):
    linear = mf.Dense(6) if len(shape) == 1 else mf.Conv(6)
    network = mf.Network(shape, (linear, mf.BatchNorm(1.3, axes=axes, **EXACT)))
    kernel = run(network, num_samples=num_samples, all_positions=len(shape) == 3)
    for matrix in (kernel.covariance, kernel.tangent):
        rows = matrix.same + (num_samples - 1) * matrix.other
        if len(shape) == 3 and axes == "channel":
            rows = rows.mean((0, 1))
        assert_close(rows, np.zeros(rows.shape), "rounding", np.abs(matrix.same).max())
    own = np.asarray(kernel.covariance.same)
    if len(shape) == 3:
        own = own.reshape(12, 12).diagonal()
    # the mean over a batch (and positions) of the normalized values' squares is gamma^2
    assert_close(own.mean() if axes == "channel" else own, 1.69, "rounding")


def test_one_sample_is_its_own_spectrum():
    fisher = mf.analyze(NETWORKS["vanilla"], num_samples=1).fisher
    assert_close(fisher.outlier, float(fisher.tangent_same), "rounding")


# ---- transformations


def of_gamma(gamma):
    norm = mf.BatchNorm(gamma, **EXACT)
    return mf.mlp([1000] * 2, inputs=784, outputs=10, norm=norm)


def test_analyze_under_jit_gives_the_same():
    analyze = jax.jit(mf.analyze, compiler_options=draws.UNFUSED)
    theory, jitted = mf.analyze(of_gamma(0.7)), analyze(of_gamma(0.7))
    assert jitted.network.num_parameters == theory.network.num_parameters
    for one, other in zip(jax.tree.leaves(jitted), jax.tree.leaves(theory), strict=True):
        assert_close(one, other, "rounding", np.abs(np.asarray(other)).max() + 1)


@functools.cache
def rates_over_gamma():
    """Values and slopes of eta_max over gamma, by one program: (gammas, rates, slopes)."""

    def eta(gamma):
        return mf.analyze(of_gamma(gamma)).eta_max(momentum=0.9)

    gammas = np.array([0.0, 1e-3, *np.linspace(0.1, 3.0, 30)])
    grid = jax.jit(jax.vmap(jax.value_and_grad(eta)), compiler_options=draws.UNFUSED)
    return gammas, *jax.device_get(grid(gammas))


def test_a_grid_of_learning_rates_with_derivatives():
    gammas, values, slopes = (column[2:] for column in rates_over_gamma())
    outlier = 1000 * gammas**2 / (2 * math.pi) + 1
    assert_close(values, 3.8 / outlier, "rounding")
    assert_close(slopes, -3.8 / outlier**2 * 1000 * gammas / math.pi, "rounding")


def test_a_vanishing_scale_has_finite_theory_and_derivatives():
    gammas, values, slopes = (column[:2] for column in rates_over_gamma())
    outlier = 1000 * gammas**2 / (2 * math.pi) + 1
    assert_close(values, 3.8 / outlier, "rounding")
    assert_close(slopes, -3.8 / outlier**2 * 1000 * gammas / math.pi, "rounding", 1.0)


def test_a_grid_over_samples():
    def outlier(num_samples):
        return mf.analyze(of_gamma(1.0), num_samples=num_samples).fisher.outlier

    outliers = jax.jit(jax.vmap(outlier), compiler_options=draws.UNFUSED)
    sizes = [10, 100, 1000]
    for size, outlier in zip(sizes, outliers(np.array(sizes)), strict=True):
        expected = mf.analyze(of_gamma(1.0), num_samples=size).fisher.outlier
        assert_close(outlier, expected, "rounding")


# ---- the labelled result


@pytest.mark.parametrize("name", ["norm", "repeat"])
def test_to_xarray_survives_a_file(name, tmp_path):
    theory = mf.analyze(NETWORKS[name], num_samples=50)
    data = theory.to_xarray(momentum=0.5)
    path = tmp_path / "theory.nc"
    data.to_netcdf(path)
    with xr.open_dataset(path) as again:
        xr.testing.assert_identical(again.load(), data)
        assert mf.Network.from_json(again.attrs["network"]) == NETWORKS[name]
        assert again.attrs["statistics"] == "batch"
        assert again.attrs["momentum"] == 0.5
    assert_close(data.eta_max, 3.0 / theory.fisher.lambda_max, "rounding")
    assert list(data.layer.values) == list(theory.order_parameters.layers)
    assert list(data.block.values) == list(theory.fisher.contributions.layers)
    assert_close(data.q_xy, theory.order_parameters.q_xy, "rounding")
    shares = (
        data.contribution_weights.sum()
        + data.contribution_biases.sum()
        + data.contribution_norm.sum()
    )
    assert_close(shares, data.outlier, "rounding")


# ---- the domain


def test_the_bulk_by_layer_sums_up_to_the_bulk(x64):
    fisher = mf.analyze(of_gamma(1.3), num_samples=50).fisher
    assert_close(fisher.bulk_contributions.sum(), fisher.bulk, "rounding")
    one = mf.analyze(mf.mlp([50], inputs=5, outputs=2), num_samples=1).fisher
    assert float(one.bulk_high) == 0


def deep(depth, width) -> mf.Network:
    """Blocks of one width, compiled as one."""
    block = mf.Sequential((mf.Dense(width), mf.BatchNorm(), RELU))
    return mf.Network((width,), (mf.Repeat(block, depth), mf.Dense(10)))


@pytest.mark.parametrize(("depth", "width", "limited"), [(2, 1000, True), (12, 100, False)])
def test_deep_narrow_networks_are_said_to_be_outside_the_domain(depth, width, limited):
    fisher = mf.analyze(deep(depth, width), num_samples=100).fisher
    assert bool(fisher.within_domain) == limited
    assert fisher.lambda_max >= max(fisher.outlier_high, fisher.bulk_high) * (1 - 1e-6)


@pytest.mark.slow
def test_the_edge_of_the_bulk_is_a_lower_estimate():
    """Depth 8, width 100: the bulk's mean is five times too low, its edge twice."""
    network = deep(8, 100)
    x = jax.random.normal(jax.random.key(0), (50, 100))
    fisher = mf.analyze(network, num_samples=50).fisher
    for seed in range(2):
        op = mf.fisher_operator(mf.build(network, rngs=nnx.Rngs(seed)), x)
        top = float(mf.top_eigenvalues(op, 1, tol=1e-2).eigenvalues[0])
        assert fisher.bulk_high < top < 3 * fisher.bulk_high


# ---- depth, at the end: it drops the programs that the tests above share


@pytest.mark.slow
@pytest.mark.parametrize("norm", [None, mf.BatchNorm(1.0)], ids=["plain", "batch_norm"])
def test_a_thousand_layers_compile_fast_and_differentiate(norm, record_property, compiles_anew):
    block = (RELU, mf.Dense(100, 2.0, 0.0)) if norm is None else (norm, RELU, mf.Dense(100))

    def deep(weight_var):
        first = mf.Dense(100, weight_var)
        return mf.Network((50,), (first, mf.Repeat(mf.Sequential(block), 1000), mf.Dense(10)))

    start = time.perf_counter()
    body, widths = without_widths(deep(2.0).body)
    options = dict(positions=(), statistics="batch")
    compiled = jax.jit(_iid, static_argnames=tuple(options))
    compiled.lower(body, widths, np.inf, 50.0, **options).compile()
    seconds = time.perf_counter() - start
    record_property("compile_seconds", seconds)
    print(f"1000 layers compiled in {seconds:.1f} s")
    assert seconds < 20  # a tenth of that on a free core

    theory = mf.analyze(deep(2.0))
    assert theory.order_parameters.q.shape == (1002,)
    for leaf in jax.tree.leaves((theory.fisher, theory.order_parameters)):
        assert np.isfinite(leaf).all()
    gradient = jax.grad(lambda w: jnp.log(mf.analyze(deep(w)).fisher.outlier))(2.0)
    assert np.isfinite(gradient)
