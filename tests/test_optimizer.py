"""The optimizer of a spectrum: its rate, that the rate is the limit, and the rates by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf

WIDTH = 200
BLOCK = mf.Sequential((mf.Dense(WIDTH), mf.BatchNorm(), mf.Activation("relu")))
NORMALIZED = mf.Network(
    (30,),
    (mf.Dense(WIDTH), mf.BatchNorm(), mf.Activation("relu"), mf.Repeat(BLOCK, 2), mf.Dense(2)),
)
TWICE = mf.Sequential((mf.Dense(WIDTH), mf.Activation("relu"), mf.Dense(WIDTH)))
VANILLA = mf.Network(
    (30,), (mf.Dense(WIDTH), mf.Residual(TWICE), mf.Activation("relu"), mf.Dense(2))
)
NUM_SAMPLES = 60


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 30))


def params_of(network, seed=0):
    """Those of one draw."""
    return mf.functional(mf.build(network, rngs=nnx.Rngs(seed)))[1]


def rates_of(rule, params):
    """The rate of every parameter: what the first step takes of a gradient of ones."""

    @jax.jit
    def first_step(params):
        ones = jax.tree.map(jnp.ones_like, params)
        return rule.update(ones, rule.init(params), params)[0]

    return jax.tree.map(np.negative, jax.device_get(first_step(params)))


@pytest.mark.parametrize("options", [dict(), dict(num_samples=60), dict(statistics="frozen")])
def test_the_rate_is_the_fraction_of_the_largest_stable_one(options):
    rule = mf.optimizer(NORMALIZED, 0.8, 0.3, **options)
    expected = 0.3 * mf.analyze(NORMALIZED, **options).eta_max(0.8)
    for rate in jax.tree.leaves(rates_of(rule, params_of(NORMALIZED))):
        assert_close(rate, expected, "rounding", dtype=np.float32)


def test_data_give_the_rate_of_their_own_kernel(x):
    rates = rates_of(mf.optimizer(VANILLA, data=x), params_of(VANILLA))
    expected = 0.5 * mf.analyze(VANILLA, data=x).eta_max()
    assert_close(rates["layers/3/bias"], expected, "rounding", dtype=np.float32)


def losses_of_linearized(apply, params, x, rule, num_steps=100):
    """Training curve of the network's tangent model towards random targets, full batch."""
    first, product = jax.linearize(lambda p: apply(p, x), params)
    pullback = jax.linear_transpose(product, params)
    start = jax.random.normal(jax.random.key(1), first.shape)

    def step(carry, _):
        residual, memory = carry
        (slope,) = pullback(residual / len(x))
        updates, memory = rule.update(slope, memory, params)
        return (residual + product(updates), memory), jnp.sum(residual**2)

    return jax.lax.scan(step, (start, rule.init(params)), None, num_steps)[1]


def stays_bounded(losses):
    losses = np.asarray(losses)
    return bool(losses.max() < 10 * losses[0]) and bool(losses[-1] < losses[0])


@pytest.mark.slow
@pytest.mark.parametrize("network", [NORMALIZED, VANILLA], ids=["normalized", "vanilla"])
def test_the_measured_rate_is_the_limit_of_stability(network, x):
    """On a quadratic problem with the network's Fisher matrix; mu = .9 and none."""
    model = mf.build(network, rngs=nnx.Rngs(0))
    apply, params = mf.functional(model)
    cases = [(0.9, 0.95, True), (0.9, 1.05, False), (0.0, 0.95, True), (0.0, 1.05, False)]
    rates = [mf.learning_rate_for(model, x, momentum=mu, fraction=part) for mu, part, _ in cases]
    run = jax.jit(jax.vmap(lambda *rule: losses_of_linearized(apply, params, x, optax.sgd(*rule))))
    losses = run(np.array(rates), np.array([mu for mu, _, _ in cases], np.float32))
    assert [stays_bounded(curve) for curve in losses] == [stable for *_, stable in cases]


def test_the_predicted_rate_is_stable_and_not_far_from_the_limit(x):
    apply, params = mf.functional(mf.build(NORMALIZED, rngs=nnx.Rngs(1)))
    rule = mf.optimizer(NORMALIZED, fraction=0.9, num_samples=NUM_SAMPLES)

    @jax.jit
    def losses(factor):
        """With the rate times a factor, as a larger fraction has it."""
        return losses_of_linearized(apply, params, x, optax.chain(rule, optax.scale(factor)))

    assert stays_bounded(losses(1.0))
    assert not stays_bounded(losses(1.1 / 0.9))


@pytest.mark.slow
def test_train_functional_and_nnx_optimizer_take_the_same_steps(x):
    """One full-batch epoch each: mf.train, a loop over params, a loop over the module."""
    y = jax.random.normal(jax.random.key(2), (NUM_SAMPLES, 2))
    rule = mf.optimizer(NORMALIZED, num_samples=NUM_SAMPLES)
    found = mf.train(NORMALIZED, (x, y), optimizer=rule, epochs=4, batch_size=NUM_SAMPLES, seed=3)
    key, _ = jax.random.split(jax.random.key(3))
    model = mf.build(NORMALIZED, rngs=nnx.Rngs(key))
    apply, params = mf.functional(model)
    memory, owner = rule.init(params), nnx.Optimizer(model, rule, wrt=nnx.Param)

    def loss(outputs):
        return jnp.sum((outputs - y) ** 2) / (2 * NUM_SAMPLES)

    @jax.jit
    def step(params, memory):
        value, slope = jax.value_and_grad(lambda p: loss(apply(p, x)))(params)
        updates, memory = rule.update(slope, memory, params)
        return optax.apply_updates(params, updates), memory, value

    @nnx.jit
    def update(model, owner):
        value, slope = nnx.value_and_grad(lambda model: loss(model(x)))(model)
        owner.update(model, slope)
        return value

    for value in found.loss:
        params, memory, by_hand = step(params, memory)
        # four steps, each of which may amplify rounding; train shuffles the samples
        assert_close([by_hand, update(model, owner)], value, "edge", dtype=np.float32)


class Plain(nnx.Module):
    """A model that this package did not make, with Flax's own BatchNorm."""

    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(30, 50, rngs=rngs), nnx.Linear(50, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(50, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


@pytest.mark.slow
def test_any_model_can_be_measured(x):
    """Against the dense matrix: a module with BatchNorm, and a function of parameters."""
    model = Plain(nnx.Rngs(0))
    apply, params = mf.functional(model)

    def dense(apply, params):
        jacobian = jax.device_get(jax.jit(jax.jacobian(lambda p: apply(p, x)))(params))
        rows = [leaf.reshape(NUM_SAMPLES * 3, -1) for leaf in jax.tree.leaves(jacobian)]
        return np.linalg.norm(np.concatenate(rows, 1), 2) ** 2 / NUM_SAMPLES

    expected = 0.4 * 2 * 1.8 / dense(apply, params)
    found = mf.learning_rate_for(model, x, momentum=0.8, fraction=0.4)
    assert float(found) == pytest.approx(expected, rel=1e-4)
    by_function = mf.learning_rate_for(apply, x, params=params, momentum=0.8, fraction=0.4)
    assert_close(by_function, found, "rounding", dtype=np.float32)
    mf.calibrate(model, x)
    frozen = mf.learning_rate_for(model, x, statistics="frozen")
    assert frozen < mf.learning_rate_for(model, x)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: mf.optimizer(VANILLA, fraction=0.0), ("fraction=0.0", "above 0")),
        (lambda x: mf.optimizer(VANILLA, 1.0), ("momentum=1.0", "outside [0, 1)")),
        (lambda x: mf.learning_rate_for(jnp.tanh, x), ("model=", "nnx.Module")),
        (
            lambda x: mf.learning_rate_for(Plain(nnx.Rngs(0)), x, fraction=-1.0),
            ("fraction=-1.0", "above 0"),
        ),
        (
            lambda x: mf.train(
                VANILLA, (x, jnp.zeros((60, 2))), optimizer=optax.sgd(0.1), learning_rate=0.2
            ),
            ("learning_rate=0.2", "the optimizer has its own"),
        ),
        (
            lambda x: mf.sweep(VANILLA, (x, jnp.zeros((60, 2))), {}, optimizer=optax.sgd(0.1)),
            ("optimizer=", "pass a function of the learning rate"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, words, x):
    with pytest.raises((mf.SpecError, mf.DataError)) as error:
        call(x)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
