"""Training runs: against a plain loop, side by side, and what is said of those that fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import DIGITS
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.experiments.precision import lower_products
from meanfield_jax.variants import with_gamma

BLOCK = (mf.Dense(40), mf.BatchNorm(), mf.Activation("relu"))
REPEATED = mf.Network((64,), (*BLOCK, mf.Repeat(mf.Sequential(BLOCK), 2), mf.Dense(10)))


@pytest.fixture(scope="module")
def digits():
    return mf.data.load("digits", num_samples=400, flatten=True)


@pytest.mark.slow
def test_one_step_at_a_time_by_hand(digits):
    """The same draw and order, with optax and a Python loop."""
    x, labels = jnp.asarray(digits[0]), jnp.asarray(digits[1])
    found = mf.train(DIGITS, digits, learning_rate=0.02, gamma=0.5, epochs=2, seed=3)
    key_draw, key_order = jax.random.split(jax.random.key(3))
    network = with_gamma(DIGITS, 0.5)
    draw = jax.jit(lambda key: mf.functional(mf.build(network, rngs=nnx.Rngs(key))))
    apply, params = draw(key_draw)
    optimizer = optax.sgd(0.02, 0.9)
    memory = jax.jit(optimizer.init)(params)

    @jax.jit
    def step(params, memory, rows):
        def loss(params):
            return jnp.sum((apply(params, x[rows]) - jax.nn.one_hot(labels[rows], 10)) ** 2) / 200

        value, slope = jax.value_and_grad(loss)(params)
        updates, memory = optimizer.update(slope, memory)
        return optax.apply_updates(params, updates), memory, value

    order = jax.jit(jax.vmap(lambda key: jax.random.permutation(key, 400)))
    for epoch, batches in enumerate(np.asarray(order(jax.random.split(key_order, 2)))):
        values = []
        for rows in batches.reshape(4, 100):
            params, memory, value = step(params, memory, rows)
            values.append(float(value))
        # eight steps, each of which may amplify rounding
        assert_close(found.loss[epoch], np.mean(values), "edge", dtype=np.float32)


@pytest.mark.slow
def test_runs_do_not_touch_each_other(digits):
    """A run that diverges beside it changes nothing; seeds and scales differ."""
    rates, gammas = np.array([0.01, 1e3]), np.array([[0.5], [1.0]])
    both = mf.train(DIGITS, digits, learning_rate=rates, gamma=gammas, epochs=2)
    assert both.loss.shape == (2, 2, 2)
    assert both.diverged.tolist() == [[False, True]] * 2
    assert np.isnan(both.loss[:, 1, -1]).all()
    assert np.all(both.diverged_at[:, 1] >= 1)
    alone = mf.train(DIGITS, digits, learning_rate=0.01, gamma=1.0, epochs=2)
    assert_close(both.loss[1, 0], alone.loss, "edge", dtype=np.float32)
    seeds = mf.train(DIGITS, digits, learning_rate=0.01, gamma=1.0, seed=np.arange(4), epochs=2)
    assert len(np.unique(seeds.loss[:, 0])) == 4


@pytest.mark.slow
def test_together_and_in_turn_give_the_same(digits, monkeypatch):
    """One step of all runs is one step of a vmap; in turn, a run that diverges takes no more."""
    steps = []

    def counted(rate):
        def update(slope, memory, params=None):
            jax.debug.callback(lambda: steps.append(0))
            return memory_rule.update(slope, memory, params)

        memory_rule = optax.sgd(rate, 0.9)
        return optax.GradientTransformation(memory_rule.init, update)

    def runs():
        steps.clear()
        options = dict(learning_rate=[0.02, 1e3], epochs=3, test=digits, optimizer=counted)
        run = mf.train(DIGITS, digits, **options)
        jax.effects_barrier()
        return run, len(steps)

    in_turn, in_turn_steps = runs()
    jax.clear_caches()
    monkeypatch.setattr("meanfield_jax.experiments.in_turn.IN_TURN", ())
    together, together_steps = runs()
    jax.clear_caches()
    diverged_at = int(in_turn.diverged_at[1])
    assert (in_turn_steps, together_steps) == (12 + diverged_at + 1, 12)
    np.testing.assert_array_equal(in_turn.diverged_at, together.diverged_at)
    for name in ("loss", "test_loss", "test_accuracy"):
        a, b = getattr(in_turn, name), getattr(together, name)
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
        assert_close(a[0], b[0], "edge", dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "options"),
    [
        (REPEATED, dict(learning_rate=0.02, gamma=0.5)),
        (DIGITS, dict(learning_rate=3e-3, optimizer=optax.adam, loss="cross_entropy")),
    ],
    ids=["squared", "cross_entropy"],
)
def test_it_learns_and_is_evaluated_by_running_statistics(digits, network, options):
    test = mf.data.load("digits", split="test", flatten=True)
    run = mf.train(network, digits, test=test, batch_size=20, epochs=8, **options)
    assert run.loss[-1] < 0.5 * run.loss[0]
    assert run.test_accuracy[-1] > 0.7
    if network is REPEATED:
        assert run.test_loss[-1] < 0.2 * run.loss[0]
    dataset = run.to_xarray()
    assert dataset.test_loss.dims == ("epoch",)
    assert int(dataset.diverged_at) == -1


@pytest.mark.slow
def test_scales_that_do_not_learn_stay(digits):
    """With frozen scales and offsets the start is the same, and training another."""

    def losses(learning_rate: float, train_gamma: bool):
        options = dict(gamma=1.0, epochs=2, train_gamma=train_gamma)
        return mf.train(DIGITS, digits, learning_rate=learning_rate, **options).loss

    assert_close(losses(0.0, True), losses(0.0, False), "rounding", dtype=np.float32)
    assert abs(losses(0.02, True)[1] / losses(0.02, False)[1] - 1) > 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(loss="hinge"), ("loss='hinge'", "squared, cross_entropy")),
        (dict(precision="fp8"), ("precision='fp8'", "float32, tf32, bf16")),
        (dict(epochs=0), ("epochs=0", "at least 1")),
        (dict(batch_size=401), ("batch_size=401", "400 samples")),
        (
            dict(test=(np.ones((3, 5), np.float32), np.zeros(3, int))),
            ("test[0].shape=(3, 5)", "64"),
        ),
        (dict(data=(np.ones((3, 64), np.float32), np.zeros(4, int))), ("data[1].shape=(4,)",)),
        (dict(network=mf.mlp([4], inputs=64, outputs=10), gamma=1.0), ("gamma=1.0", "no norm")),
    ],
)
def test_what_makes_no_sense_is_refused(digits, options, words):
    arguments = dict(network=DIGITS, data=digits) | options
    with pytest.raises((mf.SpecError, mf.DataError)) as error:
        mf.train(arguments.pop("network"), arguments.pop("data"), **arguments)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "network",
    [
        mf.mlp([200], inputs=64, outputs=10),
        mf.mlp([200], inputs=64, outputs=10).in_parametrization("ntk"),
        mf.cnn([20], inputs=(8, 8, 1), outputs=10, norm=mf.LayerNorm()),
    ],
    ids=["fc", "multiplier", "conv"],
)
def test_bf16_rounds_the_factors_of_every_product(digits, network):
    """Outputs and slopes differ from those of float32 by about 2^-9, the rounding of a factor."""
    x = jnp.asarray(digits[0]).reshape(-1, *network.input_shape)

    @functools.partial(jax.jit, static_argnums=0)
    def outputs_and_slopes(precision):
        model = mf.build(network, rngs=nnx.Rngs(0))
        lower_products(model, precision)
        graphdef, params = nnx.split(model)

        def loss(params):
            outputs = nnx.merge(graphdef, params)(x)
            return jnp.sum(outputs**2), outputs

        (_, outputs), slopes = jax.value_and_grad(loss, has_aux=True)(params)
        return outputs, slopes

    full, coarse = map(outputs_and_slopes, ("float32", "bf16"))
    for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(coarse), strict=True):
        assert b.dtype == jnp.float32
        assert 2**-11 < jnp.linalg.norm(a - b) / jnp.linalg.norm(a) < 2**-7


@pytest.mark.slow
def test_the_boundary_is_that_of_float32_in_every_precision(digits):
    """It moves by less than a step of a grid of learning rates; TF32 changes nothing on CPU."""
    predicted = float(mf.analyze(DIGITS, data=digits[0][:100]).eta_max(0.9))
    rates, seeds = predicted * 1.3 ** np.arange(-4, 12)[:, None], np.arange(3)
    found = {
        precision: mf.train(
            DIGITS, digits, learning_rate=rates, seed=seeds, epochs=5, precision=precision
        )
        for precision in ("float32", "tf32", "bf16")
    }
    assert jnp.array_equal(found["float32"].loss, found["tf32"].loss, equal_nan=True)
    full, coarse = (np.asarray(found[name].diverged) for name in ("float32", "bf16"))
    assert not full[0].any()
    assert full[-1].all()
    assert np.all(np.abs(full.argmax(0) - coarse.argmax(0)) <= 1)
    assert not np.array_equal(found["float32"].loss[0], found["bf16"].loss[0])
    stable = [np.asarray(found[name].loss[0]) for name in ("float32", "bf16")]
    assert np.all(np.abs(stable[1] / stable[0] - 1) < 2**-7)
    assert np.all(stable[1][:, -1] < stable[1][:, 0])


def test_a_run_has_diverged_where_its_loss_is_a_thousand_times_the_first():
    x = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    network = mf.Network((5,), (mf.Dense(2),))
    rate = 1.3 * float(mf.analyze(network, data=x).eta_max(0.9))
    found = mf.train(network, (x, np.arange(20) % 2), learning_rate=rate, epochs=60, batch_size=20)
    step, loss = int(found.diverged_at), np.asarray(found.loss)
    assert step > 3
    assert int(found.status) == mf.Status.DIVERGED
    assert np.all(loss[:step] <= 1000 * loss[0])
    assert np.isnan(loss[step:]).all()
    # a linear network's loss grows by the same factor in every step
    assert loss[step - 1] ** 2 / loss[step - 2] > 500 * loss[0]
    with pytest.raises(RuntimeError, match=f"train: diverged at step {step}; use a smaller"):
        found.raise_if_failed()
