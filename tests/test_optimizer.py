"""The optimizer of a spectrum: its rate, that the rate is the limit, and the rates by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from tolerance import assert_close, standard_error

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


@pytest.mark.parametrize(("per_layer", "too_far"), [(False, 1.1), (True, 2.0)])
def test_the_predicted_rate_is_stable_and_not_far_from_the_limit(per_layer, too_far, x):
    """By layer the bulk decides, whose edge theory knows to a factor of 1.3/2 to 2.2/2 only."""
    apply, params = mf.functional(mf.build(NORMALIZED, rngs=nnx.Rngs(1)))
    rule = mf.optimizer(NORMALIZED, fraction=0.9, num_samples=NUM_SAMPLES, per_layer=per_layer)

    @jax.jit
    def losses(factor):
        """With all rates times a factor, as a larger fraction has them."""
        return losses_of_linearized(apply, params, x, optax.chain(rule, optax.scale(factor)))

    assert stays_bounded(losses(1.0))
    assert not stays_bounded(losses(too_far / 0.9))


def scaled(apply, roots, params, x):
    return apply(jax.tree.map(jnp.multiply, params, roots), x)


@jax.jit
def dense(operator):
    return operator.dual.to_dense()


def matrix_by_layer(network, roots, seed):
    """The dual of D^{1/2} F D^{1/2}, of one draw on its own inputs, (n C, n C).

    D are the rates, whose square roots are given.
    """
    x = jax.random.normal(jax.random.key(seed), (NUM_SAMPLES, 30))
    apply, params = mf.functional(mf.build(network, rngs=nnx.Rngs(seed)))
    params = jax.tree.map(np.divide, jax.device_get(params), roots)
    return dense(mf.FisherOperator(jax.tree_util.Partial(scaled, apply, roots), params, x))


@pytest.mark.slow
@pytest.mark.parametrize("network", [NORMALIZED, VANILLA], ids=["normalized", "vanilla"])
def test_rates_by_layer_add_up_to_the_eigenvalues(network):
    """Outliers sum_l eta_l f_l, where the outputs are alike for all samples; bulk likewise."""
    rule = mf.optimizer(network, num_samples=NUM_SAMPLES, per_layer=True)
    fisher = mf.analyze(network, num_samples=NUM_SAMPLES).fisher
    assert fisher.outlier_limited
    # the layers' rates back from the definition: half of the limit, in equal parts
    outlier, rest = fisher.outlier_high_shares, 2 * fisher.bulk_high_shares
    rates = 1 / np.maximum(outlier, rest)
    rates *= 0.5 * 3.8 / max(rates @ outlier, rates @ rest)
    shares = fisher.shares.weights + fisher.shares.biases + fisher.shares.norm
    roots = jax.tree.map(np.sqrt, rates_of(rule, params_of(network)))
    matrices = np.array([matrix_by_layer(network, roots, seed) for seed in range(12)], np.float64)
    blocks = matrices.reshape(-1, NUM_SAMPLES, 2, NUM_SAMPLES, 2)
    outliers = np.einsum("sikjk->s", blocks) / (2 * NUM_SAMPLES)
    bulk = (np.trace(matrices, axis1=1, axis2=2) / 2 - outliers) / (NUM_SAMPLES - 1)
    for measured, expected in ((outliers, rates @ shares), (bulk, rates @ fisher.bulk_shares)):
        error = standard_error(measured)
        assert_close(measured.mean(), expected, "monte_carlo", standard_error=error, width=WIDTH)
    top = np.linalg.eigvalsh(matrices)[:, ::-1]
    if rates @ outlier > rates @ rest:  # the eigenvalues themselves, where the bulk is far away
        means = top[:, :2].mean(1)
        error = standard_error(means)
        assert_close(means.mean(), rates @ shares, "monte_carlo", standard_error=error, width=WIDTH)
    else:  # the bulk's edge, 1.3 to 2.2 times its estimate, of which the optimizer takes 2
        assert (top[:, 0] < 2.2 * rates @ fisher.bulk_high_shares).all()


@pytest.mark.slow
def test_every_copy_of_a_block_has_its_own_rate():
    """Nested repetitions; the same network unrolled has the same rates."""
    block = mf.Sequential((mf.Dense(20, 1.5, 0.1), mf.Activation("erf")))
    first, last = (mf.Dense(20), mf.Activation("erf")), mf.Dense(3)
    scanned = mf.Network((8,), (*first, mf.Repeat(mf.Repeat(block, 3), 2), last))
    unrolled = mf.Network((8,), (*first, *block.layers * 6, last))
    options = dict(num_samples=10, per_layer=True)
    found, expected = (
        rates_of(mf.optimizer(network, **options), params_of(network))
        for network in (scanned, unrolled)
    )
    kernels = np.stack([expected[f"layers/{index}/kernel"] for index in range(2, 14, 2)])
    at = found["layers/2/block/block/layers/0/kernel"]
    assert at.shape == (2, 3, 20, 20)
    assert_close(at.reshape(6, 20, 20), kernels, "edge", dtype=np.float32)
    assert_close(found["layers/3/bias"], expected["layers/14/bias"], "edge", dtype=np.float32)
    assert len(np.unique(kernels)) == 6


def test_a_layer_without_share_has_a_finite_rate():
    """On large batches in training mode outliers see the last layer's weights only."""
    assert float(mf.analyze(NORMALIZED).fisher.shares.weights[0]) == 0
    rule = mf.optimizer(NORMALIZED, num_samples=NUM_SAMPLES, per_layer=True)
    rates = rates_of(rule, params_of(NORMALIZED))
    assert all(np.isfinite(rate).all() and (rate > 0).all() for rate in rates.values())
    with pytest.raises(mf.SpecError, match=r"num_samples=None: .*give the batch size, or data"):
        mf.optimizer(NORMALIZED, per_layer=True)


@pytest.mark.slow
@pytest.mark.parametrize("per_layer", [False, True])
def test_train_functional_and_nnx_optimizer_take_the_same_steps(per_layer, x):
    """One full-batch epoch each: mf.train, a loop over params, a loop over the module."""
    y = jax.random.normal(jax.random.key(2), (NUM_SAMPLES, 2))
    rule = mf.optimizer(NORMALIZED, num_samples=NUM_SAMPLES, per_layer=per_layer)
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
            ("optimizer=", "give a function of the learning rate"),
        ),
        (
            lambda x: rates_of(
                mf.optimizer(VANILLA, num_samples=60, per_layer=True),
                mf.functional(Plain(nnx.Rngs(0)))[1],
            ),
            ("parameters='first/bias'", "not of the network"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, words, x):
    with pytest.raises((mf.SpecError, mf.DataError)) as error:
        call(x)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)
