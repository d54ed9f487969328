"""Losses of a user's own: their curvature against the definition, and their learning rates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from networks import DIGITS, SMALL_NORM
from tolerance import assert_close

import meanfield_jax as mf

NUM_SAMPLES, OUTPUTS = 12, 3


def squared(outputs, y):
    return 0.5 * jnp.sum((outputs - y) ** 2, -1)


def softmax(outputs, y):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, y)


def logistic(outputs, y):
    return optax.sigmoid_binary_cross_entropy(outputs, y).sum(-1)


def huber(outputs, y):
    return optax.huber_loss(outputs, y, delta=0.7).sum(-1)


def poisson(outputs, y):
    return jnp.sum(jnp.exp(outputs) - y * outputs, -1)


def correlated(outputs, y):
    """Of outputs whose errors are not independent."""
    residual = outputs - y
    return 0.5 * jnp.sum(residual**2, -1) + 0.4 * residual[:, 0] * residual[:, 1]


LOSSES = dict(
    squared=squared,
    softmax=softmax,
    logistic=logistic,
    huber=huber,
    poisson=poisson,
    correlated=correlated,
    mean_of_poisson=lambda outputs, y: poisson(outputs, y).mean(),
)
LIKELIHOODS = dict(squared="gaussian", softmax="categorical", logistic="bernoulli")


def apply(params, x):
    return jnp.tanh(x @ params["in"]) @ params["out"]


def problem():
    """Parameters, inputs, and targets of each loss, in float64."""
    rng = np.random.default_rng(0)
    params = {"in": rng.normal(size=(4, 5)), "out": rng.normal(size=(5, OUTPUTS))}
    targets = dict.fromkeys(LOSSES, rng.normal(size=(NUM_SAMPLES, OUTPUTS)))
    counts = rng.integers(0, 4, (NUM_SAMPLES, OUTPUTS)).astype(float)
    targets |= dict(
        softmax=rng.integers(0, OUTPUTS, NUM_SAMPLES),
        logistic=rng.integers(0, 2, (NUM_SAMPLES, OUTPUTS)).astype(float),
        poisson=counts,
        mean_of_poisson=counts,
    )
    return params, rng.normal(size=(NUM_SAMPLES, 4)), targets


def by_definition(loss, params, x, y):
    """(1/n) sum_i J_i^T H_i J_i, from Jacobians and Hessians of single samples."""
    flat, unravel = ravel_pytree(params)
    total = 0.0
    for i in range(NUM_SAMPLES):

        def outputs(vector, row=x[i : i + 1]):
            return apply(unravel(vector), row)[0]

        def of_sample(values, target=y[i : i + 1]):
            return jnp.sum(loss(values[None], target))

        jacobian = jax.jacobian(outputs)(flat)
        total += jacobian.T @ jax.hessian(of_sample)(outputs(flat)) @ jacobian
    return total / NUM_SAMPLES


@pytest.mark.parametrize("batch_size", [None, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_the_curvature_of_a_loss_is_that_of_its_definition(name, batch_size, x64):
    params, x, targets = problem()
    loss, y = LOSSES[name], targets[name]
    expected = by_definition(loss, params, x, y)
    op = mf.FisherOperator(apply, params, x, batch_size=batch_size).with_loss(loss, y)
    scale = np.abs(expected).max()
    # a Hessian's square root loses half of the digits of its small eigenvalues
    assert_close(op.to_dense(), expected, "rounding", scale)
    values = np.linalg.eigvalsh(expected)[::-1]
    assert_close(np.linalg.eigvalsh(op.dual.to_dense())[::-1][:5], values[:5], "rounding", scale)
    assert_close(mf.top_eigenvalues(op, 2, tol=1e-9).eigenvalues, values[:2], "edge")
    if name in LIKELIHOODS:
        fisher = mf.FisherOperator(apply, params, x, LIKELIHOODS[name])
        assert_close(op.to_dense(), fisher.to_dense(), "rounding", scale)
    assert "with_loss" in repr(op)


@pytest.mark.slow
def test_a_normalized_model_has_it_too():
    """With BatchNorm, and dense layers that are treated apart."""
    x, labels = mf.data.load("digits", num_samples=60, flatten=True)
    model = mf.build(DIGITS, rngs=nnx.Rngs(0))
    op, fisher = (
        mf.fisher_operator(model, x, likelihood=kind) for kind in ("gaussian", "categorical")
    )
    assert op.dense
    own, named = op.with_loss(softmax, labels), fisher
    found, expected = (mf.top_eigenvalues(each, 3, tol=1e-4).eigenvalues for each in (own, named))
    assert_close(found, expected, "edge", dtype=np.float32)
    last = "layers/3"
    found, expected = (
        mf.top_eigenvalues(each.block(last), 1, tol=1e-4).eigenvalues for each in (own, named)
    )
    assert_close(found, expected, "edge", dtype=np.float32)


@pytest.mark.slow
def test_the_rate_of_the_squared_loss_is_the_same_by_name_and_as_a_function():
    x, labels = mf.data.load("digits", num_samples=60, flatten=True)
    y = jax.nn.one_hot(labels, 10)
    for model in (DIGITS, mf.build(DIGITS, rngs=nnx.Rngs(0))):
        named, own = mf.learning_rate(model, x), mf.learning_rate(model, x, y=y, loss=squared)
        for rate in ("quadratic", "no_spike"):
            assert_close(getattr(own, rate), getattr(named, rate), "edge", dtype=np.float32)
        assert np.isnan(float(own.bounded))
        assert "for the loss (1/n) sum squared(f, y)" in repr(own)
        assert "tested on the squared loss" in own.domain


def test_a_loss_twice_as_large_has_half_the_rate():
    x, labels = mf.data.load("digits", num_samples=60, flatten=True)
    model = mf.build(DIGITS, rngs=nnx.Rngs(0))
    one = mf.learning_rate(model, x, y=labels, loss=softmax)
    two = mf.learning_rate(model, x, y=labels, loss=lambda f, y: 2 * softmax(f, y))
    assert float(two) == pytest.approx(float(one) / 2, rel=2e-2)
    named = mf.learning_rate(model, x, loss="cross_entropy")
    assert_close(one.lambda_max, named.lambda_max, "edge", dtype=np.float32)
    of_network = mf.learning_rate(DIGITS, x, y=labels, loss=softmax)
    named = mf.learning_rate(DIGITS, x, loss="cross_entropy")
    assert_close(of_network.lambda_max, named.lambda_max, "edge", dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["poisson", "huber"])
def test_training_on_another_loss_does_not_spike_at_the_rate(name):
    """The first step doubles the loss of the steepest direction at most; three draws."""
    loss = LOSSES[name]
    x, labels = mf.data.load("digits", num_samples=100, flatten=True)
    y = jax.nn.one_hot(labels, 10)
    network = mf.mlp([100] * 3, inputs=64, outputs=10, norm=mf.BatchNorm())
    for seed in range(3):
        model = mf.build(network, rngs=seed)
        apply, params = mf.functional(model)
        rate = mf.learning_rate(model, x, y=y, loss=loss)
        rule = optax.sgd(rate, 0.9)

        def objective(params, apply=apply):
            return loss(apply(params, x), y).mean()

        def step(carry, _, rule=rule, objective=objective):
            params, memory = carry
            value, slope = jax.value_and_grad(objective)(params)
            updates, memory = rule.update(slope, memory, params)
            return (optax.apply_updates(params, updates), memory), value

        _, losses = jax.jit(lambda start, step=step: jax.lax.scan(step, start, None, 60))(
            (params, rule.init(params))
        )
        least = float(np.min(losses))
        assert float(np.max(losses)) - least < 2 * (float(losses[0]) - least)


def test_a_schedule_follows_another_loss():
    x, labels = mf.data.load("digits", num_samples=60, flatten=True)
    y = jax.nn.one_hot(labels, 10)
    model, options = mf.build(DIGITS, rngs=0), dict(num_steps=40, warmup=8)
    named = mf.suggest_schedule(model, x, batches=[(x, y)], **options)
    own = mf.suggest_schedule(model, x, y=y, batches=[(x, y)], loss=squared, **options)
    assert_close(own.peak, named.peak, "edge", dtype=np.float32)


X = np.random.default_rng(1).normal(size=(NUM_SAMPLES, 5)).astype(np.float32)
Y = np.eye(2)[np.arange(NUM_SAMPLES) % 2]


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda f, y: -squared(f, y), ("not convex at these outputs", "-1")),
        (lambda f, y: jnp.mean((f - f.mean(0, keepdims=True)) ** 2), ("outputs of others",)),
        (lambda f, y: (f - y) ** 2, ("a loss for each sample, or their mean", "(12,)")),
        (lambda f, y: f @ y, ("fails on outputs (12, 2) and targets (12, 2)",)),
        (lambda f, y: "none", ("fails on outputs", "str")),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused(loss, words):
    with pytest.raises(mf.SpecError) as error:
        mf.learning_rate(SMALL_NORM, X, y=Y, loss=loss)
    assert all(word in str(error.value) for word in words), str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mf.learning_rate(SMALL_NORM, loss=squared), ("x=None", "depends on the targets")),
        (lambda: mf.learning_rate(SMALL_NORM, X, loss=squared), ("y=None", "its targets y")),
        (
            lambda: mf.learning_rate(mf.build(SMALL_NORM, rngs=0), X, loss=squared),
            ("y=None", "pass those of the batch x"),
        ),
        (lambda: mf.learning_rate(SMALL_NORM, loss=3), ("loss=3", "or a function")),
    ],
)
def test_what_a_loss_needs_is_said(call, words):
    with pytest.raises(mf.SpecError) as error:
        call()
    assert all(word in str(error.value) for word in words), str(error.value)
