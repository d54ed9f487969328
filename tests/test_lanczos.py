"""Lanczos: its identities, independent packages, honest error bounds, every status and error."""

import functools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import matfree.decomp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.tree_util import register_dataclass

from meanfield_jax.empirical import lanczos
from meanfield_jax.empirical.density import SpectralDensity, spectral_density
from meanfield_jax.empirical.lanczos import Status, top_eigenvalues
from meanfield_jax.errors import SpecError

DTYPES = ["float32", "float64"]
TRACES = []


@register_dataclass
@dataclass(frozen=True)
class DenseOperator:
    """A symmetric matrix."""

    matrix: jax.Array

    @property
    def shape(self):
        return self.matrix.shape

    @property
    def dtype(self):
        return self.matrix.dtype

    def linearize(self):
        TRACES.append(self.shape)
        return lambda u: jnp.matmul(self.matrix, u, precision="highest")


@register_dataclass
@dataclass(frozen=True)
class DiagonalOperator:
    """Large, of known spectrum, and as hard as any: the start vector is rotation invariant."""

    spectrum: jax.Array

    @property
    def shape(self):
        return (self.spectrum.shape[0],) * 2

    @property
    def dtype(self):
        return self.spectrum.dtype

    def linearize(self):
        return lambda u: self.spectrum * u


def rounding(dtype, size, scale=1.0):
    """Rounding of a chain of products with a matrix of this size and norm."""
    return 20 * np.finfo(dtype).eps * math.sqrt(size) * scale


@pytest.fixture(params=DTYPES)
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


def dense(spectrum, dtype="float32", seed=0):
    spectrum = np.asarray(spectrum, float)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(len(spectrum),) * 2))[0]
    matrix = (rotation * spectrum) @ rotation.T
    return DenseOperator(jnp.asarray((matrix + matrix.T) / 2, dtype))


def fisher_like(kind, rng, size=5_000):
    """Ten outliers with the spread of a product of two Wishart matrices over a bulk below 150."""
    factors = (rng.normal(size=(10, 1000)) for _ in range(2))
    product = np.linalg.multi_dot([f @ f.T / 1000 for f in factors])
    outliers = 2400 * np.sort(np.linalg.eigvals(product).real)[::-1]
    if kind == "close pair":
        outliers[1] = outliers[0] * (1 - 7e-4)
    bulk = 150 * rng.beta(0.5, 3, size=size - 10)
    return np.sort(np.r_[outliers, bulk])[::-1]


density_of = jax.jit(SpectralDensity.density, static_argnames=("sigma", "relative_sigma"))


@functools.partial(jax.jit, static_argnames="steps")
def recurrence(op, steps, seed=0):
    matvec = op.linearize()
    return jax.lax.fori_loop(
        0,
        steps,
        lambda step, krylov: lanczos.expand(matvec, krylov, step),
        lanczos.begin(op.shape[0], steps, op.dtype, jax.random.key(seed)),
    )


def solve(op, k=1, **options):
    """Most tests have 60 dimensions and ask for vectors, so that they share compilations."""
    return top_eigenvalues(op, k, vectors=True, **options)


# 1. Identities


def test_recurrence_leaves_only_the_last_remainder(dtype):
    op = dense(np.geomspace(1e-3, 100, 60), dtype)
    krylov = recurrence(op, 25)
    basis, projected = np.asarray(krylov.basis), np.asarray(krylov.projected)
    remainder = np.asarray(op.matrix) @ basis.T - basis.T @ projected
    expected = np.zeros_like(remainder)
    expected[:, -1] = krylov.beta * krylov.vector
    bound = rounding(dtype, 60)
    np.testing.assert_allclose(remainder, expected, rtol=0, atol=bound * 100)
    np.testing.assert_allclose(basis @ basis.T, np.eye(25), rtol=0, atol=bound)
    np.testing.assert_allclose(np.triu(projected, 2), 0, rtol=0, atol=bound * 100)


def test_full_number_of_steps_reproduces_the_spectrum(dtype):
    spectrum = np.linspace(0, 7, 20)
    nodes = np.asarray(spectral_density(dense(spectrum, dtype), num_steps=20).nodes)[0]
    np.testing.assert_allclose(nodes, spectrum, rtol=0, atol=rounding(dtype, 20, 7))


def test_moments_are_those_of_the_start_vector(dtype):
    op = dense(np.linspace(1, 4, 40), dtype)
    quadrature = spectral_density(op, num_steps=6, num_draws=3)
    keys = jax.random.split(jax.random.key(0), 3)
    normal = jax.jit(jax.vmap(lambda key: jax.random.normal(key, (40,), dtype)))
    starts = np.array(normal(keys), float)
    starts /= np.linalg.norm(starts, axis=1, keepdims=True)
    for order in (0, 1, 2, 5, 11):  # exact up to degree 2 * 6 - 1
        power = np.linalg.matrix_power(np.asarray(op.matrix, float), order)
        exact = np.mean([start @ power @ start for start in starts])
        tolerance = rounding(dtype, 40) * max(order, 1)
        np.testing.assert_allclose(quadrature.moment(order), exact, rtol=tolerance)


def test_mean_of_the_density_is_the_mean_eigenvalue():
    spectrum = np.linspace(0, 3, 200) ** 2
    draws = 64
    mean = spectral_density(dense(spectrum), num_steps=10, num_draws=draws).mean()
    standard_error = math.sqrt(2 * np.sum(spectrum**2) / draws) / len(spectrum)
    assert abs(mean - spectrum.mean()) < 4 * standard_error


def test_density_integrates_to_one_on_plain_and_logarithmic_grids():
    quadrature = spectral_density(dense(np.geomspace(1e-2, 10, 60)), num_steps=30)
    plain, logarithmic = np.linspace(-3, 14, 4001), np.geomspace(1e-5, 50, 4001)
    width = dict(sigma=1e-3, relative_sigma=0.1)
    # trapezoids are exact on Gaussians as wide as many grid steps; float32 sums 4001 terms
    tolerance = 1e-3
    for grid, options in ((plain, {}), (plain, dict(sigma=0.2)), (logarithmic, width)):
        density = np.asarray(density_of(quadrature, grid, **options))
        assert (density >= 0).all()
        np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=tolerance)


# 2. Oracles


@pytest.mark.parametrize("k", [1, 3])
def test_eigenpairs_match_dense_and_arpack(dtype, k):
    rng = np.random.default_rng(1)
    op = dense(np.r_[rng.uniform(0, 1, 56), [12, 10, 9.9, 7]], dtype)
    matrix = np.asarray(op.matrix, float)
    result = solve(op, k, tol=1e-6).raise_if_failed()
    exact = np.linalg.eigvalsh(matrix)[::-1][:k]
    arpack = np.sort(scipy.sparse.linalg.eigsh(matrix, k, return_eigenvectors=False))[::-1]
    tolerance = 1e-6 + rounding(dtype, 60)
    np.testing.assert_allclose(result.eigenvalues, exact, rtol=tolerance)
    np.testing.assert_allclose(result.eigenvalues, arpack, rtol=tolerance)
    vectors = np.asarray(result.eigenvectors, float)
    assert vectors.shape == (k, op.shape[0])
    flat = vectors.reshape(k, -1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(k), rtol=0, atol=rounding(dtype, 60))
    residual = np.linalg.norm(flat @ matrix - exact[:, None] * flat, axis=1)
    allowed = np.asarray(result.residual_bounds) + np.asarray(result.error_bounds)
    assert (residual <= allowed + rounding(dtype, 60, 12)).all()


def test_recurrence_matches_matfree():
    with jax.enable_x64(True):
        op = dense(np.linspace(0, 5, 50), "float64")
        krylov = recurrence(op, 12)
        tridiagonal = matfree.decomp.tridiag_sym(12)
        peer = jax.jit(lambda v: tridiagonal(lambda v: op.matrix @ v, v))(krylov.basis[0])
        bound = rounding("float64", 50, 5)
        np.testing.assert_allclose(krylov.projected, peer.J_small, rtol=0, atol=bound)


# 3. Honest error bounds


@pytest.mark.parametrize(("kind", "most"), [("wishart", 18), ("close pair", 18.5)])
def test_top_eigenvalue_of_fisher_like_spectra(kind, most):
    """At least 99 % of 200 random starts keep both their bound and the tolerance."""
    kept, products = [], []
    for seed in range(200):
        spectrum = fisher_like(kind, np.random.default_rng(seed)).astype("float32")
        result = top_eigenvalues(DiagonalOperator(jnp.asarray(spectrum)), key=jax.random.key(seed))
        error = abs(float(result.eigenvalues[0]) - spectrum[0])
        kept.append(error <= min(float(result.error_bounds[0]), 1e-4 * spectrum[0]))
        products.append(int(result.num_matvecs))
        assert result.status == Status.CONVERGED
    assert np.mean(kept) >= 0.99
    assert np.mean(products) <= most


@pytest.mark.parametrize("k", [1, 3])
def test_bounds_hold_on_small_spectra_without_gaps(dtype, k):
    kept = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        op = dense(rng.beta(0.5, 2, size=60), dtype, seed)
        result = solve(op, k, tol=1e-3, key=jax.random.key(seed))
        error = np.linalg.eigvalsh(np.asarray(op.matrix, float))[::-1][:k] - result.eigenvalues
        kept.append((abs(error) <= result.error_bounds).all())
        assert (result.error_bounds <= 1e-3 * result.eigenvalues).all()
    assert np.mean(kept) >= 0.99


def test_tolerance_below_rounding_stops_at_the_floor(dtype):
    result = solve(dense(np.linspace(0, 1, 60) ** 4, dtype), tol=1e-30)
    assert result.status == Status.CONVERGED
    np.testing.assert_allclose(result.eigenvalues, 1, rtol=rounding(dtype, 60))
    assert 1e-30 < result.error_bounds[0] <= rounding(dtype, 60)


# 4. Special operators


@pytest.mark.parametrize("spectrum", [[5, 5, 2], [3, 3, 3], [8], [4, 4, 1, 1]])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_rank_deficient_operators_show_their_multiplicities(dtype, spectrum, k):
    padded = np.r_[spectrum, np.zeros(60 - len(spectrum))]
    result = solve(dense(padded, dtype), k).raise_if_failed()
    bound = rounding(dtype, 60, max(spectrum))
    np.testing.assert_allclose(result.eigenvalues, padded[:k], rtol=0, atol=bound)
    assert int(result.num_matvecs) <= 20
    assert np.isfinite(result.eigenvectors).all()


def test_multiplicity_inside_a_full_spectrum():
    spectrum = np.r_[[9, 9, 9], np.linspace(0, 1, 57)]
    result = solve(dense(spectrum), 3).raise_if_failed()
    np.testing.assert_allclose(result.eigenvalues, 9, rtol=1e-4)


@pytest.mark.parametrize(("copies", "k"), [(10, 5), (5, 5), (2, 5)])
def test_copies_of_the_largest_eigenvalue_in_a_large_operator(copies, k):
    spectrum = 150 * np.random.default_rng(0).beta(0.5, 3, size=4000)
    spectrum = np.sort(np.r_[np.full(copies, 2400), spectrum[copies:]])[::-1].astype("float32")
    result = top_eigenvalues(DiagonalOperator(jnp.asarray(spectrum)), k).raise_if_failed()
    np.testing.assert_allclose(result.eigenvalues, spectrum[:k], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_scale_of_the_operator_does_not_matter(scale):
    spectrum = scale * np.linspace(1, 0, 60) ** 8
    result = solve(dense(spectrum), 3).raise_if_failed()
    np.testing.assert_allclose(result.eigenvalues, spectrum[:3], rtol=1e-4)


@pytest.mark.parametrize("k", [1, 3])
def test_zero_operator(k):
    op = dense(np.zeros(60))
    result = solve(op, k).raise_if_failed()
    np.testing.assert_array_equal(result.eigenvalues, 0)
    assert int(result.num_matvecs) <= k + 1
    quadrature = spectral_density(op, num_steps=5)
    np.testing.assert_array_equal(quadrature.nodes, 0)
    assert np.isfinite(density_of(quadrature, np.linspace(-1, 1, 5))).all()


def test_operator_smaller_than_the_number_of_steps(dtype):
    op = dense([1.0, 2, 3, 4], dtype)
    result = top_eigenvalues(op, 4, max_steps=30).raise_if_failed()
    bound = rounding(dtype, 4, 4)
    np.testing.assert_allclose(result.eigenvalues, [4, 3, 2, 1], rtol=0, atol=bound)
    assert int(result.num_matvecs) == 4
    quadrature = spectral_density(op, num_steps=9, num_draws=2)
    assert quadrature.nodes.shape == quadrature.weights.shape == (2, 9)
    np.testing.assert_allclose(quadrature.weights.sum(axis=1), 1, rtol=bound)
    exact = [np.sum(np.arange(1, 5) * w[-4:]) for w in np.asarray(quadrature.weights)]
    np.testing.assert_allclose(quadrature.mean(), np.mean(exact), rtol=bound)


def test_dtype_is_kept(dtype):
    op = dense(np.linspace(0, 1, 60), dtype)
    result = solve(op, 3)
    quadrature = spectral_density(op, num_steps=5)
    leaves = [result.eigenvalues, result.residual_bounds, result.error_bounds]
    leaves += [result.eigenvectors, quadrature.nodes, density_of(quadrature, np.linspace(0, 1, 5))]
    assert {str(leaf.dtype) for leaf in leaves} == {dtype}


# 5. Transformations


def test_second_operator_of_the_same_structure_does_not_compile_again():
    TRACES.clear()
    for seed in range(3):
        op = dense(np.linspace(0, 1, 34), seed=seed)
        top_eigenvalues(op, tol=1e-2 / (seed + 1), key=jax.random.key(seed))
        spectral_density(op, num_steps=4, key=jax.random.key(seed))
    assert len(TRACES) == 1  # one product for both


def test_inside_jit_and_vmap():
    each = [np.asarray(dense(np.linspace(0, s, 30) ** 2).matrix) for s in (1.0, 2.0, 3.0)]
    matrices = jnp.asarray(np.stack(each))
    run = jax.jit(jax.vmap(lambda matrix: top_eigenvalues(DenseOperator(matrix), 2)))
    result = run(matrices).raise_if_failed()
    assert result.eigenvalues.shape == (3, 2)
    np.testing.assert_allclose(result.eigenvalues[:, 0], [1, 4, 9], rtol=1e-4)


# 6. Failures


def test_max_steps_keeps_the_best_estimates():
    op = dense(np.linspace(0, 1, 200))
    result = top_eigenvalues(op, 2, max_steps=8)
    assert (result.status, result.num_matvecs) == (Status.MAX_STEPS, 8)
    assert np.all(np.abs(1 - result.eigenvalues) <= result.error_bounds + 0.01)
    with pytest.raises(RuntimeError, match=r"8 products, the worst relative error .* max_steps"):
        result.raise_if_failed()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_product_that_is_not_finite(value):
    matrix = np.eye(60, dtype=np.float32)
    matrix[3, 3] = value
    op = DenseOperator(jnp.asarray(matrix))
    result = solve(op, 3)
    assert result.status == Status.NOT_FINITE
    assert np.isnan(result.eigenvalues).all()
    assert np.isnan(result.eigenvectors).all()
    with pytest.raises(RuntimeError, match="product 1 with the operator is not finite"):
        result.raise_if_failed()
    with pytest.raises(RuntimeError, match="a product in draw 0 is not finite"):
        spectral_density(op, num_steps=5).raise_if_failed()


def test_failure_in_a_batch_names_the_run():
    matrices = jnp.asarray(np.stack([np.eye(20), np.full((20, 20), np.nan)]), jnp.float32)
    run = jax.jit(jax.vmap(lambda matrix: top_eigenvalues(DenseOperator(matrix))))
    result = run(matrices)
    assert result.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE]
    with pytest.raises(RuntimeError, match=r"product 1 .* in run \(1,\)"):
        result.raise_if_failed()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(k=0), "k=0: the operator has 20 eigenvalues"),
        (dict(k=21), "k=21: the operator has 20 eigenvalues"),
        (dict(tol=0.0), r"tol=0.0: must be above 0"),
        (dict(tol=math.nan), "tol=nan: must be above 0"),
        (dict(k=5, max_steps=4), "max_steps=4: k=5 eigenvalues need"),
    ],
)
def test_arguments_of_top_eigenvalues(options, message):
    with pytest.raises(SpecError, match=message):
        top_eigenvalues(DenseOperator(jnp.eye(20)), **options)


@pytest.mark.parametrize("options", [dict(num_steps=0), dict(num_draws=0)])
def test_arguments_of_spectral_density(options):
    (name,) = options
    with pytest.raises(SpecError, match=f"{name}=0: must be at least 1"):
        spectral_density(DenseOperator(jnp.eye(20)), **options)


def test_other_arguments():
    half = DenseOperator(jnp.eye(20, dtype=jnp.bfloat16))
    for function in (top_eigenvalues, spectral_density):
        with pytest.raises(SpecError, match=r"op.dtype='bfloat16'"):
            function(half)
    quadrature = spectral_density(DenseOperator(jnp.eye(20)), num_steps=3)
    for options in (dict(sigma=-1.0), dict(relative_sigma=-1.0)):
        with pytest.raises(SpecError, match=r"sigma=-1\.0: must not be negative"):
            quadrature.density(np.zeros(3), **options)
    assert quadrature.raise_if_failed() is quadrature
