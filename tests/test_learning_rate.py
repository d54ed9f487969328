"""The learning rate of a network or a model: identities, structure, drawn networks, training."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from networks import DIGITS, SMALL_NORM
from tolerance import assert_close, standard_error

import meanfield_jax as mf
from meanfield_jax.empirical.generic import layers_after_norms

WIDTH, NUM_SAMPLES = 200, 60
RELU = mf.Activation("relu")
VANILLA = mf.mlp([WIDTH], inputs=30, outputs=2)


def residual(*end, times=2):
    """Dense, two blocks x + Dense(relu(norm(x))), what is given, Dense."""
    block = mf.Residual(mf.Sequential((mf.BatchNorm(), RELU, mf.Dense(WIDTH))))
    blocks = (mf.Repeat(block, times),) if times > 1 else (block, block)
    return mf.Network((30,), (mf.Dense(WIDTH), *blocks, *end, mf.Dense(2)))


REPEATED = mf.Network(
    (30,), (mf.Repeat(mf.Sequential((mf.Dense(30), mf.BatchNorm(), RELU)), 3), mf.Dense(2))
)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (NUM_SAMPLES, 30))


def normed(norm, **options):
    return mf.mlp([WIDTH] * 2, inputs=30, outputs=2, norm=norm, **options)


def test_without_a_norm_all_rates_come_from_lambda_max(x):
    rate, theory = mf.learning_rate(VANILLA, x, momentum=0.9), mf.analyze(VANILLA, data=x)
    assert float(rate.quadratic) == pytest.approx(float(theory.eta_max(0.9)))
    assert float(rate.lambda_after_norms) == float(rate.lambda_max)
    assert "no normalization" in rate.domain


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9])
def test_the_spike_is_where_the_first_step_doubles_the_loss(momentum):
    """Of a quadratic: the loss at the rate is at most doubled, and more above it."""
    rate = mf.learning_rate(SMALL_NORM, momentum=momentum)
    curvature = float(rate.lambda_after_norms)

    def largest(factor):
        weight, velocity, losses = 1.0, 0.0, []
        for _ in range(200):
            velocity = momentum * velocity + curvature * weight
            weight -= factor * float(rate.no_spike) * velocity
            losses.append(weight**2)
        return max(losses)

    assert largest(0.999) <= 2.0
    assert largest(1.25) > 2.0


def test_the_eigenvalue_is_the_sum_of_what_these_layers_contribute():
    """For i.i.d. inputs the restricted outlier is linear in the layers."""
    network = normed(mf.BatchNorm(0.7))
    theory = mf.analyze(network, num_samples=50)
    parts = theory.fisher.contributions
    expected = (parts.weights + parts.biases + parts.norm)[-2:] * (
        1 + theory.fisher.draw_width[-2:]
    ) ** 2
    rate = mf.learning_rate(network, num_samples=50)
    assert rate.decisive == parts.layers[-2:] == ("layers/4", "layers/6")
    assert_close(rate.lambda_after_norms, expected.sum(), "rounding", dtype=np.float32)


@pytest.mark.parametrize(
    ("network", "decisive"),
    [
        (normed(mf.LayerNorm()), ("layers/4", "layers/6")),
        (normed(mf.ProxyNorm()), ("layers/3/norm", "layers/3", "layers/4")),
        (residual(mf.BatchNorm(), RELU), ("layers/2", "layers/4")),
        (
            residual(times=1),
            (
                "layers/0",
                *(f"layers/{i}/branch/layers/{j}" for i in (1, 2) for j in (0, 2)),
                "layers/3",
            ),
        ),
        (REPEATED, ("layers/0/block[2]/layers/1", "layers/1")),
        (VANILLA, ("layers/0", "layers/2")),
    ],
    ids=["layer", "proxy", "final norm", "open residual", "repeat", "no norm"],
)
def test_which_layers_decide(network, decisive):
    assert mf.learning_rate(network).decisive == decisive


@pytest.mark.parametrize(
    "network",
    [
        normed(mf.BatchNorm()),
        normed(mf.LayerNorm()),
        residual(mf.BatchNorm(), RELU),
        VANILLA,
    ],
    ids=["batch", "layer", "residual", "none"],
)
def test_a_model_shows_the_same_layers_as_its_specification(network, x):
    """Found by multiplying parameters, also where all of them are 0."""
    model = mf.build(network, rngs=nnx.Rngs(0))
    apply, params = mf.functional(model)
    empty = jax.tree.map(jnp.zeros_like, params)
    expected = mf.learning_rate(network).decisive
    for values in (params, empty):
        assert layers_after_norms(mf.FisherOperator(apply, values, x)) == expected


def test_frozen_statistics_normalize_nothing(x):
    network = normed(mf.BatchNorm())
    rate = mf.learning_rate(network, x, statistics="frozen")
    assert len(rate.decisive) == 5
    model = mf.build(network, rngs=nnx.Rngs(0))
    mf.calibrate(model, x)
    assert mf.learning_rate(model, x, statistics="frozen").decisive == rate.decisive


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
@pytest.mark.parametrize(
    "network", [normed(mf.BatchNorm()), residual(times=1)], ids=["normalized", "open residual"]
)
def test_the_measured_rate_is_the_limit_of_stability(network, x):
    """On a quadratic problem with the network's Fisher matrix; mu = .9 and none."""
    model = mf.build(network, rngs=nnx.Rngs(0))
    apply, params = mf.functional(model)
    # measured to 1 %
    cases = [(0.9, 0.95, True), (0.9, 1.05, False), (0.0, 0.95, True), (0.0, 1.05, False)]
    rates = [part * mf.learning_rate(model, x, momentum=mu).quadratic for mu, part, _ in cases]
    run = jax.jit(jax.vmap(lambda *rule: losses_of_linearized(apply, params, x, optax.sgd(*rule))))
    losses = run(np.array(rates), np.array([mu for mu, _, _ in cases], np.float32))
    assert [stays_bounded(curve) for curve in losses] == [stable for *_, stable in cases]


@pytest.mark.slow
def test_train_functional_and_nnx_optimizer_take_the_same_steps(x):
    """One full-batch epoch each: mf.train, a loop over params, a loop over the module."""
    y = jax.random.normal(jax.random.key(2), (NUM_SAMPLES, 2))
    rule = optax.sgd(mf.learning_rate(REPEATED, num_samples=NUM_SAMPLES), 0.9)
    found = mf.train(REPEATED, (x, y), optimizer=rule, epochs=4, batch_size=NUM_SAMPLES, seed=3)
    key, _ = jax.random.split(jax.random.key(3))
    model = mf.build(REPEATED, rngs=nnx.Rngs(key))
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


@pytest.mark.slow
@pytest.mark.parametrize("norm", [mf.BatchNorm(0.7), mf.LayerNorm()], ids=["batch", "layer"])
def test_the_eigenvalue_is_that_of_networks_drawn_at_random(norm, x):
    network = normed(norm)
    draws = []
    for seed in range(6):
        model = mf.build(network, rngs=nnx.Rngs(seed))
        draws.append(float(mf.learning_rate(model, x).lambda_after_norms))
    predicted = mf.learning_rate(network, x).lambda_after_norms
    error = standard_error(draws) + 0.01 * np.mean(draws)  # eigenvalues are measured to 1 %
    assert_close(np.mean(draws), predicted, "monte_carlo", standard_error=error, width=WIDTH)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [2, 8])
def test_training_spikes_above_the_rate_and_not_at_it(depth):
    x, labels = mf.data.load("digits", num_samples=100, flatten=True)
    network = mf.mlp([100] * depth, inputs=64, outputs=10, norm=mf.BatchNorm())
    y = jax.nn.one_hot(labels, 10)
    rate = float(mf.learning_rate(network, x).no_spike)
    options = dict(data=(x, y), batch_size=100, epochs=60, seed=np.arange(3))
    losses = mf.train(network, learning_rate=np.array([[1.0], [2.2]]) * rate, **options).loss
    highest = np.nan_to_num(np.asarray(losses), nan=np.inf).max(-1) / np.asarray(losses)[..., 0]
    assert np.all(highest[0] < 2)
    assert np.all(highest[1] > 2)


def test_it_takes_the_place_of_a_number(x):
    rate = mf.learning_rate(SMALL_NORM, fraction=0.5)
    number = float(rate)
    assert number == float(rate.recommended) == 0.5 * float(rate.no_spike)
    gradient = jnp.ones(3)
    rule = optax.sgd(rate, 0.9)
    assert_close(-rule.update(gradient, rule.init(gradient))[0], number, "rounding")
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, 10, 100)
    assert float(schedule(10)) == pytest.approx(number)
    assert float(2 * rate - rate / 2 + rate) == pytest.approx(2.5 * number)
    assert float(rate.for_mean_over_outputs()) == pytest.approx(2 * number)


def test_a_loss_that_is_divided_by_the_number_of_outputs(x):
    """The same first step, from the rate for the mean over samples and outputs."""
    y, params = jnp.ones((NUM_SAMPLES, 2)), jnp.ones((30, 2))
    rate = mf.learning_rate(VANILLA, x)
    ours = jax.grad(lambda p: jnp.sum((x @ p - y) ** 2) / (2 * NUM_SAMPLES))(params)
    mean = jax.grad(lambda p: optax.l2_loss(x @ p, y).mean())(params)
    assert_close(rate.for_mean_over_outputs() * mean, rate * ours, "rounding", dtype=np.float32)


def test_it_is_vmapped_and_differentiated():
    def rate(gamma):
        return mf.learning_rate(normed(mf.BatchNorm(gamma))).no_spike

    gammas = jnp.array([0.5, 1.0, 2.0])
    values, slopes = jax.vmap(jax.value_and_grad(rate))(gammas)
    step = 1e-2
    moved = jax.vmap(rate)(jnp.concatenate([gammas + step, gammas - step])).reshape(2, 3)
    assert_close(slopes, (moved[0] - moved[1]) / (2 * step), "monte_carlo", width=1e3)
    assert_close(
        values[1], mf.learning_rate(normed(mf.BatchNorm())).no_spike, "edge", dtype=np.float32
    )


def test_other_linear_optimizers():
    rates = {
        name: mf.learning_rate(SMALL_NORM, optimizer=rule)
        for name, rule in dict(
            heavy=optax.sgd(1.0, 0.9),
            nesterov=optax.sgd(1.0, 0.9, nesterov=True),
            mean=optax.chain(optax.ema(0.9, debias=False), optax.scale(-1.0)),
        ).items()
    }
    curvature = float(rates["heavy"].lambda_after_norms)
    first = (1 + math.sqrt(2)) / curvature
    assert_close(rates["heavy"].no_spike, first, "rounding", dtype=np.float32)
    assert_close(
        rates["heavy"].no_spike, mf.learning_rate(SMALL_NORM), "rounding", dtype=np.float32
    )
    assert_close(rates["nesterov"].no_spike, first / 1.9, "edge", dtype=np.float32)
    # an average of gradients is the heavy ball at a tenth of its rate
    assert_close(rates["mean"].no_spike, 10 * first, "edge", dtype=np.float32)
    assert math.isnan(rates["nesterov"].bounded)


def test_adam_measured_and_predicted_agree():
    """A wide network's gradient has the size that the theory gives it."""
    x, labels = mf.data.load("digits", num_samples=100, flatten=True)
    network = mf.mlp([400] * 2, inputs=64, outputs=10, norm=mf.BatchNorm())
    predicted = mf.learning_rate(network, x, optimizer="adam")
    measured = [
        float(mf.learning_rate(mf.build(network, rngs=seed), x, y=labels, optimizer=optax.adam))
        for seed in range(3)
    ]
    assert np.median(measured) == pytest.approx(float(predicted), rel=0.35)
    assert "Adam" in predicted.domain


def test_the_loss_sets_the_curvature(x):
    squared, crossed, binary = (
        mf.learning_rate(DIGITS, loss=loss) for loss in ("squared", "cross_entropy", "bernoulli")
    )
    assert float(crossed.lambda_max) == pytest.approx(float(squared.lambda_max) / 10)
    assert float(binary.lambda_max) == pytest.approx(float(squared.lambda_max) / 4)
    assert "no rate is a bound" in crossed.domain


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
    jacobian = jax.device_get(jax.jit(jax.jacobian(lambda p: apply(p, x)))(params))
    rows = {name: leaf.reshape(NUM_SAMPLES * 3, -1) for name, leaf in jacobian.items()}

    def largest(names):
        return np.linalg.norm(np.concatenate([rows[name] for name in names], 1), 2) ** 2 / 60

    rate = mf.learning_rate(model, x, momentum=0.8)
    assert float(rate.lambda_max) == pytest.approx(largest(rows), rel=1e-2)
    after = largest([name for name in rows if not name.startswith("first")])
    assert float(rate.lambda_after_norms) == pytest.approx(after, rel=1e-2)
    assert rate.decisive == ("last", "norm")
    assert 0 < rate.products <= 40
    by_function = mf.learning_rate(apply, x, params=params, momentum=0.8)
    assert_close(by_function, rate, "edge", dtype=np.float32)


@pytest.mark.parametrize(
    ("rate", "words"),
    [
        (lambda: mf.learning_rate(normed(mf.BatchNorm(0.2))), ("gamma 0.2",)),
        (lambda: mf.learning_rate(normed(mf.BatchNorm(), activation="tanh")), ("align",)),
    ],
)
def test_what_is_outside_the_domain_is_said(rate, words):
    assert all(word in rate().domain for word in words)
    assert "caution: " in repr(rate())


def test_narrow_networks_are_cautioned_about_the_quadratic_rate():
    network = mf.mlp([12] * 4, inputs=8, outputs=3, norm=mf.BatchNorm())
    rate = mf.learning_rate(network, num_samples=20)
    assert "the bulk reaches" in rate.quadratic_reason
    assert rate.reasons == ()
    assert "caution: quadratic is that of a wide network; the bulk" in repr(rate)
    assert mf.learning_rate(network, num_samples=20, draws=2).quadratic_reason == ""
    assert mf.learning_rate(network).quadratic_reason == ""


def test_it_is_printed_in_few_lines_and_as_html():
    text = repr(mf.learning_rate(SMALL_NORM))
    assert [line.split()[0] for line in text.splitlines()] == [
        "LearningRate",
        "quadratic",
        "no_spike",
        "bounded",
        "theory",
    ]
    assert "<table>" in mf.learning_rate(SMALL_NORM)._repr_html_()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: mf.learning_rate(VANILLA, fraction=0.0), ("fraction=0.0", "above 0")),
        (lambda x: mf.learning_rate(VANILLA, momentum=1.0), ("momentum=1.0", "outside [0, 1)")),
        (lambda x: mf.learning_rate(VANILLA, loss="mse"), ("loss='mse'", "squared")),
        (lambda x: mf.learning_rate(VANILLA, optimizer="sgdd"), ("optimizer='sgdd'", "adam")),
        (lambda x: mf.learning_rate(VANILLA, optimizer=optax.lion), ("optimizer=", "not linear")),
        (lambda x: mf.learning_rate(jnp.tanh, x), ("model=", "params=")),
        (lambda x: mf.learning_rate(3, x), ("model=", "params=")),
        (lambda x: mf.learning_rate(Plain(nnx.Rngs(0))), ("x=None", "pass a training batch")),
        (
            lambda x: mf.learning_rate(Plain(nnx.Rngs(0)), x, optimizer="adam"),
            ("y=None", "targets"),
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
