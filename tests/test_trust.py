"""Theory of batches nearly constant, of few directions, or too large: right, or refused."""

import draws
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.cli import main

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 20))
NORM = mf.BatchNorm()


def mlp(inputs: int = 20, **options) -> mf.Network:
    return mf.mlp([256] * 2, inputs=inputs, outputs=4, **(dict(norm=NORM) | options))


RESIDUAL = mf.Network(
    (20,),
    (
        mf.Dense(64),
        mf.Residual(mf.Sequential((mf.BatchNorm(1e-3), mf.Activation("relu"), mf.Dense(64)))),
        mf.BatchNorm(1e-3),
        mf.Activation("relu"),
        mf.Dense(3),
    ),
)
REPEATED = mf.Network(
    (20,),
    (
        mf.Dense(64),
        mf.Repeat(mf.Sequential((mf.BatchNorm(1e-3), mf.Activation("relu"), mf.Dense(64))), 2),
        mf.Dense(3),
    ),
)
# what cancels: a bias beside small scales or weights, a mean beside small deviations
CANCELLING = {
    "scale 1e-2": (mlp(norm=mf.BatchNorm(1e-2)), X),
    "scale 1e-4": (mlp(norm=mf.BatchNorm(1e-4)), X),
    "scale 1e-6": (mlp(norm=mf.BatchNorm(1e-6)), X),
    "weights 1e-12": (mlp(weight_var=1e-12), X),
    "deviations 1e-2": (mlp(), 3 + 1e-2 * X),
    "deviations 1e-4": (mlp(), 3 + 1e-4 * X),
    "batch groups": (mlp(norm=mf.BatchGroupNorm(1e-3, num_groups=256)), X),
    "cross-iteration": (mlp(norm=mf.CrossIterationBatchNorm((NORM,))), 3 + 1e-3 * X),
    "residual": (RESIDUAL, X),
    "repeated": (REPEATED, X),
}


def numbers(network: mf.Network, **options) -> np.ndarray:
    fisher = mf.analyze(network, **options).raise_if_failed().fisher
    return np.array([fisher.lambda_max, fisher.outlier, fisher.tangent_same], float)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "statistics"), [*((name, "batch") for name in CANCELLING), ("scale 1e-4", "frozen")]
)
def test_single_precision_is_double_precision(name, statistics):
    network, x = CANCELLING[name]
    x = np.asarray(x, np.float32)
    single = numbers(network, data=x, statistics=statistics)
    with jax.enable_x64():
        double = numbers(network, data=x.astype(float), statistics=statistics)
    assert np.abs(single / double - 1).max() < 0.01, (single, double)


@pytest.mark.parametrize("gamma", [1e-2, 1e-4, 1e-6])
def test_so_it_is_for_gaussian_inputs(gamma):
    network = mlp(norm=mf.BatchNorm(gamma))
    single = numbers(network, num_samples=40)
    with jax.enable_x64():
        double = numbers(network, num_samples=40)
    assert np.abs(single / double - 1).max() < 0.01, (single, double)


def outweighed(factor: float) -> np.ndarray:
    return np.concatenate([factor * X[:1], X[1:]])


def leading(count: int) -> np.ndarray:
    """Ones for the first features and zeros for the others."""
    return np.where(np.arange(20) < count, 1.0, 0.0)


FEW = {
    "one feature": X * leading(1),
    "two features": X * leading(2),
    "two features and their sums": X[:, :2] @ RNG.normal(size=(2, 20)),
    "two samples": np.tile(X[:2], (20, 1)),
    "three samples": np.tile(X[:3], (14, 1))[:40],
    "one outweighs": outweighed(300.0),
    "one outweighs, of three features": outweighed(300.0) * leading(3),
}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_few_directions_are_refused(name, double):
    x = FEW[name]
    with jax.enable_x64(double):
        x = jnp.asarray(x, float)
        with pytest.raises(mf.DataError, match=r"varies in too few directions.*; pass more"):
            mf.analyze(mlp(), data=x)
        within = mf.analyze(mlp(), data=x, throw=False)
        assert int(within.status) == mf.Status.FEW_DIRECTIONS
        assert np.isnan(within.fisher.lambda_max)
        assert not within.fisher.within_domain
    with pytest.raises(RuntimeError, match="analyze: the batch varies in too few directions"):
        within.raise_if_failed()


@pytest.mark.parametrize("x", [np.full((40, 20), 3.0), np.zeros((40, 20)), np.tile(X[:1], (40, 1))])
def test_equal_samples_are_refused(x):
    with pytest.raises(mf.DataError, match="all samples are equal"):
        mf.analyze(mlp(), data=x)
    assert np.isfinite(mf.analyze(mlp(norm=None), data=x + 1).fisher.lambda_max)


def test_under_jit_only_the_status_says_so():
    analyzed = jax.jit(lambda x: mf.analyze(mlp(), data=x), compiler_options=draws.UNFUSED)
    theory = analyzed(jnp.asarray(FEW["two features"], jnp.float32))
    assert int(theory.status) == mf.Status.FEW_DIRECTIONS
    assert np.isnan(theory.fisher.eigenvalues).all()


@pytest.mark.parametrize("factor", [10.0, 30.0])
def test_a_batch_that_one_sample_dominates_is_never_trusted(factor):
    with jax.enable_x64():
        assert not mf.analyze(mlp(), data=outweighed(factor)).fisher.within_domain
        assert mf.analyze(mlp(), data=X).fisher.within_domain


def test_without_a_norm_over_the_batch_nothing_is_refused():
    for norm in (None, mf.LayerNorm()):
        theory = mf.analyze(mlp(1, norm=norm), data=X[:, :1].astype(np.float32))
        assert int(theory.status) == mf.Status.CONVERGED


TOO_LARGE = {
    "scale": dict(norm=mf.BatchNorm(1e19)),
    "weights": dict(norm=None, weight_var=1e20),
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_overflow_has_a_status(name):
    network = mlp(**TOO_LARGE[name])
    for options in (dict(num_samples=40), dict(data=X.astype(np.float32))):
        theory = mf.analyze(network, **options)
        assert int(theory.status) == mf.Status.NOT_FINITE
        assert np.isnan(theory.fisher.outlier)
        with pytest.raises(RuntimeError, match="analyze: numbers overflow; compute in float64"):
            theory.raise_if_failed()


def test_a_grid_has_a_status_in_every_cell():
    def analyzed(weight_var):
        return mf.analyze(mlp(norm=None, weight_var=weight_var), num_samples=40)

    theory = jax.vmap(analyzed)(jnp.array([2.0, 1e20]))
    assert theory.status.tolist() == [mf.Status.CONVERGED, mf.Status.NOT_FINITE]
    with pytest.raises(RuntimeError, match=r"overflow.* in cell \(1,\)"):
        theory.raise_if_failed()


def test_the_command_line_says_so_in_one_line(capsys):
    assert main(["analyze", "--widths", "64", "64", "--gamma", "1e160"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("meanfield-jax: analyze: numbers overflow")
    assert said.err.count("\n") == 1


def test_a_network_with_the_same_data_agrees_with_its_draws():
    x = jnp.asarray(3 + 1e-3 * X, jnp.float32)
    predicted = float(mf.analyze(mlp(), data=x).fisher.lambda_max)
    measured = [
        float(
            mf.top_eigenvalues(mf.fisher_operator(mf.build(mlp(), rngs=nnx.Rngs(seed)), x))
            .raise_if_failed()
            .eigenvalues[0]
        )
        for seed in range(4)
    ]
    error = np.std(measured, ddof=1) / 2
    assert_close(np.mean(measured), predicted, "monte_carlo", standard_error=error, width=256)
