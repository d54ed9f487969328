"""A layer from outside the package: theory, network, compare, tune, JSON and the command line."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.experiments.compare import norm_names, norm_of
from meanfield_jax.layers.base import LAYERS, layer
from meanfield_jax.layers.norm import FlaxNorm, Norm, check_gaussian
from meanfield_jax.variants import with_norm, without_norms

WIDTH, NUM_SAMPLES = 128, 24


@pytest.fixture
def toy():
    """A normalization of each sample by its root mean square, registered for one test."""

    @layer
    class RootMeanSquareNorm(Norm):
        norm_name = "root_mean_square"
        abbreviation = "RMS"

        def output(self, signal):
            check_gaussian("RootMeanSquareNorm", signal)
            return signal

        def rule(self, kernel):
            covariance = kernel.covariance
            gain = self.gain(covariance, covariance.sample_mean(covariance.diagonal()))
            return self.affine(kernel, covariance * gain, kernel.effective_tangent * gain)

        def build(self, shape, rngs):
            norm = nnx.RMSNorm(shape[-1], epsilon=float(self.eps), use_scale=False, rngs=rngs)
            return FlaxNorm(norm, self, shape)

    yield RootMeanSquareNorm
    del LAYERS["RootMeanSquareNorm"]


def test_its_theory_is_that_of_its_networks(toy):
    network = mf.mlp([WIDTH] * 2, inputs=20, outputs=2, norm=toy(0.8), bias_var=0.0)
    predicted = float(mf.analyze(network, num_samples=NUM_SAMPLES).fisher.outlier)

    @jax.jit
    def outlier(key):
        model = mf.build(network, rngs=nnx.Rngs(key))
        x = jax.random.normal(jax.random.fold_in(key, 1), (NUM_SAMPLES, 20))
        kernel = mf.fisher_operator(model, x).dual.to_dense()
        by_sample = jnp.einsum("ikjk->ij", kernel.reshape(NUM_SAMPLES, 2, NUM_SAMPLES, 2)) / 2
        return by_sample.sum() / NUM_SAMPLES

    measured = jnp.stack([outlier(key) for key in jax.random.split(jax.random.key(0), 60)])
    error = standard_error(np.asarray(measured, float))
    assert_close(measured.mean(), predicted, "monte_carlo", standard_error=error, width=WIDTH)


def test_it_is_compared_tuned_and_saved(toy):
    assert "root_mean_square" in norm_names()
    x, y = mf.data.load("digits", num_samples=60, flatten=True)
    network = mf.mlp([8, 8], inputs=64, outputs=10, norm=mf.BatchNorm())
    options = dict(batch_sizes=[30], learning_rates=[0.01], epochs=1, seeds=1, draws=1)
    names = ["batch", "root_mean_square"]
    found = mf.compare(network, (x, y), test=(x, y), norms=names, **options)
    assert np.isfinite(found.predicted.sel(norm="root_mean_square")).all()

    own = with_norm(network, toy(1.5))
    assert mf.Network.from_json(own.to_json()) == own
    target = 2 * float(mf.analyze(own, num_samples=20).eta_max())
    objective = mf.objectives.target_eta_max(target)
    tuned = mf.tune(own, objective, num_samples=20, shared=True)
    assert tuned.status == mf.Status.CONVERGED
    accuracy = float(jnp.finfo(jnp.float32).eps) ** 0.5  # of the descent
    assert float(tuned.after.eta_max()) == pytest.approx(target, rel=accuracy)


def test_the_command_line_knows_its_name(toy):
    from meanfield_jax.cli.tables import abbreviation

    assert abbreviation("root_mean_square") == "RMS"
    assert abbreviation("mine") == "mine"


@pytest.mark.parametrize(("before", "after"), list(itertools.product(norm_names(), repeat=2)))
@pytest.mark.parametrize("kind", ["cnn", "resnet"])
def test_every_norm_is_exchanged_for_every_other(before, after, kind):
    make = dict(
        cnn=lambda norm: mf.cnn([8, 16], inputs=(8, 8, 3), norm=norm),
        resnet=lambda norm: mf.preact_resnet([8, 16], blocks=1, inputs=(8, 8, 3), norm=norm),
    )[kind]
    plain = make(None)
    old, new = (norm_of(name, plain) for name in (before, after))
    network, expected = make(old), make(new)
    if old is not None:
        assert with_norm(network, new) == expected
    assert without_norms(network) == plain
