"""The learning rates of a model, by Lanczos."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.generic import couples_samples, layers_after_norms
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.loss import LOSSES, Loss, checked_targets, mean_loss
from meanfield_jax.empirical.model import path_name
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.empirical.trace import trace
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.experiments.rate_result import LearningRate, cautions, name_of, rates_by_rule
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.rates import ALIGNED, CAREFUL, LITTLE_IN_COMMON, NO_NORM, Rule

PROBES = 6
"""Number of probes of a trace, good to some 20 %."""

TOLERANCE = 1e-2
"""Relative accuracy of measured eigenvalues; the rule itself is less accurate."""


def measured(
    model: Any, params: Any, x: Any, y: Any, rule: Rule | None, loss: Loss, statistics: str
) -> LearningRate:
    """The rates of a model, by Lanczos."""
    if x is None:
        raise problem(DataError, "x", x, "a model is measured on data", "pass a training batch")
    operator = operator_of(model, params, x, y, loss, statistics)
    layers = layers_after_norms(operator)
    whole = top_eigenvalues(operator, tol=TOLERANCE).raise_if_failed()
    lambda_max = whole.eigenvalues[0]
    eta_max(lambda_max)  # refuses 0

    def by_signs() -> Array:
        scaled = _preconditioned(operator, layers, y, loss)
        return 2 / top_eigenvalues(scaled, tol=TOLERANCE).raise_if_failed().eigenvalues[0]

    after = _after_norms(operator, layers, lambda_max)
    return LearningRate(
        **_rates_of(operator, rule, loss, lambda_max, after, by_signs),
        lambda_max=lambda_max,
        loss=name_of(loss),
        source="measured",
        num_outputs=int(np.prod(operator.output_shape[1:])),
        decisive=layers,
        products=int(whole.num_matvecs) + after.products,
    )


class _After(NamedTuple):
    """What is measured of the parameters that no normalization follows.

    Attributes:
        lambda_max: The eigenvalue that decides from a random start, ().
        products: How many products that took.
        notes: Why the rates may be wrong.
    """

    lambda_max: Array
    products: int
    notes: tuple[str, ...]


def _after_norms(
    operator: FisherOperator, layers: tuple[str, ...], lambda_max: Array | None
) -> _After:
    """Measures the eigenvalue that decides; without a norm it is ``lambda_max``, if known."""
    everything = all(any(_inside(path, layer) for layer in layers) for path in operator.paths)
    if everything and lambda_max is not None:
        return _After(lambda_max, 0, (NO_NORM,))
    block = operator.block(*layers)
    part = top_eigenvalues(block, tol=TOLERANCE, vectors=True).raise_if_failed()
    found = _After(part.eigenvalues[0], int(part.num_matvecs), (NO_NORM,) * everything)
    assert part.eigenvectors is not None
    if not everything and _common(block, part.eigenvectors[0]) < 0.5:
        aligned = trace(block, num_probes=PROBES).raise_if_failed()
        outputs = np.prod(operator.output_shape[1:])
        largest = jnp.maximum(found.lambda_max, ALIGNED * aligned.value / outputs)
        products = found.products + int(aligned.num_matvecs)
        found = _After(largest, products, (LITTLE_IN_COMMON,))
    if float(found.lambda_max) <= 0:
        cause = "no curvature: the outputs do not depend on the last layers' parameters"
        value = float(found.lambda_max)
        raise problem(SpecError, "lambda_after_norms", value, cause, "check for weights of 0")
    return found


def _rates_of(
    operator: FisherOperator,
    rule: Rule | None,
    loss: Loss,
    lambda_max: Array,
    after: _After,
    by_signs: Callable[[], Array] | None = None,
) -> dict[str, Any]:
    """The fields of a result that follow from what was measured of a model."""
    over_batch = bool(couples_samples(operator))
    found = rates_by_rule(rule, loss, lambda_max, after.lambda_max, over_batch, by_signs)
    return dict(
        **found,
        recommended=(CAREFUL if LITTLE_IN_COMMON in after.notes else 1.0) * found["no_spike"],
        lambda_after_norms=after.lambda_max,
        reasons=(*after.notes, *cautions(rule, loss)),
    )


def measured_again(
    rate: LearningRate, operator: FisherOperator, rule: Rule, loss: Loss, steps: int
) -> LearningRate:
    """The rates of a model whose parameters have changed.

    Only the parameters after the norms are measured: ``lambda_max`` and ``quadratic`` stay as they
    were, unless there is no norm.

    Args:
        rate: What :func:`learning_rate` returned before.
        operator: The operator of the model as it is now.
        rule: That of the optimizer.
        loss: The loss.
        steps: The number of steps since then.

    Returns:
        The rates of the model as it is now, with a fraction of 1.
    """
    start = time.perf_counter()
    after = _after_norms(operator, rate.decisive, None)
    lambda_max = after.lambda_max if NO_NORM in after.notes else rate.lambda_max
    return dataclasses.replace(
        rate,
        **_rates_of(operator, rule, loss, lambda_max, after),
        lambda_max=lambda_max,
        source=f"measured after {steps} steps",
        products=rate.products + after.products,
        seconds=rate.seconds + time.perf_counter() - start,
    )


def operator_of(
    model: Any, params: Any, x: Any, y: Any, loss: Loss, statistics: str
) -> FisherOperator:
    """The curvature of the loss of a model."""
    if isinstance(loss, str):
        return _fisher(model, params, x, LOSSES[loss], statistics)
    if y is None:
        cause = "the curvature of a loss that is a function depends on the targets"
        raise problem(SpecError, "y", y, cause, "pass those of the batch x")
    return _fisher(model, params, x, "gaussian", statistics).with_loss(loss, y)


def _fisher(model: Any, params: Any, x: Any, likelihood: str, statistics: str) -> FisherOperator:
    """The Fisher matrix of a model."""
    if params is None:
        if not isinstance(model, nnx.Module):
            cause = "neither a Network nor a Flax NNX module, and there are no params"
            remedy = "pass one of these, or apply with params="
            raise problem(SpecError, "model", type(model).__name__, cause, remedy)
        return fisher_operator(model, x, statistics=statistics, likelihood=likelihood)
    operator = FisherOperator(model, params, x, likelihood)
    if statistics == "frozen" and couples_samples(operator):
        cause = "the function normalizes over the batch"
        remedy = "pass the function in evaluation mode, or statistics='batch'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    return operator


_change = jax.jit(FisherOperator.change)


def _common(block: FisherOperator, vector: Array) -> float:
    """How much of the outputs' change along an eigenvector all samples have in common, 0 to 1."""
    found = _change(block, vector)
    change = np.asarray(found, float).reshape(block.num_samples, -1)
    return float(len(change) * np.sum(change.mean(0) ** 2) / np.sum(change**2))


def _inside(path: str, layer: str) -> bool:
    """Whether an array of parameters belongs to a layer."""
    return path == layer or path.startswith(layer + "/")


def _preconditioned(
    operator: FisherOperator, layers: tuple[str, ...], y: Any, loss: Loss
) -> FisherOperator:
    """P^(-1/2) F P^(-1/2) for these layers, where P is the gradient's rms in each array."""
    if y is None:
        remedy = "pass the batch's targets"
        raise problem(SpecError, "y", y, "Adam's first steps depend on the gradient", remedy)
    y = checked_targets(loss, y, operator.output_shape, operator.dtype)

    def value(params: Any) -> Array:
        return mean_loss(loss, operator.evaluate(params, operator.x), y)

    slopes = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(value))(operator.params))
    sizes = {path_name(path): jnp.sqrt(jnp.mean(slope**2)) for path, slope in slopes}
    kept = {path: size for path, size in sizes.items() if any(_inside(path, la) for la in layers)}
    return operator.rescaled({path: 1 / jnp.sqrt(size) for path, size in kept.items()})
