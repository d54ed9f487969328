"""The learning rates of a specification, by theory or from drawn networks."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.checks import check_data
from meanfield_jax.empirical.draws import drawn_eigenvalues
from meanfield_jax.empirical.loss import Loss, curvature
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.rate_result import LearningRate, cautions, name_of, rates_by_rule
from meanfield_jax.network import Network, normalizes_over_batch
from meanfield_jax.theory.after_norms import AfterNorms, after_norms
from meanfield_jax.theory.analyze import Theory, analyze
from meanfield_jax.theory.rates import (
    Rule,
    decisive_eigenvalue,
    first_rate,
    reasons,
    sign_descent,
)

INFORMATION = dict(
    squared=lambda num_outputs: 1.0,
    cross_entropy=lambda num_outputs: 1 / num_outputs,
    bernoulli=lambda num_outputs: 0.25,
)
"""Curvature of each loss in units of the squared one's, where all outputs are equal."""


def predicted(
    network: Network,
    x: Any,
    y: Any,
    rule: Rule | None,
    loss: Loss,
    statistics: str,
    num_samples: Any,
    draws: int | None,
) -> LearningRate:
    """The rates of a specification, by theory or from drawn networks."""
    given: dict[str, Any] = dict(data=x, statistics=statistics, num_samples=num_samples)
    theory = analyze(network, **given, draws=draws)
    if not isinstance(theory.status, Tracer):
        theory.raise_if_failed()
    dtype = theory.kernel.dtype
    batch = None if x is None else check_data(x).astype(dtype)
    after = after_norms(network, batch, statistics, num_samples)
    information = _information(loss, network.num_outputs, batch, y)
    lambda_max = information * theory.fisher.lambda_max
    drawn = None if draws is None else _drawn_after(network, after, draws, given)
    lambda_after = information * decisive_eigenvalue(theory, after, drawn)
    over_batch = statistics == "batch" and normalizes_over_batch(network.body)
    found = (lambda_max, lambda_after, over_batch)
    rates = rates_by_rule(rule, loss, *found, lambda: sign_descent(theory))
    traced = isinstance(lambda_after, Tracer)
    return LearningRate(
        recommended=first_rate(theory, rates),
        **rates,
        lambda_max=lambda_max,
        lambda_after_norms=lambda_after,
        loss=name_of(loss),
        source="theory" if draws is None else f"{draws} drawn networks",
        num_outputs=network.num_outputs,
        decisive=() if traced else after.paths,
        reasons=() if traced else (*reasons(theory, after), *cautions(rule, loss)),
        quadratic_reason="" if traced else _outside(theory),
    )


def _information(loss: Loss, num_outputs: int, x: Array | None, y: Any) -> Any:
    """The largest eigenvalue of the loss's mean curvature where all outputs are 0."""
    if isinstance(loss, str):
        return INFORMATION[loss](num_outputs)
    for name, value in dict(x=x, y=y).items():
        if value is None:
            cause = "the curvature of a loss that is a function depends on the targets"
            remedy = "pass a batch x and its targets y, or the name of a loss"
            raise problem(SpecError, name, value, cause, remedy)
    assert x is not None
    mean = curvature(loss, jnp.zeros((len(x), num_outputs), x.dtype), y).mean(0)
    return jnp.linalg.eigvalsh(mean)[-1]


def _outside(theory: Theory) -> str:
    """Why lambda_max of a network, or of several, cannot be trusted; "" if it can."""
    if jnp.ndim(theory.status) == 0:
        return theory.fisher.domain_reason()
    inside = np.all(np.asarray(theory.fisher.within_domain))
    return "" if inside else "some of the networks are outside of its domain"


def _drawn_after(network: Network, after: AfterNorms, draws: int, given: dict[str, Any]) -> Array:
    """The largest eigenvalue of the median draw for the parameters after the norms."""
    if isinstance(after.followed, Tracer):
        cause, remedy = "which layers count is not known while tracing", "leave it out under jit"
        raise problem(SpecError, "draws", draws, cause, remedy)
    found = drawn_eigenvalues(network, **given, draws=draws, layers=after.paths)
    return found.raise_if_failed().lambda_max.astype(after.lambda_max.dtype)
