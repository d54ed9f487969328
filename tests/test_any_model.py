"""The measurement on random models of all kinds, each against its dense Jacobian in float64.

``python tests/test_any_model.py 300`` tries that many and says how many were wrong.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
from flax import nnx

import meanfield_jax as mf

LIKELIHOODS = ("gaussian", "categorical", "bernoulli")


def doubled(tree):
    """Floating-point arrays in float64."""

    def cast(leaf):
        return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast, tree)


def by_hand(model: nnx.Module, x, output) -> tuple[np.ndarray, np.ndarray]:
    """The outputs (n, c) and the Jacobian (n, c, P) in float64, by Flax and JAX alone."""
    copy = nnx.clone(model)
    copy.train()
    for _, module in nnx.iter_modules(copy):
        if isinstance(module, nnx.Dropout):
            module.deterministic = True
    graphdef, params, rest = nnx.split(copy, nnx.Param, ...)
    rest, x = doubled(rest), doubled(x)

    def outputs(params):
        module = nnx.merge(graphdef, params, rest, copy=True)
        found = module(**x) if isinstance(x, dict) else module(*x if isinstance(x, tuple) else (x,))
        found = found if output is None else found[output]
        return found.reshape(random_models.NUM_SAMPLES, -1)

    params = doubled(params)
    jacobian = jax.jacrev(outputs)(params)
    rows = [np.asarray(leaf).reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jacobian)]
    return np.asarray(outputs(params)), np.concatenate(rows, -1)


def expected_of(outputs: np.ndarray, jacobian: np.ndarray, likelihood: str, classes: int):
    """F by its definition, (P, P)."""
    n, count, size = jacobian.shape
    groups = jacobian.reshape(n, count // classes, classes, size)
    logits = outputs.reshape(n, count // classes, classes)
    if likelihood == "gaussian":
        middle = np.broadcast_to(np.eye(classes), (*logits.shape, classes))
    elif likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-logits))
        middle = (p * (1 - p))[..., None] * np.eye(classes)
    else:
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        middle = p[..., None] * np.eye(classes) - p[..., None] * p[..., None, :]
    return np.einsum("ntka,ntkl,ntlb->ab", groups, middle, groups) / n


def check(seed: int) -> str:
    """One random model, its options drawn, too; returns what it was. Raises if it is wrong."""
    blocks, stem, head, rng = random_models.draw(seed)
    double = bool(rng.random() < 0.5)
    output = dict(tuple=1, dict="logits").get(head)
    coupled = any(name in random_models.COUPLED for name in blocks)
    likelihood = str(rng.choice(LIKELIHOODS))
    batch_size = None if coupled else rng.choice(np.array([None, 2, 3], dtype=object))
    said = f"{seed}: {stem}, {', '.join(blocks)}, {head}, {likelihood}, {batch_size}, {double}"
    with jax.enable_x64():
        model = random_models.Model(stem, blocks, head, nnx.Rngs(seed))
        x = random_models.inputs(stem, rng)
        if not double:
            x = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == float else a, x)
        else:
            nnx.update(model, doubled(nnx.state(model)))
        outputs, jacobian = by_hand(model, x, output)
        shape = outputs.shape[1]
        classes = dict(scalar=1, column=1, positions=2).get(head, shape)
        if likelihood == "categorical" and classes == 1:
            with pytest.raises(mf.SpecError, match="use likelihood='bernoulli'"):
                _ = mf.fisher_operator(model, x, likelihood=likelihood, output=output).shape
            return said
        if coupled:
            with pytest.raises(mf.SpecError, match=r"batch_size=3: .* whole batch"):
                mf.fisher_operator(model, x, batch_size=3, output=output)
        op = mf.fisher_operator(
            model, x, likelihood=likelihood, batch_size=batch_size, output=output
        )
        expected = expected_of(outputs, jacobian, likelihood, classes)
        size = np.abs(expected).max()
        # Flax's attention is in float32 in part: its jacrev and jacfwd differ by 1e-7
        exact = 1e-6 if "attention" in blocks else 1e-8
        tolerance = (exact if double else 2e-4) * size
        assert op.dtype == (jnp.float64 if double else jnp.float32), said
        vectors = rng.normal(size=(2, len(expected)))
        found = np.stack([np.asarray(op @ vector) for vector in vectors])
        difference = np.abs(found - vectors @ expected).max()
        assert difference <= tolerance * np.sqrt(len(expected)) * 4, (said, difference, size)
        eigenvalues = np.linalg.eigvalsh(expected)[::-1]
        dual = np.linalg.eigvalsh(np.asarray(op.dual.to_dense()))[::-1]
        count = min(len(dual), len(eigenvalues))
        difference = np.abs(dual[:count] - eigenvalues[:count]).max()
        assert difference <= 4 * tolerance, (said, difference, size)
    return said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types:FutureWarning")
@pytest.mark.parametrize("seed", range(16))
def test_random_models(seed):
    with jax.numpy_rank_promotion("allow"):  # as users' models do
        check(seed)


if __name__ == "__main__":
    count, wrong = int(sys.argv[1]), 0
    for seed in range(count):
        if seed % 20 == 0:
            jax.clear_caches()  # each program takes memory maps, of which a process has 65,530
        try:
            print(check(seed), flush=True)
        except Exception as error:
            wrong += 1
            print(f"{seed} WRONG: {type(error).__name__}: {str(error)[:300]}", flush=True)
    print(f"{wrong} of {count} wrong")
    sys.exit(wrong > 0)
