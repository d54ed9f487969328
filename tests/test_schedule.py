"""The schedule of a network: its shape, where its peak comes from, training with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import DIGITS, SMALL_NORM
from tolerance import assert_close

import meanfield_jax as mf
from meanfield_jax.variants import with_gamma


@pytest.fixture(scope="module")
def digits():
    x, labels = mf.data.load("digits", num_samples=100, flatten=True)
    return x, labels


@pytest.fixture(scope="module")
def model():
    return mf.build(DIGITS, rngs=nnx.Rngs(0))


def test_it_rises_to_the_predicted_rate_and_falls_to_zero():
    rate = float(mf.learning_rate(SMALL_NORM))
    schedule = mf.suggest_schedule(SMALL_NORM, num_steps=100, warmup=20)
    assert float(schedule.peak) == rate
    expected = [0.0, rate / 2, rate, rate / 2, 0.0, 0.0]
    assert_close(
        schedule(np.array([0, 10, 20, 60, 100, 120])), expected, "rounding", rate, dtype=np.float32
    )
    ours = optax.warmup_cosine_decay_schedule(0.0, rate, 20, 100)
    steps = np.arange(101)
    assert_close(schedule(steps), ours(steps), "rounding", rate, dtype=np.float32)
    assert mf.suggest_schedule(SMALL_NORM, num_steps=100).warmup == 10
    alone = mf.suggest_schedule(SMALL_NORM, num_steps=100, warmup=0, fraction=0.5)
    assert float(alone(0)) == 0.5 * rate


def test_an_optimizer_of_optax_takes_its_steps():
    schedule = mf.suggest_schedule(SMALL_NORM, num_steps=10, warmup=4)
    rule = optax.sgd(schedule, momentum=0.0)
    memory, gradient = rule.init(jnp.ones(2)), jnp.ones(2)
    for step in range(10):
        update, memory = jax.jit(rule.update)(gradient, memory)
        assert_close(-update, schedule(step), "rounding", schedule.peak, dtype=np.float32)


def test_it_says_in_one_line_where_its_peak_comes_from(digits, model):
    x, _ = digits
    theory = mf.suggest_schedule(SMALL_NORM, num_steps=100, warmup=20)
    assert repr(theory).startswith("Schedule(warm-up 20 steps, peak ")
    assert "(theory), cosine to 0 at step 100)" in repr(theory)
    measured = mf.suggest_schedule(model, x, num_steps=50, warmup=5)
    assert "(measured), cosine" in repr(measured)
    assert "\n" not in repr(measured)


def trained_by_hand(model, batches, rate, momentum):
    """A copy after 15 steps of warm-up, by Flax and optax."""
    copy = nnx.clone(model)
    copy.train()
    rule = optax.sgd(optax.linear_schedule(0.0, rate, 15), momentum)
    owner = nnx.Optimizer(copy, rule, wrt=nnx.Param)

    @nnx.jit
    def step(copy, owner, x, labels):
        def loss(copy):
            return 0.5 * jnp.sum((copy(x) - jax.nn.one_hot(labels, 10)) ** 2, -1).mean()

        owner.update(copy, nnx.grad(loss)(copy))

    for index in range(15):
        step(copy, owner, *batches[index % 2])
    return copy


@pytest.mark.parametrize(("gamma", "falls"), [(1.0, False), (0.05, True)])
def test_the_peak_follows_the_network_down_and_not_up(digits, gamma, falls):
    """A small gamma grows in the warm-up, and with it the curvature."""
    x, labels = digits
    model = mf.build(with_gamma(DIGITS, gamma), rngs=nnx.Rngs(0))
    batches = [(x[:50], labels[:50]), (x[50:], labels[50:])]
    found = mf.suggest_schedule(
        model, x, num_steps=60, warmup=15, batches=batches, fraction=0.5, momentum=0.8
    )
    start = mf.learning_rate(model, x, fraction=0.5, momentum=0.8)
    after = mf.learning_rate(
        trained_by_hand(model, batches, float(start), 0.8), x, fraction=0.5, momentum=0.8
    )
    assert (float(after) < float(start)) == falls
    # each eigenvalue is measured to 1 %
    assert float(found.peak) == pytest.approx(min(float(start), float(after)), rel=0.02)
    assert ("measured after 15 steps" in repr(found)) == falls
    assert found.rate.decisive == start.decisive
    assert float(found.rate.quadratic) == float(start.quadratic)


def test_labels_and_one_hot_targets_train_alike(digits):
    """With the cross-entropy; the scale is so small that the peak is that after the warm-up."""
    x, labels = digits
    model = mf.build(with_gamma(DIGITS, 0.05), rngs=nnx.Rngs(0))
    options = dict(num_steps=60, warmup=15, loss="cross_entropy")
    peaks = [
        float(mf.suggest_schedule(model, x, batches=[(x, y)], **options).peak)
        for y in (labels, jax.nn.one_hot(labels, 10))
    ]
    # the eigenvalue is measured to 1 %
    assert peaks[0] == pytest.approx(peaks[1], rel=2e-2)
    assert peaks[0] <= 2.5  # the largest first rate that is safe with this loss


def test_a_function_of_parameters_has_one_too(digits, model):
    x, labels = digits
    apply, params = mf.functional(model)
    options = dict(num_steps=40, batches=[(x, labels)])
    found = mf.suggest_schedule(apply, x, params=params, **options)
    assert_close(
        found.peak, mf.suggest_schedule(model, x, **options).peak, "edge", dtype=np.float32
    )
    nesterov = optax.sgd(1.0, 0.9, nesterov=True)
    other = mf.suggest_schedule(apply, x, params=params, optimizer=nesterov, **options)
    assert float(other.peak) < float(found.peak)


def training_curves(network, schedule, data, **options):
    """Losses of three draws, by epoch."""
    rule = optax.sgd(schedule, 0.9)
    found = mf.train(network, data, optimizer=rule, seed=np.arange(3), **options)
    return np.nan_to_num(np.asarray(found.loss), nan=np.inf)


@pytest.mark.slow
def test_training_with_it_does_not_spike(digits):
    """Full-batch descent at the largest rate without a spike; three draws."""
    x, labels = digits
    network = mf.mlp([100] * 2, inputs=64, outputs=10, norm=mf.BatchNorm())
    schedule = mf.suggest_schedule(network, x, num_steps=60)
    losses = training_curves(network, schedule, (x, labels), batch_size=100, epochs=60)
    assert np.all(losses.max(-1) < 2 * losses[:, 0])


@pytest.mark.slow
def test_half_of_the_peak_learns_more_than_a_twentieth():
    """In 300 steps on batches of 100; the peak itself is the largest rate, not the best."""
    x, labels = mf.data.load("digits", num_samples=1000, flatten=True)
    network = mf.mlp([100] * 2, inputs=64, outputs=10, norm=mf.BatchNorm())
    half, twentieth = (
        training_curves(
            network,
            mf.suggest_schedule(network, x[:100], num_steps=300, fraction=fraction),
            (x, labels),
            batch_size=100,
            epochs=30,
        )
        for fraction in (0.5, 0.05)
    )
    assert np.all(half[:, -1] < twentieth[:, -1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(num_steps=0), ("num_steps=0", "at least 1")),
        (dict(num_steps=10, warmup=10), ("warmup=10", "training has 10 steps")),
        (dict(num_steps=10, warmup=-1), ("warmup=-1", "at least 0")),
        (dict(num_steps=10, batches=3), ("batches=3", "sequence")),
        (dict(num_steps=10, batches=[(1, 2)]), ("batches=", "a specification")),
        (dict(num_steps=10, loss="mse"), ("loss='mse'", "squared")),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(mf.SpecError) as error:
        mf.suggest_schedule(SMALL_NORM, **options)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(warmup=0, batches=[(1, 2)]), ("batches=", "no warm-up")),
        (dict(batches=[3]), ("batches[0]=", "pair")),
        (dict(batches=[(np.ones((4, 3)), np.zeros(4, int))]), ("batches[0]: x.shape", "(4, 3)")),
        (dict(batches=[(np.ones((4, 64)), np.zeros(3))]), ("batches[0][1].shape=(3,)",)),
        (dict(batches=[(np.ones((4, 64)), np.full(4, 10))]), ("batches[0][1]=10 to 10",)),
        (dict(batches=[(1, 2)], optimizer="adam", y=np.zeros(100, int)), ("batches=", "Adam")),
    ],
)
def test_batches_that_cannot_be_used_are_refused(digits, model, options, words):
    with pytest.raises((mf.SpecError, mf.DataError)) as error:
        mf.suggest_schedule(model, digits[0], num_steps=20, **options)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)
