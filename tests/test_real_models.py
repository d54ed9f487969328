"""Architectures that people train, measured: against dense Jacobians, whole and in batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import real_models
from flax import nnx
from tolerance import assert_close

import meanfield_jax as mf

RNG = np.random.default_rng(0)


def images(count: int, side: int) -> np.ndarray:
    return RNG.normal(size=(count, side, side, 3)).astype(np.float32)


TOKENS = {
    "tokens": RNG.integers(0, 11, (5, 6)),
    "mask": np.arange(6)[None] < np.array([6, 4, 5, 1, 3])[:, None],
}
SEQUENCES = RNG.normal(size=(6, 5, 3)).astype(np.float32)


def gram(apply, params, x) -> np.ndarray:
    """The dual by a dense Jacobian."""

    @jax.jit
    def rows(params):
        found = jax.jacrev(lambda p: apply(p, x).reshape(-1))(params)
        return jnp.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(found)], 1)

    j = np.asarray(rows(params), np.float64)
    return j @ j.T / len(jax.tree.leaves(x)[0])


def by_hand(model, x):
    """The model's function with dropout off, by Flax alone."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "deterministic"):
            module.deterministic = True
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def apply(params, x):
        module = nnx.merge(graphdef, params, rest, copy=True)
        return module(**x) if isinstance(x, dict) else module(x)

    return apply, params


MODELS = {
    "gru": (real_models.GRU, SEQUENCES),
    "vision transformer": (real_models.VisionTransformer, images(4, 8)),
    "language model": (real_models.LanguageModel, TOKENS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_they_are_measured_right_whole_and_in_batches(name):
    create, x = MODELS[name]
    model = create(nnx.Rngs(0))
    expected = gram(*by_hand(nnx.clone(model), x), x)
    for batch_size in (None, 2):
        op = mf.fisher_operator(model, x, batch_size=batch_size)
        found = op.dual.to_dense()
        assert_close(found, expected, "rounding", 30 * np.abs(expected).max(), dtype=np.float32)


def by_one_product(apply, params, x, op) -> None:
    """J J^T u of a random u, by JAX's own vjp and jvp."""
    u = RNG.normal(size=op.output_shape).astype(np.float32)

    @jax.jit
    def product(params):
        gradient = jax.vjp(lambda p: apply(p, x), params)[1](u)
        return jax.jvp(lambda p: apply(p, x), (params,), gradient)[1]

    expected = np.asarray(product(params)).ravel() / len(x)
    found = op.dual @ u.ravel()
    assert_close(found, expected, "edge", np.abs(expected).max(), dtype=np.float32)


@pytest.mark.slow
def test_a_resnet_in_nnx():
    x, model = images(4, 8), real_models.ResNet18(nnx.Rngs(0), width=4)
    op = mf.fisher_operator(model, x)
    by_one_product(*by_hand(nnx.clone(model), x), x, op)
    assert op.num_parameters == 44_622


@pytest.mark.slow
def test_a_resnet_in_linen():
    x, module = images(4, 8), real_models.LinenResNet18(width=4)
    variables = jax.jit(module.init, static_argnames="train")(jax.random.key(0), x, train=True)
    op = mf.FisherOperator.from_linen(module, variables, x)

    def apply(params, x):
        changed = variables | {"params": params}
        return module.apply(changed, x, train=True, mutable=["batch_stats"])[0]

    by_one_product(apply, variables["params"], x, op)
    assert op.num_parameters == 44_622
    table = mf.layer_table(op.block("LinenBlock_7"), tol=0.1, num_probes=2)
    assert list(table.layer.values) == [
        f"LinenBlock_7/{name}_{index}" for name in ("BatchNorm", "Conv") for index in range(2)
    ]
