"""The learning rates of a network, from two eigenvalues of its Fisher matrix."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import Signal
from meanfield_jax.layers.dense import Dense
from meanfield_jax.layers.norm import Norm
from meanfield_jax.network import normalizes_over_batch, walk
from meanfield_jax.theory.after_norms import AfterNorms, after_norms
from meanfield_jax.theory.analyze import Theory
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.stability import Maker, first_step, stability_limit

SPIKE = 2.0
"""A loss has spiked when it exceeds its first value by this factor."""

OVERSHOOT = 1 + math.sqrt(SPIKE)
"""A first step of this length, in units of the distance to the minimum, multiplies the loss by
``SPIKE``."""

BOUNDED = 6.45, -2.1
"""The boundary of training from a random start in units of 1 / lambda_after_norms, at momentum 0
and its slope in the momentum; fitted on one half of the cases of benchmarks/rates.py."""

WITHIN_SAMPLES = 0.7
"""Its factor where norms act within each sample; fitted likewise."""

MOST_HIDDEN = 2.0
"""Where norms act within each sample, the layers before them move all samples together, too. Their
part in what decides the first steps saturates: it at most doubles the eigenvalue; fitted."""


SIGNS_WITHIN_SAMPLES = 0.5
"""Factor of Adam's rate where norms act within each sample; fitted on four of eight networks."""

CROSS_ENTROPY = 2.5
"""The largest first rate that was safe with the cross-entropy, times the gain of the optimizer."""

LEAST_GAMMA = 0.5
"""Below this scale of the last norm training diverges earlier than ``bounded``."""

CAREFUL = 0.5
"""Fraction of ``no_spike`` from which to start where it is rough; for a small gamma of the smaller
one of ``no_spike`` and ``quadratic``. Chosen on the three tuned networks of
benchmarks/tuning_pays.py, with gamma from 0.07 to 0.4, of which one diverges at ``no_spike``."""

LEAST_COMMON = 0.1
"""Least fraction of the last layer's inputs' power that two samples have in common, for which the
rates are known."""

ALIGNED = 0.5
"""Fraction of the power that comes to be in common where less was at the start; fitted."""

LITTLE_IN_COMMON = (
    "samples have little in common before the last layer, as after tanh: large steps align them, "
    "and the rates are rough"
)

NO_NORM = "there is no normalization, so the rates are those of the quadratic loss"


class Rule(NamedTuple):
    """What a learning rate needs to know of a linear optimizer.

    Attributes:
        limit: z, the largest product of rate and curvature that is stable on a quadratic.
        gain: Length of the first step in units of rate times gradient.
        bounded: As limit, for a loss that stays bounded from a random start; NaN if not known.
    """

    limit: Array
    gain: Array
    bounded: Array


def heavy_ball(momentum: float | Array) -> Rule:
    """The rule of gradient descent with momentum."""
    at_rest, slope = BOUNDED
    limit = eta_max(1.0, momentum)
    return Rule(limit, jnp.ones_like(limit), at_rest + slope * jnp.asarray(momentum))


def linear(optimizer: Maker) -> Rule:
    """The rule of any linear transformation of optax."""
    limit = stability_limit(optimizer)
    return Rule(limit, first_step(optimizer), jnp.full_like(limit, jnp.nan))


def rates(
    rule: Rule, lambda_max: Array, lambda_after_norms: Array, over_batch: bool
) -> dict[str, Array]:
    r"""Learning rates from the largest eigenvalues of F and of its part after the norms.

    .. math:: \eta_{quadratic} = z / \lambda_{max}, \quad
        \eta_{no\,spike} = \min(z, (1 + \sqrt 2) / g) / \lambda_{after}, \quad
        \eta_{bounded} = (6.45 - 2.1 \mu) / \lambda_{after}

    z is the limit and g the gain of the optimizer; the last one is for the heavy ball. On a
    quadratic, the loss along the steepest direction never exceeds twice its first value below the
    second rate: the first step goes too far by at most sqrt(2), and later ones are shorter.

    This holds with BatchNorm, which removes what a hidden layer does to all samples alike. Without
    it the second rate has min(2 lambda_after, lambda_max) and the third a factor of 0.7.

    Args:
        rule: The optimizer.
        lambda_max: The largest eigenvalue of F.
        lambda_after_norms: That of F restricted to the parameters that no normalization follows.
        over_batch: Whether a norm acts over the batch.

    Returns:
        The three rates by name, of the broadcast shape.
    """
    first, bounded = lambda_after_norms, rule.bounded / lambda_after_norms
    if not over_batch:
        hidden = jnp.maximum(lambda_max, lambda_after_norms)
        first, bounded = jnp.minimum(MOST_HIDDEN * first, hidden), WITHIN_SAMPLES * bounded
    no_spike = jnp.minimum(rule.limit, OVERSHOOT / rule.gain) / first
    return dict(quadratic=rule.limit / lambda_max, no_spike=no_spike, bounded=bounded)


def rates_of(
    theory: Theory, momentum: float | Array = 0.9, data: Array | None = None
) -> dict[str, Array]:
    """The rates of the heavy ball on the squared loss, as ``learning_rate`` predicts them.

    Args:
        theory: Theory of the network.
        momentum: The momentum mu.
        data: The batch, if the theory is that of one.

    Returns:
        ``quadratic``, ``no_spike`` and ``bounded``, () each.

    Raises:
        SpecError: if the theory is that of a batch that is not given.
    """
    on_data, statistics = theory.fisher.eigenvalues is not None, theory.kernel.statistics
    if on_data and data is None:
        cause, remedy = "the theory is that of a batch", "pass this batch"
        raise problem(SpecError, "data", data, cause, remedy)
    x = jnp.asarray(data, theory.kernel.dtype) if on_data else None
    num_samples = jax.lax.stop_gradient(1 / theory.fisher.inverse_samples)
    after = after_norms(theory.network, x, statistics, num_samples)
    over_batch = statistics == "batch" and normalizes_over_batch(theory.network.body)
    lambda_after = decisive_eigenvalue(theory, after)
    return rates(heavy_ball(momentum), theory.fisher.lambda_max, lambda_after, over_batch)


def decisive_eigenvalue(theory: Theory, after: AfterNorms, drawn: Array | None = None) -> Array:
    """The eigenvalue that decides from a random start.

    Args:
        theory: Theory of the network.
        after: That of the parameters after the norms.
        drawn: Their largest eigenvalue in drawn networks; None: in the wide limit.

    Returns:
        ``after.lambda_max`` for the largest of the C outliers in a draw, (). Without a
        normalization it is ``lambda_max`` itself. Where samples have little in common, as after
        tanh, large steps align them: then it is half of what F has for a single sample.
    """
    fisher, kept = theory.fisher, 1 - after.followed
    if drawn is None:
        parts = fisher.contributions
        contributions = kept * (parts.weights + parts.biases + parts.norm)
        widened = (contributions * (1 + fisher.draw_width) ** 2).sum(-1) / contributions.sum(-1)
        drawn = widened * after.lambda_max
    aligned = jnp.maximum(after.lambda_max, ALIGNED * after.tangent_same)
    found = jnp.where(common(theory) < LEAST_COMMON, aligned, drawn)
    return jnp.where(kept.all(-1), fisher.lambda_max, found)


def common(theory: Theory) -> Array:
    """The fraction of the last layer's inputs' power that two samples have in common, ()."""
    order = theory.order_parameters
    return order.q_hat_xy[..., -1] / order.q_hat[..., -1]


def reasons(theory: Theory, after: AfterNorms) -> tuple[str, ...]:
    """Why the rates from a random start may be wrong for a network (host only)."""
    if not np.asarray(after.followed).any():
        return (NO_NORM,)
    found = []
    if (gamma := np.min(last_gamma(theory))) < LEAST_GAMMA:
        found.append(f"gamma {gamma:g} is below {LEAST_GAMMA:g}: it grows, and rates with it")
    if np.min(common(theory)) < LEAST_COMMON:
        found.append(LITTLE_IN_COMMON)
    return tuple(found)


def last_gamma(theory: Theory) -> Any:
    """The scale of the last norm; infinity without one."""
    norms = [inner for _, inner in walk(theory.network.body) if isinstance(inner, Norm)]
    return norms[-1].gamma if norms else np.inf


def first_rate(theory: Theory, found: dict[str, Array]) -> Array:
    """The rate to start from: ``no_spike``, or a fraction of it where it is rough.

    Args:
        theory: Theory of the network.
        found: What :func:`rates` returned.

    Returns:
        The rate, ().
    """
    gamma, rate = last_gamma(theory), found["no_spike"]
    little = (gamma < np.inf) & (common(theory) < LEAST_COMMON)
    found_small = CAREFUL * jnp.fmin(rate, found["quadratic"])
    return jnp.where(gamma < LEAST_GAMMA, found_small, jnp.where(little, CAREFUL * rate, rate))


def sign_descent(theory: Theory) -> Array:
    r"""The largest rate of Adam at which the loss does not spike from a random start.

    Adam's first steps move every weight by the rate, against the sign of its gradient. With the
    mean q_xy of the products of the last layer's N inputs for two samples, the outputs change by
    N sqrt(q_xy) times the rate; that is too far when it is twice the mean residual r:

    .. math:: \eta = 2 r / (N \sqrt{q_{xy}}), \quad r^2 = \sigma_w^2 q_{xy} + \sigma_b^2 + 1/C^2

    Args:
        theory: Theory of a network that ends in a Dense layer; targets are one-hot.

    Returns:
        The rate, ().

    Raises:
        SpecError: if the network does not end in a Dense layer.
    """
    network = theory.network
    last: Any = network.layers[-1]
    if not isinstance(last, Dense):
        cause, remedy = "Adam's rule is for a Dense layer at the end", "measure a model instead"
        raise problem(SpecError, "network.layers[-1]", last, cause, remedy)
    shared = theory.order_parameters.q_hat_xy[..., -1]
    fan_in = network.body.signals(Signal(network.input_shape))[-2].shape[0]
    square = last.weight_var * shared + last.bias_var + network.num_outputs**-2
    return 2 * jnp.sqrt(square) / (fan_in * jnp.sqrt(shared))
