"""Training runs: against a plain loop, side by side, and what is said of those that fail."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import DIGITS
from tolerance import assert_close

import meanfield_jax as mf
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
