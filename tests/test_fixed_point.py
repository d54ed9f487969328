"""Fixed points of blocks, depth scales, phase diagrams, growth with BatchNorm."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
from draws import UNFUSED
from json_results import parsed
from oracles import SMOOTH
from tolerance import assert_close, assert_printed, standard_error, tolerance

import meanfield_jax as mf
from meanfield_jax.cli import main
from meanfield_jax.kernel.gaussian import expectations
from meanfield_jax.kernel.nonlinearities import NONLINEARITIES
from meanfield_jax.kernel.table import tabulated

FUNCTIONS = SMOOTH | dict(relu=(lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0)))
TANH_EDGE = {0.01: 1.42421, 0.05: 1.76095, 0.1: 1.98607, 0.5: 2.84317}
# The variances of every phase diagram here: shapes and widths decide what is compiled, numbers do
# not. The width is that of the command's block.
WEIGHT_VAR, BIAS_VAR = np.arange(1, 21) / 5, np.array([0.0, *TANH_EDGE])
WIDTH, NUM_CELLS = 1, WEIGHT_VAR.size * BIAS_VAR.size


@pytest.fixture(autouse=True)
def _exact(x64):
    """Everything here is float64 unless it says otherwise."""


def block(weight_var, bias_var, activation="tanh", *norm) -> mf.Sequential:
    return mf.Sequential((mf.Dense(WIDTH, weight_var, bias_var), *norm, mf.Activation(activation)))


@functools.cache
def diagram(activation):
    return mf.phase_diagram(block(1.0, 0.0, activation), weight_var=WEIGHT_VAR, bias_var=BIAS_VAR)


def points(weight_var, bias_var, activation) -> mf.FixedPoint:
    """The fixed points of at most NUM_CELLS cells, by one program for each activation."""
    cells = np.stack([np.ravel(weight_var), np.ravel(bias_var)])
    padded = np.pad(cells, ((0, 0), (0, NUM_CELLS - cells.shape[1])), "edge")
    found = jax.device_get(padded_points(*padded, activation))
    return jax.tree.map(lambda value: value[: cells.shape[1]], found)


@functools.partial(jax.jit, static_argnums=2)
def padded_points(weight_var, bias_var, activation) -> mf.FixedPoint:
    def at(cell):
        return mf.fixed_point(block(*cell, activation))

    # one after the other: a batch of them takes twice as long to compile, and gains nothing
    return jax.lax.map(at, (weight_var, bias_var))


MANY, PUBLISHED = (10**4, 10**5), (4, 6, 8, 16, 32, 64, 128, 256)
SIZES = dict(relu=(*PUBLISHED, *MANY), identity=PUBLISHED, tanh=(6, 8, *MANY), erf=MANY)


def batch_growths(activation, gamma=1.0, beta=0.0) -> dict[int, float]:
    """By the size of the batch, by one program for each activation."""
    growths = np.asarray(stacked_growths(activation, gamma, beta))
    return dict(zip(SIZES[activation], growths, strict=True))


# XLA takes half the time for these sums without fusion
@functools.partial(jax.jit, static_argnums=0, compiler_options=UNFUSED)
def stacked_growths(activation, gamma, beta):
    growths = [mf.batch_growth(activation, n, gamma=gamma, beta=beta) for n in SIZES[activation]]
    return jnp.stack(growths)


# forward mode through quadrature and through a closed form, reverse mode through the latter
JACOBIANS = dict(tanh=jax.jacfwd, relu=jax.jacfwd, erf=jax.jacrev)
SLOPES = ("q", "c", "chi_q", "chi_c", "chi_1", "growth")


@functools.partial(jax.jit, static_argnums=2)
def derivatives(weight_var, bias_var, activation):
    """Of the numbers named in SLOPES in both variances, (cells, numbers, 2)."""

    def values(variances):
        point = mf.fixed_point(block(*variances, activation))
        return jnp.stack([getattr(point, name) for name in SLOPES])

    return jax.lax.map(JACOBIANS[activation](values), jnp.stack([weight_var, bias_var], -1))


# ---- oracles


def mean(function, q) -> float:
    """E[function(sqrt(q) z)] by scipy; split at 0, where ReLU bends."""

    def density(z):
        return function(math.sqrt(q) * z) * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)

    parts = [scipy.integrate.quad(density, *ends, epsabs=1e-13) for ends in ((-12, 0), (0, 12))]
    return sum(part[0] for part in parts)


def pair_mean(function, q, c) -> float:
    """E[function(u) function(v)] for a smooth function, by the trapezoidal rule."""
    step = 0.1
    x = np.arange(-9.0, 9.0 + step / 2, step)
    weight = step * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    y = c * x[:, None] + math.sqrt(1 - c * c) * x
    return weight * function(math.sqrt(q) * x) @ (function(math.sqrt(q) * y) @ weight)


def variance_by_scipy(activation, weight_var, bias_var) -> tuple[float, float]:
    """q* and chi_1."""
    phi, slope = FUNCTIONS[activation]

    def grown(q):
        return bias_var + weight_var * mean(lambda x: phi(x) ** 2, q)

    q = scipy.optimize.brentq(lambda q: grown(q) - q, 1e-9, 1e3, xtol=1e-13, rtol=1e-13)
    return q, weight_var * mean(lambda x: slope(x) ** 2, q)


def by_scipy(activation, weight_var, bias_var) -> dict[str, float]:
    phi, slope = FUNCTIONS[activation]
    q, chi_1 = variance_by_scipy(activation, weight_var, bias_var)
    if chi_1 < 1:
        return dict(q=q, c=1.0, chi_1=chi_1, chi_c=chi_1, growth=chi_1)

    def gap(c):
        return (bias_var + weight_var * pair_mean(phi, q, c)) / q - c

    c = scipy.optimize.brentq(gap, 0.0, 1 - 1e-6, xtol=1e-13, rtol=1e-13)
    return dict(q=q, c=c, chi_1=chi_1, chi_c=weight_var * pair_mean(slope, q, c), growth=chi_1)


@pytest.mark.slow
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_a_hundred_fixed_points_are_those_of_scipy(activation):
    rng = np.random.default_rng(1)
    highest = 4.0 if activation in ("tanh", "erf") else 1.8
    weight_var, bias_var = rng.uniform(0.3, highest, 100), rng.uniform(0.02, 0.6, 100)
    found = points(weight_var, bias_var, activation)
    assert (np.asarray(found.status) == mf.Status.CONVERGED).all()
    expected = [by_scipy(activation, *cell) for cell in zip(weight_var, bias_var, strict=True)]
    # rounding of the oracle is magnified where the correlation map is almost parallel to c
    worse = 1 / np.abs(1 - np.asarray(found.chi_c))
    for name in expected[0]:
        values = np.array([one[name] for one in expected])
        difference = np.abs(np.asarray(getattr(found, name)) - values)
        assert (difference <= tolerance("quadrature", np.abs(values) + worse)).all(), name


# ---- identities and known values


@pytest.mark.slow
def test_the_edge_of_chaos_of_tanh():
    grid = diagram("tanh")
    edge = grid.critical_weight_var.values
    np.testing.assert_allclose(edge, [1.0, *TANH_EDGE.values()], atol=1e-5)
    for weight_var, b in zip(edge[1:], TANH_EDGE, strict=True):
        assert abs(variance_by_scipy("tanh", weight_var, b)[1] - 1) < 1e-9
    assert grid.critical_weight_var.dims == ("bias_var",)
    ordered = grid.chi_1.values < 1
    np.testing.assert_array_equal(ordered[:, 1:], (grid.c.values == 1)[:, 1:])


@pytest.mark.slow
def test_the_edge_of_relu_is_a_point():
    grid = diagram("relu")
    np.testing.assert_allclose(grid.critical_weight_var, [2.0, *[np.nan] * len(TANH_EDGE)])
    below = grid.sel(bias_var=0.5).isel(weight_var=WEIGHT_VAR < 2)
    assert_close(below.q, 0.5 / (1 - below.weight_var / 2), "rounding", 10.0)
    assert np.isnan(grid.q.sel(weight_var=3.0)).all()


def test_every_status_is_reached():
    cases = {
        mf.Status.CONVERGED: [block(1.5, 0.5, "relu")],
        mf.Status.MARGINAL: [block(2.0, 0.0, "relu")],
        mf.Status.NO_FIXED_POINT: [
            block(2.0, 0.5, "relu"),
            block(2.5, 0.0, "relu"),
            mf.Residual(mf.Sequential((mf.Activation("relu"), mf.Dense(9, 1.0, 0.1)))),
        ],
    }
    for status, blocks in cases.items():
        for one in blocks:
            point = mf.fixed_point(one)
            assert point.status == status, one
            failed = status == mf.Status.NO_FIXED_POINT
            assert bool(jnp.isnan(point.q)) == failed
            if failed:
                with pytest.raises(RuntimeError, match="without bound"):
                    point.raise_if_failed()
            else:
                assert point.raise_if_failed() is point
    assert jnp.isinf(mf.fixed_point(block(2.0, 0.0, "relu")).depth_scales.xi_c)


@pytest.mark.slow
def test_tanh_is_marginal_at_its_edge_of_chaos():
    edge = diagram("tanh").critical_weight_var.sel(bias_var=0.05).item()
    found = points([3.0, 1.0, edge], [0.05, 0.0, 0.05], "tanh")
    marginal = mf.Status.MARGINAL
    assert list(found.status) == [mf.Status.CONVERGED, marginal, marginal]
    assert not np.isnan(found.q).any()
    assert found.raise_if_failed() is found


def test_where_a_block_begins_does_not_matter():
    dense, phi, norm = mf.Dense(WIDTH, 2.5, 0.1), mf.Activation("relu"), mf.BatchNorm()
    expected = mf.fixed_point(mf.Sequential((dense, norm, phi)))
    for layers in ((norm, phi, dense), (phi, dense, norm), (mf.Sequential((phi, dense)), norm)):
        for one, other in zip(
            jax.tree.leaves(mf.fixed_point(mf.Sequential(layers))),
            jax.tree.leaves(expected),
            strict=True,
        ):
            assert_close(one, other, "rounding", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "erf"])
def test_implicit_derivatives_are_central_differences(activation):
    weight_var, bias_var = np.array([3.0, 1.5, 1.8, 1.2]), np.full(4, 0.05)
    slopes = np.asarray(derivatives(weight_var, bias_var, activation))
    step = 3e-5
    units = step * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])[..., None]
    near = points(*np.moveaxis(np.stack([weight_var, bias_var]) + units, 1, 0), activation)
    values = np.stack([getattr(near, name) for name in SLOPES], -1).reshape(2, 2, 4, len(SLOPES))
    differences = np.moveaxis(values[:, 0] - values[:, 1], 0, -1) / (2 * step)
    size = 1 + np.abs(slopes).max(-1, keepdims=True)
    assert (np.abs(slopes - differences) <= 1e-6 * size).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", JACOBIANS)
def test_derivatives_stay_finite_as_the_correlation_becomes_1(activation):
    def chi(weight_var):
        return variance_by_scipy(activation, weight_var, 0.05)[1] - 1

    edge = 2.0 if activation == "relu" else scipy.optimize.brentq(chi, 1.1, 2.5)
    weight_var = edge - np.array([0.3, 1e-2, 1e-4, 1e-6])
    slopes = np.asarray(derivatives(weight_var, np.full(4, 0.05), activation))
    assert np.isfinite(slopes).all()
    if activation != "relu":  # whose q* grows to 1e5 here
        assert np.abs(slopes[:, SLOPES.index("c"), 0]).max() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "gelu"])
def test_depth_scales_are_those_of_a_deep_network(activation):
    weight_var, bias_var = (2.5, 0.1) if activation == "tanh" else (1.8, 0.2)
    one = block(weight_var, bias_var, activation)
    deep = mf.Network((WIDTH,), (mf.Repeat(one, 61), mf.Dense(1)))
    order = mf.analyze(deep).order_parameters
    point = points(weight_var, bias_var, activation)
    q, c = np.asarray(order.q), np.asarray(order.q_xy / order.q)
    for values, limit, slope in ((q, point.q, point.chi_q), (c, point.c, point.chi_c)):
        distance = np.abs(values[:-1] - limit)
        # where the distance is small, but not yet rounding
        late = np.flatnonzero((distance < 1e-4) & (distance > 1e-7))
        ratios = distance[late[1:]] / distance[late[:-1]]
        np.testing.assert_allclose(ratios, slope.item(), rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "norm", "sizes"),
    [
        ("relu", (), (None,)),
        ("relu", (mf.BatchNorm(0.7),), (None, 12)),
        # a number and no None, both times, is one program
        ("tanh", (mf.BatchNorm(1.3, 0.2),), (10**9, 12)),
    ],
    ids=["none", "batch", "offset"],
)
def test_growth_is_that_of_a_deep_network(activation, norm, sizes):
    one = block(1.9, 0.3, activation, *norm)
    deep = mf.Network((WIDTH,), (mf.Repeat(one, 31), mf.Dense(1)))
    for num_samples in sizes:
        order = mf.analyze(deep, num_samples=num_samples).order_parameters
        q_tilde = np.asarray(order.q_tilde)
        point = mf.fixed_point(one, num_samples=num_samples)
        np.testing.assert_allclose(q_tilde[5:15] / q_tilde[6:16], float(point.growth), rtol=1e-5)


# ---- the phase diagram


def test_the_table_holds_the_moments():
    rng = np.random.default_rng(2)
    q, c = (rng.uniform(*ends, 60) for ends in ((0.01, 9), (-1, 1)))
    c = np.concatenate([c[:55], [0.0, 0.25, 0.999, 1 - 1e-6, 1.0]])
    for name in ("tanh", "silu"):
        phi = NONLINEARITIES[name]
        closed_form = tabulated(phi).closed_form
        assert closed_form is not None
        read = jax.jit(closed_form)
        exact = jax.jit(functools.partial(expectations, phi, mean=None))
        at, at_one = (q, q, q * c), (q, q, q)
        for moment in ("product", "derivative"):
            values, expected, scale = (
                np.asarray(getattr(function(*arguments), moment))
                for function, arguments in ((read, at), (exact, at), (read, at_one))
            )
            assert (np.abs(values - expected) / scale).max() < 2e-8


@pytest.mark.slow
@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_a_phase_diagram_is_its_fixed_points(activation):
    grid = diagram(activation)
    found = points(*np.meshgrid(WEIGHT_VAR, BIAS_VAR, indexing="ij"), activation)
    values = {
        key: np.asarray(value).reshape(grid.q.shape)
        for key, value in dict(vars(found), **found.depth_scales._asdict()).items()
    }
    np.testing.assert_array_equal(grid.status, values["status"])
    # next to the edge of chaos errors are magnified, and the depth scales are infinite on it
    near = np.minimum(np.abs(1 - values["chi_q"]), np.abs(1 - values["chi_c"])) < 0.02
    assert np.mean(near) < 0.1
    for key, expected in values.items():
        actual = grid[key].values
        np.testing.assert_allclose(
            actual[~near], expected[~near], rtol=1e-8, atol=1e-9, err_msg=key
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("activation", "phases"), [("tanh", {"ordered", "chaotic"}), ("relu", {"ordered"})]
)
def test_the_picture_shows_both_phases(activation, phases):
    figure = mf.plot_phase_diagram(diagram(activation))
    assert {text.get_text() for text in figure.axes[0].texts} == phases


# ---- BatchNorm on a small batch


@pytest.mark.slow
def test_growth_behind_batch_norm_with_relu_as_published():
    printed = "3.0841 2.0038 1.7882 1.5900 1.5220 1.4931 1.4797 1.4732"
    growths = batch_growths("relu")
    assert_printed([growths[n] for n in PUBLISHED], printed)
    normed = block(2.0, 0.3, "relu", mf.BatchNorm(eps=0.0))
    for n, linear in batch_growths("identity").items():
        assert_close(mf.fixed_point(normed, num_samples=n).growth, growths[n], "quadrature_edge")
        assert_close(linear, (n - 2) / (n - 3), "quadrature")


@pytest.mark.parametrize(
    ("activation", "limit"), [("relu", math.pi / (math.pi - 1)), ("tanh", 1.17781), ("erf", None)]
)
def test_growth_on_many_samples_is_the_limit(activation, limit):
    normed = block(2.0, 0.3, activation, mf.BatchNorm(1.0, eps=0.0))
    expected = float(mf.fixed_point(normed).growth)
    if limit is not None:
        assert_close(expected, limit, "printed", printed="1.17781")
    growths = batch_growths(activation)
    errors = [abs(growths[n] - expected) for n in MANY]
    assert errors[0] < 10 / 10**4
    assert errors[1] < 0.11 * errors[0]


@pytest.mark.parametrize(("activation", "function"), [("tanh", jnp.tanh), ("relu", jax.nn.relu)])
@pytest.mark.parametrize(("num_samples", "gamma", "beta"), [(8, 1.0, 0.0), (6, 2.0, 0.4)])
def test_growth_on_a_small_batch_is_that_of_a_random_one(
    activation, function, num_samples, gamma, beta
):
    draws = jax.random.normal(jax.random.key(0), (100_000, num_samples))
    centre = jnp.eye(num_samples) - 1 / num_samples

    def normalized(z):
        z = z - z.mean()
        return function(gamma * z / jnp.sqrt(jnp.mean(z**2)) + beta)

    def one(z):
        jacobian, value = centre @ jax.jacfwd(normalized)(z) @ centre, centre @ normalized(z)
        return jnp.stack([jnp.sum(jacobian**2), jnp.sum(value**2)])

    grown, variance = np.asarray(jax.jit(jax.vmap(one))(draws)).T
    ratio = grown.mean() / variance.mean()
    # of a ratio of means, by its linearization
    error = standard_error((grown - ratio * variance) / variance.mean())
    expected = batch_growths(activation, gamma, beta)[num_samples]
    assert_close(ratio, expected, "monte_carlo", standard_error=error)


# ---- the command line


@pytest.mark.slow
def test_the_command_prints_and_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # of the shape of the other diagrams
    ranges = ["--weight-var", "0.2:4:20", "--bias-var", "0.1:0.5:5"]
    assert main(["phase", *ranges, "--json", "--output", "phase.png"]) == 0
    printed = parsed("phase", capsys.readouterr().out)
    edge = printed["variables"]["critical_weight_var"]["values"]
    np.testing.assert_allclose([edge[0], edge[-1]], [TANH_EDGE[0.1], TANH_EDGE[0.5]], atol=1e-5)
    assert (tmp_path / "phase.png").read_bytes().startswith(b"\x89PNG")
    assert main(["phase", *ranges, "--activation", "identity", "--norm", "batch"]) == 0
    assert "none" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["1:3", "3:1:5", "1:3:1", "a:b:c"])
def test_a_range_that_is_none_gets_one_line(text, capsys):
    assert main(["phase", "--weight-var", text]) == 2
    assert f"--weight-var='{text}'" in capsys.readouterr().err


# ---- what cannot be used


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mf.fixed_point(mf.Activation("tanh")), ["block=", "Dense"]),
        (lambda: mf.fixed_point(mf.Sequential((mf.Conv(3), mf.Activation("tanh")))), ["vectors"]),
        (
            lambda: mf.fixed_point(
                mf.Sequential((mf.Dense(3), mf.Activation("tanh"), mf.Flatten()))
            ),
            ["Flatten"],
        ),
        (lambda: mf.fixed_point(block(-1.0, 0.1)), ["weight_var=-1.0", "not negative"]),
        (lambda: mf.fixed_point(block(1.0, 0.1), statistics="bach"), ["statistics='bach'"]),
        (
            lambda: mf.fixed_point(block(1.0, 0.1, "tanh", mf.BatchNorm()), num_samples=3),
            ["num_samples=3", "at least 4"],
        ),
        (
            lambda: mf.phase_diagram(block(1.0, 0.1), weight_var=[2.0, 1.0], bias_var=[0.1]),
            ["weight_var=", "ascending"],
        ),
        (lambda: mf.batch_growth("relu", 3), ["num_samples=3", ">= 4"]),
    ],
)
def test_a_mistake_gets_one_line(call, words):
    with pytest.raises(mf.SpecError) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
