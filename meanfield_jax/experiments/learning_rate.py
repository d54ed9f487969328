"""The learning rate of a network or a model: one function."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.arguments import as_given, checked, momenta
from meanfield_jax.checks import check_choice
from meanfield_jax.empirical.loss import Loss, check_loss
from meanfield_jax.experiments.measured_rate import measured
from meanfield_jax.experiments.predicted_rate import predicted
from meanfield_jax.experiments.rate_result import LearningRate
from meanfield_jax.network import Network
from meanfield_jax.theory.rates import Rule, heavy_ball, linear
from meanfield_jax.theory.stability import of_rate_1

Optimizer = optax.GradientTransformation | Callable[[float], optax.GradientTransformation]


@checked(model=as_given, optimizer=as_given, x=as_given, y=as_given, momentum=momenta)
def learning_rate(
    model: Network | nnx.Module | Callable[..., Array],
    x: Any = None,
    *,
    params: Any = None,
    y: Array | None = None,
    optimizer: str | Optimizer = "heavy_ball",
    momentum: float | Array = 0.9,
    loss: Loss = "squared",
    statistics: str = "batch",
    num_samples: int | None = None,
    draws: int | None = None,
    fraction: float = 1.0,
) -> LearningRate:
    r"""The learning rate with which to train a network, or any model, from a random start.

    Three rates have a meaning. Near a minimum of the squared loss the largest stable rate is
    z / lambda_max(F), where z is the optimizer's :func:`stability_limit`, 2 (1 + mu) for the heavy
    ball. From a random start that is often far too careful: a step that is too large throws up the
    weights of a layer before a normalization, its curvature falls like the inverse square of their
    norm, and training goes on. What decides is F restricted to the parameters that no normalization
    follows (the last layer, and the scale and offset of the last norm):

    .. math:: \eta_{no\,spike} = (1 + \sqrt 2) / \lambda_{after}, \quad
        \eta_{bounded} = (6.45 - 2.1 \mu) / \lambda_{after}

    The first is where the first step doubles the loss of the steepest direction; it is not above
    z / lambda_after. The numbers in the second were fitted. Norms within each sample make both
    smaller, see :func:`meanfield_jax.theory.rates.rates`.

    Args:
        model: A :class:`Network`, for which the rates are predicted in milliseconds, without a
            draw; a Flax NNX model, or a pure function ``apply(params, x)``, for which they are
            measured with some twenty products with the Fisher matrix.
        x: A batch of the size used in training, (n, ...). A network may do without: then inputs are
            i.i.d. with unit variance.
        params: Parameters of ``apply``, any pytree.
        y: Targets, (n, C), or labels (n,), for a measurement with Adam; whatever the loss takes, if
            that is a function.
        optimizer: ``"heavy_ball"``, ``"adam"``, or any linear transformation of optax (or a
            function from a rate to one), made with a learning rate of 1.
        momentum: mu of the heavy ball; 0 for plain gradient descent.
        loss: ``"squared"``, (1/2n) sum ||f - y||^2, summed over outputs; ``"cross_entropy"``, the
            mean over samples of -log softmax(f)[y]; ``"bernoulli"``, summed over outputs; or any
            twice differentiable, convex function ``loss(outputs, y)``, which returns a loss for
            each sample or their mean. For a network its curvature is that where all outputs are 0.
        statistics: As in :func:`analyze` for a network, :func:`fisher_operator` for a model.
        num_samples: The batch size where ``x`` is left out; None for large batches.
        draws: For a network, the number of networks to draw: eigenvalues are then those of the
            median draw, see :func:`drawn_eigenvalues`. None: those of the wide limit.
        fraction: ``recommended`` is this fraction of the rate to start from.

    Returns:
        The rates, which can be used in place of a number. For a network they can be vmapped over
        its numbers and differentiated in them.

    Raises:
        SpecError, DataError: if an option, the model or the data are not valid, or if there is no
            rule for the optimizer.
        RuntimeError: if the theory, or a search for an eigenvalue, failed.

    Accuracy:
        See benchmarks/rates.py. Eigenvalues are measured to 1 %.

    Example:
        >>> import jax, optax, meanfield_jax as mf
        >>> net = mf.mlp([200] * 10, inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> rate = mf.learning_rate(net)
        >>> round(float(rate), 2), round(float(rate.quadratic), 2), rate.decisive
        (0.07, 0.11, ('layers/28', 'layers/30'))
        >>> rule = optax.sgd(rate, momentum=0.9)

    Source:
        Near a minimum: Polyak 1964. Scale invariance: Arora, Li & Lyu 2018 (arXiv:1812.03981). The
        rule from a random start is this package's own.
    """
    check_loss(loss)
    start = time.perf_counter()
    rule = rule_of(optimizer, momentum)
    if isinstance(model, Network):
        found = predicted(model, x, y, rule, loss, statistics, num_samples, draws)
    else:
        found = measured(model, params, x, y, rule, loss, statistics)
    seconds = time.perf_counter() - start
    # an integer may be too large for JAX
    fraction = fraction if isinstance(fraction, Tracer) else float(fraction)
    recommended = found.recommended * fraction
    return dataclasses.replace(found, recommended=recommended, seconds=seconds)


def rule_of(optimizer: Any, momentum: float | Array) -> Rule | None:
    """The rule of a linear optimizer; None for Adam."""
    if isinstance(optimizer, str):
        check_choice("optimizer", optimizer, ("heavy_ball", "adam"))
        return heavy_ball(momentum) if optimizer == "heavy_ball" else None
    try:
        made = of_rate_1(optimizer)
        state = made.init(jnp.zeros(()))
    except (TypeError, ValueError, AttributeError):
        state = None
    adam = jax.tree.leaves(state, is_leaf=_is_adam)
    return None if any(map(_is_adam, adam)) else linear(optimizer)


def _is_adam(state: Any) -> bool:
    return isinstance(state, optax.ScaleByAdamState)
