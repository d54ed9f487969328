"""A second call with other numbers compiles nothing: one row for every public entry point."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import meanfield_jax as mf

N = 12


@contextmanager
def compilations():
    """A list that grows by the name of each program that XLA compiles inside the block."""
    seen = []

    def count(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def network(turn: int) -> mf.Network:
    norm = mf.BatchNorm(1.0 + 0.1 * turn)
    return mf.mlp([16], inputs=6, outputs=3, norm=norm, weight_var=2.0 + 0.2 * turn)


def inputs(turn: int):
    return np.random.default_rng(turn).normal(size=(N, 6)).astype(np.float32)


def labels(turn: int):
    return np.random.default_rng(turn).integers(0, 3, N)


def model(turn: int):
    return mf.build(network(turn), rngs=nnx.Rngs(turn))


def calibrated(turn: int):
    found = model(turn)
    mf.calibrate(found, jnp.asarray(inputs(turn)))
    return found


def operator(turn: int):
    return mf.fisher_operator(model(turn), inputs(turn))


def plain_operator(turn: int):
    apply = _tanh_of_product
    return mf.FisherOperator(apply, jnp.full((6, 3), 0.1 + turn), inputs(turn))


def _tanh_of_product(params, x):
    return jnp.tanh(x @ params)


def block(turn: int) -> mf.Layer:
    return mf.Sequential((mf.Dense(8, 1.5 + 0.1 * turn, 0.1), mf.Activation("tanh")))


def samples(turn: int):
    return inputs(turn), labels(turn)


LOSS = optax.softmax_cross_entropy_with_integer_labels

ENTRIES = {
    "build": model,
    "analyze": lambda turn: mf.analyze(network(turn)).eta_max(0.9 - turn / 10),
    "analyze(num_samples=)": lambda turn: mf.analyze(network(turn), num_samples=30 + turn),
    "analyze, other sizes": lambda turn: mf.analyze(
        mf.mlp([16 + turn], inputs=6 + turn, outputs=3 + turn),
        num_samples=(None, 30)[turn],
    ),
    "analyze(data=)": lambda turn: mf.analyze(network(turn), data=inputs(turn)),
    "analyze(likelihood=)": lambda turn: mf.analyze(
        network(turn), data=inputs(turn), likelihood="categorical"
    ),
    "fixed_point": lambda turn: mf.fixed_point(block(turn)),
    "phase_diagram": lambda turn: mf.phase_diagram(
        block(0),
        weight_var=np.linspace(0.5, 3 + turn, 6),
        bias_var=np.array([0.05, 0.5]) + turn,
    ),
    "batch_growth": lambda turn: mf.batch_growth("tanh", 8, gamma=1.0 + turn),
    "calibrate": calibrated,
    "functional": lambda turn: mf.functional(model(turn))[0],
    "fisher_operator": lambda turn: operator(turn).shape,
    "top_eigenvalues": lambda turn: mf.top_eigenvalues(
        operator(turn), 1 + turn, tol=1e-3 / (1 + turn)
    ),
    "top_eigenvalues(vectors=True)": lambda turn: mf.top_eigenvalues(
        plain_operator(turn), 2 + turn, vectors=True
    ),
    "top_eigenvalues, frozen": lambda turn: mf.top_eigenvalues(
        mf.fisher_operator(calibrated(turn), inputs(turn), statistics="frozen")
    ),
    "op @ vector": lambda turn: operator(turn) @ np.full(operator(turn).shape[0], 0.1 + turn),
    "to_dense": lambda turn: plain_operator(turn).to_dense(),
    "trace": lambda turn: mf.trace(operator(turn), key=jax.random.key(turn)).value,
    "layer_table": lambda turn: mf.layer_table(operator(turn), tol=1e-2 / (1 + turn), num_probes=2),
    "spectral_density": lambda turn: mf.spectral_density(
        operator(turn), num_steps=5, key=jax.random.key(turn)
    ).density(np.linspace(0, 10 + turn, 50)),
    "drawn_eigenvalues": lambda turn: mf.drawn_eigenvalues(
        network(turn), inputs(turn), draws=1 + turn, k=1 + turn, tol=1e-2 / (1 + turn), seed=turn
    ),
    "validate": lambda turn: mf.validate(
        network(turn), inputs(turn), draws=1, gammas=[1.0 + turn], seed=turn
    ),
    "validate, trained": lambda turn: mf.validate(
        network(turn),
        inputs(turn),
        y=labels(turn),
        theory="data",
        draws=1,
        num_steps=10 + turn,
        seed=turn,
    ),
    "measured_boundary": lambda turn: mf.measured_boundary(
        network(turn),
        inputs(turn),
        jax.nn.one_hot(labels(turn), 3),
        draws=1,
        num_steps=10 + turn,
        tol=0.5,
        momentum=0.9 - turn / 10,
    ),
    "compare": lambda turn: mf.compare(
        network(turn),
        samples(turn),
        test=samples(turn + 2),
        norms=["batch"],
        learning_rates=[0.1 + turn],
        batch_sizes=[4],
        epochs=1,
        seeds=1,
        draws=1,
    ),
    "learning_rate": lambda turn: mf.learning_rate(
        network(turn), momentum=0.9 - turn / 10, fraction=0.5 - turn / 10
    ),
    "learning_rate of a model": lambda turn: mf.learning_rate(
        model(turn), inputs(turn), momentum=0.9 - turn / 10
    ),
    "suggest_schedule": lambda turn: mf.suggest_schedule(
        network(turn), num_steps=10 + turn, warmup=2 + turn
    )(3 + turn),
    "suggest_schedule of a model": lambda turn: mf.suggest_schedule(
        model(turn),
        inputs(turn),
        batches=[samples(turn)],
        num_steps=10 + turn,
        warmup=2 + turn,
        momentum=0.9 - turn / 10,
    ),
    "train": lambda turn: mf.train(
        network(turn), samples(turn), learning_rate=0.1 + turn, epochs=2, batch_size=4, seed=turn
    ),
    "tune": lambda turn: mf.tune(
        network(turn), mf.objectives.target_eta_max(0.1 + turn / 10), max_steps=3 + turn
    ),
    "tune, a rate": lambda turn: mf.tune(
        network(turn), mf.objectives.target_rate(0.1 + turn / 10), max_steps=3 + turn
    ),
    "tune, sharpness": lambda turn: mf.tune(
        network(turn),
        mf.objectives.sharpness(1.0 + turn),
        bounds={"gamma": (0.1, 5.0 + turn)},
        max_steps=3 + turn,
    ),
    "diagnostics.activations": lambda turn: mf.diagnostics.activations(model(turn), inputs(turn)),
    "diagnostics.moments": lambda turn: mf.diagnostics.moments(
        mf.diagnostics.activations(model(turn), inputs(turn))
    ),
    "diagnostics.gradients": lambda turn: mf.diagnostics.gradients(
        model(turn), LOSS, inputs(turn), labels(turn)
    ),
    "diagnostics.input_dependence": lambda turn: mf.diagnostics.input_dependence(
        model(turn), LOSS, inputs(turn), labels(turn)
    ),
    "diagnostics.gradient_noise": lambda turn: mf.diagnostics.gradient_noise(
        model(turn),
        LOSS,
        inputs(turn),
        labels(turn),
        learning_rate=0.1 + turn,
        batch_size=4,
        num_batches=5,
        seed=turn,
    ),
}


@pytest.mark.parametrize("name", ENTRIES)
def test_a_second_call_with_other_numbers_compiles_nothing(name):
    jax.block_until_ready(jax.tree.leaves(ENTRIES[name](0)))
    with compilations() as compiled:
        ENTRIES[name](1)
    assert not compiled


def traced(monkeypatch, call) -> int:
    """How often a call goes through the rule of each Dense layer."""
    counts, rule = [], mf.Dense.rule

    def counted(self, kernel):
        counts.append(self)
        return rule(self, kernel)

    monkeypatch.setattr(mf.Dense, "rule", counted)
    call()
    return len(counts)


def test_theory_traces_the_network_twice(monkeypatch):
    # of a depth that no other test has, so that nothing was traced before
    network = mf.mlp([7] * 5, inputs=6, outputs=3, norm=mf.BatchNorm())
    for given in (dict(num_samples=9), dict(data=inputs(0))):
        assert traced(monkeypatch, lambda given=given: mf.analyze(network, **given)) == 2 * 6
        monkeypatch.undo()
