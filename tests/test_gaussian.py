"""Gaussian expectations of activation functions: identities, closed forms, other integrals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
from oracles import SMOOTH
from tolerance import assert_close, tolerance

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import (
    Moments,
    Nonlinearity,
    expectations,
    quadrature_error,
)
from meanfield_jax.kernel.nonlinearities import NONLINEARITIES

VARIANCES = (0.1, 1.0, 9.0)
CORRELATIONS = (-0.9, 0.0, 0.5, 0.999)
NUM_ENTRIES = 24
CLOSED = [name for name, phi in NONLINEARITIES.items() if phi.closed_form]
KINKED = {
    "relu": (lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0), (0.0,)),
    "leaky_relu": (lambda x: np.maximum(x, 0.1 * x), lambda x: np.where(x > 0, 1, 0.1), (0.0,)),
    "hard_tanh": (lambda x: np.clip(x, -1, 1), lambda x: 1.0 * (np.abs(x) < 1), (-1.0, 1.0)),
    "step": (lambda x: 1.0 * (x > 0.3), lambda x: 0 * x, (0.3,)),
}
OWN = {
    "hard_tanh": Nonlinearity(lambda x: jnp.clip(x, -1, 1), kinks=(-1.0, 1.0)),
    "step": Nonlinearity(lambda x: jnp.where(x > 0.3, 1.0, 0.0), kinks=(0.3,)),
}


@pytest.fixture(autouse=True)
def _exact(x64):
    """Everything here is float64 unless it says otherwise."""


def by_quadrature(name: str) -> Nonlinearity:
    """The activation without its closed form."""
    if name in OWN:
        return OWN[name]
    phi = NONLINEARITIES[name]
    return Nonlinearity(phi.function, phi.kinks)


def moments(phi: Nonlinearity, var_a, var_b, cov, mean=None) -> Moments:
    """Of up to NUM_ENTRIES entries, by one program for each function and dtype."""
    mean = None if mean is None else np.asarray(mean)
    found = compiled(phi, *padded(var_a, var_b, cov), mean)
    return Moments(*(np.asarray(part)[: len(cov)] for part in found))


def padded(*arrays) -> list[np.ndarray]:
    return [np.pad(array, (0, NUM_ENTRIES - len(array)), "edge") for array in arrays]


@functools.partial(jax.jit, static_argnums=0)
def compiled(phi: Nonlinearity, var_a, var_b, cov, mean) -> Moments:
    return expectations(phi, var_a, var_b, cov, mean)


def grid(variances=VARIANCES, correlations=CORRELATIONS):
    var, c = (np.ravel(a) for a in np.meshgrid(variances, correlations))
    return var, c


def trapezoid(function, derivative, var_a, var_b, c, mean=0.0) -> np.ndarray:
    """The moments of an analytic function: the trapezoidal rule converges geometrically.

    Those nearest to the real line are tanh's at variance 9, pi/6 away: the error is of order
    exp(-2 pi pi/6 / step).
    """
    step = 0.05
    x = np.arange(-11.0, 11.0 + step / 2, step)
    weight = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * step
    y = c * x[:, None] + np.sqrt(1 - c**2) * x[None, :]
    u, v = mean + np.sqrt(var_a) * x, mean + np.sqrt(var_b) * y
    slope_u, slope_v = derivative(u), derivative(v)
    return np.array(
        [
            weight * function(u) @ (function(v) @ weight),
            weight * slope_u @ (slope_v @ weight),
            weight * slope_u * x @ ((slope_v * y) @ weight),
            weight * slope_u * x**2 @ (slope_v @ weight),
        ]
    )


def panels(function, derivative, kinks, var_a, var_b, c, mean=0.0) -> np.ndarray:
    """The moments of a piecewise smooth function, on short panels that end at the kinks."""
    node, weight = np.polynomial.legendre.leggauss(12)
    std_a, std_b, rest = np.sqrt(var_a), np.sqrt(var_b), np.sqrt(1 - c**2)

    def rule(edges):
        half = np.diff(edges, axis=-1)[..., None] / 2
        x = edges[..., :-1, None] + half * (1 + node)
        values = half * weight * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
        return x.reshape(*edges.shape[:-1], -1), values.reshape(*edges.shape[:-1], -1)

    coarse, points = np.linspace(-9.5, 9.5, 39), (np.array(kinks) - mean) / std_a
    # where y crosses its kink at fixed x the inner integral bends over a distance of rest
    near = ((np.array(kinks) - mean) / std_b)[:, None] / (c or 1) + rest * np.linspace(-9, 9, 37)
    outer = np.clip(np.sort(np.concatenate([coarse, points, near.ravel()])), -9.5, 9.5)
    x, weight_x = rule(outer)
    crossing = ((np.array(kinks) - mean) / std_b - c * x[:, None]) / rest
    inner = np.concatenate([np.broadcast_to(coarse, (x.size, coarse.size)), crossing], axis=-1)
    w, weight_w = rule(np.clip(np.sort(inner, axis=-1), -9.5, 9.5))
    y = c * x[:, None] + rest * w
    u, v = mean + std_a * x, mean + std_b * y
    slope_u, slope_v = derivative(u), derivative(v)
    return np.array(
        [
            weight_x @ (function(u) * (weight_w * function(v)).sum(-1)),
            weight_x @ (slope_u * (weight_w * slope_v).sum(-1)),
            weight_x @ (slope_u * x * (weight_w * slope_v * y).sum(-1)),
            weight_x @ (slope_u * x**2 * (weight_w * slope_v).sum(-1)),
        ]
    )


def scales(phi: Nonlinearity, var, mean=None) -> Moments:
    """The moments at correlation 1, which bound those at any other (Cauchy-Schwarz)."""
    return moments(phi, var, var, var, mean)


# ---- the integrals used as oracles


def test_the_oracles_agree_with_scipy():
    cov = np.array([[2.0, 1.2], [1.2, 2.0]])
    inverse, norm = np.linalg.inv(cov), 2 * np.pi * np.sqrt(np.linalg.det(cov))

    def density(v, u):
        z = np.array([u, v])
        return np.exp(-z @ inverse @ z / 2) / norm

    def integral(function, edge):
        parts = [(-edge, 0), (0, edge)] if function is KINKED["relu"][0] else [(-edge, edge)]
        return sum(
            scipy.integrate.dblquad(
                lambda v, u: function(u) * function(v) * density(v, u), *a, *b, epsabs=1e-9
            )[0]
            for a in parts
            for b in parts
        )

    assert_close(
        trapezoid(*SMOOTH["silu"], 2.0, 2.0, 0.6)[0], integral(SMOOTH["silu"][0], 10), "difference"
    )
    assert_close(
        panels(*KINKED["relu"], 2.0, 2.0, 0.6)[0], integral(KINKED["relu"][0], 10), "difference"
    )


def test_the_oracles_agree_with_closed_forms():
    nine, one, cov = np.full(4, 9.0), np.ones(4), 3 * np.array(CORRELATIONS)
    for name in ("erf", "relu", "leaky_relu"):
        expected = np.transpose(moments(NONLINEARITIES[name], nine, one, cov))
        for c, row in zip(CORRELATIONS, expected, strict=True):
            if name == "erf":
                assert_close(trapezoid(*SMOOTH[name], 9.0, 1.0, c), row, "quadrature", 1.0)
            else:
                assert_close(panels(*KINKED[name], 9.0, 1.0, c), row, "quadrature", 3.0)


# ---- closed forms


@pytest.mark.parametrize("name", CLOSED)
def test_closed_form_equals_quadrature(name):
    var, c = grid(correlations=(*CORRELATIONS, 1.0, -1.0))
    var_b = 2 * var
    cov = c * np.sqrt(var * var_b)
    exact = moments(NONLINEARITIES[name], var, var_b, cov)
    numeric = moments(by_quadrature(name), var, var_b, cov, 0.0)
    bounds = scales(NONLINEARITIES[name], 2 * var)
    for field in Moments._fields:
        a, b, bound = (np.asarray(getattr(m, field)) for m in (numeric, exact, bounds))
        assert_close(a, b, "quadrature_edge" if name != "erf" else "quadrature", bound)


def test_relu_moments_are_the_printed_formulas():
    var, c = grid()
    angle = np.pi / 2 + np.arcsin(c)
    result = moments(NONLINEARITIES["relu"], var, var, c * var)
    product = var / (2 * np.pi) * (np.sqrt(1 - c**2) + c * angle)
    assert_close(result.product, product, "rounding", var)
    assert_close(result.derivative, angle / (2 * np.pi), "rounding", 1.0)
    assert_close(result.scale, product / var, "rounding", 1.0)


def test_leaky_relu_moments_are_the_printed_formulas():
    var, c = grid()
    j0 = (np.pi - np.arccos(c)) / np.pi
    j1 = (np.sqrt(1 - c**2) + (np.pi - np.arccos(c)) * c) / np.pi
    result = moments(NONLINEARITIES["leaky_relu"], var, var, c * var)
    assert_close(result.product, var * (0.9**2 / 2 * j1 + 0.1 * c), "rounding", var)
    assert_close(result.derivative, 0.9**2 / 2 * j0 + 0.1, "rounding")


def test_erf_moments_are_the_printed_formulas():
    var, c = grid()
    cov = c * var
    result = moments(NONLINEARITIES["erf"], var, var, cov)
    assert_close(result.product, 2 / np.pi * np.arcsin(2 * cov / (1 + 2 * var)), "rounding", 1.0)
    derivative = 4 / np.pi / np.sqrt((1 + 2 * var) ** 2 - 4 * cov**2)
    assert_close(result.derivative, derivative, "rounding")


# ---- quadrature


@pytest.mark.parametrize("mean", [0.0, 0.7])
@pytest.mark.parametrize("name", SMOOTH)
def test_quadrature_of_smooth_functions_is_as_exact_as_documented(name, mean):
    var, c = grid(correlations=(*CORRELATIONS, 1.0))
    result = np.array(moments(by_quadrature(name), var, var, c * var, mean))
    expected = [trapezoid(*SMOOTH[name], v, v, ci, mean) for v, ci in zip(var, c, strict=True)]
    for variance in VARIANCES:
        own = np.array(expected)[var == variance].T
        # relative to the moment of equal inputs: the others pass through zero
        assert_close(result[:, var == variance], own, "quadrature", np.abs(own[:, -1:]))


@pytest.mark.parametrize("mean", [-0.8, 0.5])
@pytest.mark.parametrize("name", KINKED)
def test_quadrature_across_kinks_is_as_exact_as_documented(name, mean):
    var, c = grid()
    result = np.array(moments(by_quadrature(name), var, var, c * var, mean)).T
    for row, variance, correlation in zip(result, var, c, strict=True):
        expected = panels(*KINKED[name], variance, variance, correlation, mean)
        kind = "quadrature_edge" if correlation > 0.9 else "quadrature"
        assert_close(row, expected, kind, [mean**2 + variance, 1.0, 1.0, 1.0])


def test_quadrature_without_the_kinks_is_wrong():
    bare = Nonlinearity(NONLINEARITIES["relu"].function)
    one = np.ones(1)
    exact = moments(NONLINEARITIES["relu"], one, one, 0.5 * one).product
    naive = moments(bare, one, one, 0.5 * one).product
    assert abs(naive - exact)[0] > 1e5 * tolerance("quadrature")


@pytest.mark.parametrize(("name", "mean"), [("tanh", 0.0), ("gelu", 0.7), ("erf", 0.7)])
def test_quadrature_error_is_no_smaller_than_the_error(name, mean):
    phi = by_quadrature(name)
    for variance in (1.0, 9.0):
        args = np.full((3, 1), variance) * np.array([[1], [1], [0.5]])
        result = np.array(moments(phi, *args, mean))[:, 0]
        expected = trapezoid(*SMOOTH[name], variance, variance, 0.5, mean)
        error = np.abs(result / expected - 1).max()
        assert error <= quadrature_error(phi, variance, 0.5, mean) + tolerance("quadrature")


def test_quadrature_error_warns_of_kinks_that_were_not_named():
    bare = Nonlinearity(NONLINEARITIES["relu"].function)
    assert quadrature_error(bare, 1.0) > 1e-5
    assert quadrature_error(by_quadrature("relu"), 1.0) < tolerance("difference")


# ---- Price's theorem: d E[phi(u) phi(v)] / d Cov(u, v) = E[phi'(u) phi'(v)]


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_price_theorem(name):
    # either side is the derivative of an integral, whose error is that of the integrand's slope
    check_price(name, (-0.9, -0.3, 0.0, 0.5, 0.999), "difference")


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_price_theorem_where_two_inputs_become_one(name):
    check_price(name, (1 - 1e-6, 1.0), "edge")


def check_price(name: str, correlations, kind: str) -> None:
    phi = NONLINEARITIES[name]
    var, c = grid((0.1, 1.0), correlations)
    var_b = 1.5 * var
    cov = c * np.sqrt(var * var_b)
    slope = np.asarray(slopes(phi, *padded(var, var_b, cov)))[: cov.size]
    derivative = moments(phi, var, var_b, cov).derivative
    assert_close(slope, derivative, kind, 1.0)


@functools.partial(jax.jit, static_argnums=0)
def slopes(phi: Nonlinearity, var_a, var_b, cov):
    return jax.grad(lambda k: expectations(phi, var_a, var_b, k, None).product.sum())(cov)


# ---- finite derivatives, the edges, dtypes


@pytest.mark.parametrize(
    ("name", "with_mean"),
    [
        *((name, False) for name in (*CLOSED, "tanh")),
        pytest.param("relu", True, marks=pytest.mark.slow),
    ],
)
def test_first_and_second_derivatives_are_finite_up_to_equal_inputs(name, with_mean):
    phi = NONLINEARITIES[name]

    def total(args):
        var_a, var_b, cov, mean = args
        result = expectations(phi, var_a, var_b, cov, mean if with_mean else None)
        return sum(part.sum() for part in result)

    def first(args):
        gradient = jax.grad(total)(args)
        return gradient, gradient

    def second_and_first(c):
        args = (jnp.ones(1), jnp.ones(1), c[None], jnp.zeros(()))
        return jax.jacfwd(first, has_aux=True)(args)

    both = jax.jit(functools.partial(jax.lax.map, second_and_first))
    for leaf in jax.tree.leaves(both(np.array([0.0, 0.5, 1 - 1e-6, 1.0]))):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        *((name, None) for name in CLOSED),
        *(("relu", mean) for mean in (0.0, 0.4, -0.4)),
        ("tanh", 0.4),
    ],
)
def test_without_variance_the_moments_are_values(name, mean):
    phi, zero = NONLINEARITIES[name], np.zeros(1)
    result = moments(phi, zero, zero, zero, mean)
    value = float(phi.function(jnp.asarray(mean or 0.0)))
    assert_close(result.product, [value**2], "quadrature", 1.0)
    for leaf in result:
        assert np.isfinite(leaf).all()
    assert np.isfinite(total_slope(phi, zero, None if mean is None else np.asarray(mean))).all()


@functools.partial(jax.jit, static_argnums=0)
def total_slope(phi: Nonlinearity, var, mean):
    """Of the sum of all moments where both inputs are one, in their variance."""

    def total(var):
        return sum(part.sum() for part in expectations(phi, var, var, var, mean))

    return jax.grad(total)(var)


def test_one_deterministic_member_of_a_pair_averages_the_other_alone():
    phi = by_quadrature("hard_tanh")
    one, zero = np.ones(1), np.zeros(1)
    result = moments(phi, zero, one, zero, 0.5).product
    node = np.linspace(-9, 9, 200_001)
    average = np.trapezoid(np.clip(0.5 + node, -1, 1) * np.exp(-(node**2) / 2), node)
    expected = [0.5 * average / np.sqrt(2 * np.pi)]
    assert_close(result, expected, "difference", 1.0)


@pytest.mark.parametrize("name", NONLINEARITIES)
def test_dtype_is_kept(name):
    for dtype in (np.float32, np.float64):
        args = [np.full(2, value, dtype) for value in (1.0, 2.0, 0.3)]
        for mean in (None, dtype(0.1)):
            rule = functools.partial(expectations, NONLINEARITIES[name])
            result = jax.eval_shape(rule, *args, mean)
            assert {leaf.dtype for leaf in result} == {np.dtype(dtype)}


@pytest.mark.parametrize("name", CLOSED)
def test_single_precision_agrees_with_double(name):
    var, c = grid(correlations=(-0.9, 0.0, 0.5))
    double = moments(NONLINEARITIES[name], var, var, c * var)
    single = moments(NONLINEARITIES[name], *(a.astype(np.float32) for a in (var, var, c * var)))
    for a, b, bound in zip(single, double, scales(NONLINEARITIES[name], var), strict=True):
        assert_close(a, b, "rounding", bound, dtype=np.float32)


def test_large_kernels_are_integrated_in_pieces_of_the_same_values():
    var = np.linspace(0.1, 2.0, 700)
    cov = 0.3 * var
    last = slice(-NUM_ENTRIES, None)
    whole = compiled(NONLINEARITIES["tanh"], var, var, cov, None)
    part = moments(NONLINEARITIES["tanh"], var[last], var[last], cov[last])
    for a, b in zip(whole, part, strict=True):
        assert_close(np.asarray(a)[last], b, "rounding")


@pytest.mark.parametrize(
    ("function", "point", "value"),
    [(safe.sqrt, 0.0, 0.0), (safe.sqrt, -1.0, 0.0), (safe.asin, 1.0, np.pi / 2)],
)
def test_safe_functions_have_a_value_and_zero_derivatives_at_their_edge(function, point, value):
    slope = jax.grad(function)
    found = jax.jit(lambda x: (function(x), slope(x), jax.grad(slope)(x)))(point)
    assert found == (value, 0, 0)


def test_safe_division_by_zero_is_zero_with_zero_derivatives():
    found = jax.jit(jax.value_and_grad(safe.divide, argnums=(0, 1)))(2.0, 0.0)
    assert found == (0, (0, 0))
