"""The stability limit of linear optimizers: closed forms, real descents, refusals."""

import jax
import jax.numpy as jnp
import optax
import pytest

import meanfield_jax as mf

# a pair of complex eigenvalues: the polynomial (s - 1) (s - 1/2)^2 + z s^2 has roots of size 1
TWO_TRACES = 0.75

LINEAR = {
    "sgd": (optax.sgd(1.0), 2.0),
    "heavy ball": (optax.sgd(1.0, 0.9), 3.8),
    "nesterov": (optax.sgd(1.0, 0.9, nesterov=True), 2 * 1.9 / 2.8),
    "a function": (optax.sgd, 2.0),
    "half a rate": (optax.sgd(0.5, 0.9), 7.6),
    "ema": (optax.chain(optax.ema(0.9, debias=False), optax.scale(-1.0)), 38.0),
    # the decay is added to the curvature
    "decay": (optax.chain(optax.add_decayed_weights(0.3), optax.sgd(1.0, 0.9)), 3.5),
    "two traces": (optax.chain(optax.trace(0.5), optax.trace(0.5), optax.scale(-1.0)), TWO_TRACES),
}


def largest_after(optimizer, curvature, steps=4000) -> float:
    """The size of a weight after many steps from 1 on a quadratic."""

    def step(state, _):
        weight, memory = state
        update, memory = optimizer.update(curvature * weight, memory, weight)
        return (weight + update, memory), None

    start = jnp.ones(())
    (weight, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
    return abs(float(weight))


@pytest.mark.parametrize("name", LINEAR)
def test_limits_are_those_of_closed_forms_and_of_real_descents(name, x64):
    optimizer, expected = LINEAR[name]
    limit = float(mf.stability_limit(optimizer))
    assert limit == pytest.approx(expected, rel=1e-9)
    optimizer = optimizer(1.0) if optimizer is optax.sgd else optimizer
    assert largest_after(optimizer, 0.98 * limit) < 1e-2
    assert not largest_after(optimizer, 1.02 * limit) < 1e2


def test_it_is_differentiable_in_the_momentum_and_compiles():
    def limit(momentum):
        return mf.stability_limit(optax.sgd(1.0, momentum, nesterov=True))

    slope = jax.jit(jax.grad(limit))(0.9)
    # of 2 (1 + mu) / (1 + 2 mu)
    assert float(slope) == pytest.approx(-2 / 2.8**2, rel=1e-4)


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (optax.adam(1.0), "not linear"),
        (optax.chain(optax.clip(1.0), optax.sgd(1.0)), "not linear"),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), "not linear"),
        (optax.sgd(optax.linear_schedule(1.0, 0.0, 10)), "changes with the steps"),
        (optax.chain(optax.ema(0.9), optax.scale(-1.0)), "changes with the steps"),
        (optax.sgd(-1.0), "not stable up to a largest curvature"),
        (optax.lion(1.0), "not linear"),
        ("sgd", "optimizer"),
        (jnp.tanh, "makes no optimizer"),
        (optax.lbfgs(), "optimizer="),
    ],
)
def test_rules_without_a_limit_are_refused(optimizer, words):
    with pytest.raises(mf.SpecError, match=words):
        mf.stability_limit(optimizer)


@pytest.mark.slow
def test_a_network_near_its_targets_blows_up_at_the_limit(x64):
    """Nesterov's limit, where that of the heavy ball would be 2.8 times too large."""
    network = mf.mlp([64], inputs=8, outputs=3, weight_var=2.0, bias_var=0.0)
    apply, params = mf.functional(mf.build(network, rngs=0))
    x = jax.random.normal(jax.random.key(0), (40, 8))
    target = apply(params, x) + 1e-4 * jax.random.normal(jax.random.key(1), (40, 3))
    operator = mf.FisherOperator(apply, params, x)
    lambda_max = float(mf.top_eigenvalues(operator).eigenvalues[0])

    def loss(params):
        return jnp.sum((apply(params, x) - target) ** 2) / (2 * len(x))

    def last_over_first(fraction):
        limit = mf.stability_limit(optax.sgd(1.0, 0.9, nesterov=True))
        rule = optax.sgd(fraction * limit / lambda_max, 0.9, nesterov=True)

        def step(state, _):
            params, memory = state
            updates, memory = rule.update(jax.grad(loss)(params), memory, params)
            return (optax.apply_updates(params, updates), memory), None

        (after, _), _ = jax.lax.scan(step, (params, rule.init(params)), None, 40)
        return float(loss(after) / loss(params))

    assert last_over_first(0.9) < 1
    assert not last_over_first(1.1) < 100
