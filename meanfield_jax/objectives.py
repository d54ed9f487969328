"""Objectives for :func:`meanfield_jax.tune`: scalars of a theory that are to be minimized.

Any other function from :class:`Theory` to a scalar that consists of JAX operations is an objective,
too. Its values should be of order one, for example the logarithm of the quantity of interest.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.pytree import pytree, static
from meanfield_jax.theory.analyze import Theory
from meanfield_jax.theory.rates import rates_of
from meanfield_jax.variants import has_batch_norm

MARGIN = 1e-3
"""Relative distance above its floor at which a constraint ends, for an objective of slope 1."""

HOLD = 1e3
"""Weight of the squared logarithm that holds the scale of the outputs."""


RATES = ("quadratic", "no_spike", "bounded")
"""The learning rates of :class:`LearningRate` that an objective may be about."""


@pytree(repr=False)
class Objective:
    """A scalar of a theory with its options; a pytree whose leaves are the options.

    All objectives with the same measure therefore use the same compiled code.

    Attributes:
        measure: Maps a theory and the options to a scalar; if the objective is about a learning
            rate, its first argument is that rate and the second one the theory.
        options: Values by name.
        rate: The learning rate that it is about, one of ``RATES``; None if it is about none.
    """

    measure: Callable[..., Array] = static()
    options: dict[str, float] = dataclasses.field(default_factory=dict)
    rate: str | None = static(default=None)

    def __call__(self, theory: Theory, data: Array | None = None) -> Array:
        """The objective's value.

        Args:
            theory: The theory of a network.
            data: The batch that it is about, needed by objectives about ``no_spike`` and
                ``bounded``.

        Returns:
            A scalar.
        """
        if self.rate is None:
            return self.measure(theory, **self.options)
        options = dict(self.options)
        found = rates_of(theory, options.pop("momentum"), data)
        return self.measure(found[self.rate], theory, **options)

    def __repr__(self) -> str:
        options = [f"{name}={value:g}" for name, value in self.options.items()]
        which = [] if self.rate is None else [f"rate={self.rate!r}"]
        return f"{self.measure.__name__.lstrip('_')}({', '.join(options + which)})"


@checked()
def target_rate(value: float, rate: str = "no_spike", momentum: float = 0.9) -> Objective:
    r"""Makes one of the learning rates of :func:`meanfield_jax.learning_rate` equal to ``value``.

    .. math:: (\log \eta - \log value)^2

    Args:
        value: The learning rate.
        rate: Which one: ``"no_spike"``, ``"bounded"`` (from a random start) or ``"quadratic"``
            (near a minimum).
        momentum: Momentum of the heavy ball, in [0, 1).

    Returns:
        The objective, a function of a theory; on data also of the batch.

    Example:
        >>> import meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm())
        >>> tuned = mf.tune(net, mf.objectives.target_rate(0.1, "no_spike"), shared=True)
        >>> round(float(mf.learning_rate(tuned.network).no_spike), 4)
        0.1
    """
    check_choice("rate", rate, RATES)
    options = dict(value=_positive("value", value), momentum=momentum)
    return Objective(_target_rate, options, rate)


def _target_rate(rate: Array, theory: Theory, value: float) -> Array:
    return _log_square(rate / value)


@checked()
def max_rate(
    min_output_variance: float = 1.0, rate: str = "no_spike", momentum: float = 0.9
) -> Objective:
    r"""Maximizes one of the learning rates while the outputs still vary over the inputs.

    .. math:: -\log \eta + b(\log V - \log V_{min})

    V is :func:`output_variance` and b the barrier of :func:`max_eta_max`, which is this objective
    for the rate ``"quadratic"``.

    Args:
        min_output_variance: V_min, the smallest variance of the outputs.
        rate: Which rate, as in :func:`target_rate`.
        momentum: Momentum of the heavy ball, in [0, 1).

    Returns:
        The objective, a function of a theory; on data also of the batch.
    """
    check_choice("rate", rate, RATES)
    floor = _positive("min_output_variance", min_output_variance)
    return Objective(_max_rate, dict(min_output_variance=floor, momentum=momentum), rate)


def _max_rate(rate: Array, theory: Theory, min_output_variance: float) -> Array:
    return _above_floor(theory, min_output_variance) - jnp.log(rate)


@checked()
def target_eta_max(value: float, momentum: float = 0.9) -> Objective:
    r"""Makes the largest rate that is stable near a minimum, ``"quadratic"``, equal to ``value``.

    .. math:: (\log \eta_{max} - \log value)^2

    Args:
        value: The learning rate.
        momentum: Momentum of the heavy ball, in [0, 1).

    Returns:
        The objective, a function of a theory; it is 0 where eta_max is ``value``.

    Example:
        >>> import meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm())
        >>> tuned = mf.tune(net, mf.objectives.target_eta_max(0.1), over="gamma", shared=True)
        >>> round(float(tuned.after.eta_max()), 4)
        0.1
    """
    return Objective(_target_eta_max, dict(value=_positive("value", value), momentum=momentum))


def _target_eta_max(theory: Theory, value: float, momentum: float) -> Array:
    return _log_square(theory.eta_max(momentum) / value)


@checked()
def max_eta_max(min_output_variance: float = 1.0) -> Objective:
    r"""Maximizes the rate ``"quadratic"`` while the outputs still vary over the inputs.

    .. math:: \log \lambda_{max} + b(\log V - \log V_{min})

    V is :func:`output_variance`, and b is the logarithmic barrier b(s) = -m log(s) with m = 1e-3,
    continued by a parabola below s = m/2 so that any start is possible. Without a floor there is no
    optimum: lambda_max falls with the squared scale of the outputs, and a network with small
    outputs does not learn faster. The minimum is at s = m / (d log lambda_max / d log V), about
    0.1 % above the floor, and never below it unless lambda_max grows faster than V^4.

    Args:
        min_output_variance: V_min, the smallest variance of the outputs.

    Returns:
        The objective, a function of a theory.

    Accuracy:
        The variance ends 0.1 % above the floor (tests/test_tune.py).
    """
    floor = _positive("min_output_variance", min_output_variance)
    return Objective(_max_eta_max, dict(min_output_variance=floor))


def _max_eta_max(theory: Theory, min_output_variance: float) -> Array:
    return _above_floor(theory, min_output_variance) + jnp.log(theory.fisher.lambda_max)


def _above_floor(theory: Theory, min_output_variance: float) -> Array:
    """The barrier that keeps the variance of the outputs above a floor."""
    return _barrier(jnp.log(output_variance(theory) / min_output_variance), MARGIN)


def _barrier(distance: Array, margin: float) -> Array:
    """-margin log(distance), continued below margin / 2 by a parabola of the same curvature."""
    edge = margin / 2
    inside = jnp.log(jnp.maximum(distance, edge))
    beyond = (((distance - 2 * edge) / edge) ** 2 - 1) / 2 - math.log(edge)
    return margin * jnp.where(distance > edge, -inside, beyond)


@checked()
def sharpness(output_variance: float = 1.0) -> Objective:
    r"""Minimizes the ratio of largest to mean eigenvalue, a measure of pathological sharpness.

    .. math:: \log \frac{\lambda_{max}}{\bar\lambda} + \frac{1000}{2} (\log V - \log V_0)^2

    The ratio alone does not depend on the scale of the outputs, which multiplies all eigenvalues,
    and it keeps falling as the scale of the last layers grows and their biases become negligible.
    The scale is therefore held fixed: V is :func:`output_variance`, which ends within
    (d log ratio / d log V) / 1000 of V_0. A single shared number would then be determined by V_0
    alone, so tune one for each layer, or two fields. Use bounds, because the ratio may fall forever
    as the scale of one layer grows and that of another shrinks.

    Args:
        output_variance: V_0, the variance at which the outputs are held.

    Returns:
        The objective, a function of a theory.
    """
    scale = _positive("output_variance", output_variance)
    return Objective(_sharpness, dict(variance=scale))


def _sharpness(theory: Theory, variance: float) -> Array:
    ratio = theory.fisher.lambda_max / theory.fisher.mean
    return jnp.log(ratio) + HOLD / 2 * _log_square(output_variance(theory) / variance)


def equal_shares() -> Objective:
    r"""Makes the weights of all layers contribute equally to the outlier, hence to lambda_max.

    .. math:: L \sum_l p_l^2 - 1, \quad p_l = f_l / \sum_m f_m

    f_l is the contribution of the weights of the l-th of L layers (``Fisher.contributions``). The
    objective is 0 if all are equal, and 1 / (L - 1) if one layer contributes nothing whatever the
    numbers (the first, for infinitely many i.i.d. inputs) and the others are equal. With BatchNorm,
    ``statistics="batch"`` and many samples, only the last layer contributes and nothing can be
    tuned; with ``"frozen"`` and a rectifier the fractions p_l depend on beta / gamma only.

    Returns:
        The objective, a function of a theory, from 0 to L - 1.
    """
    return Objective(_equal_shares)


def _equal_shares(theory: Theory) -> Array:
    shares, layers = theory.fisher.contributions, theory.order_parameters.layers
    share = shares.weights[np.isin(shares.layers, layers)]
    return len(layers) * jnp.sum((share / share.sum()) ** 2) - 1


def unit_growth() -> Objective:
    r"""Makes gradients keep their size from layer to layer, neither exploding nor vanishing.

    .. math:: \frac{1}{L-1} \sum_l (\log growth_l)^2

    The growth is :func:`growth`. It reaches 1 for tanh as gamma goes to 0 and tanh becomes linear,
    and for a rectifier (1.467 with beta = 0, whatever gamma) as beta / gamma grows, so tune beta as
    well. All samples then have a mean in common, which lowers the stable learning rate: for
    FC 784-1000x3-10 from .024 to .002.

    Returns:
        The objective, a function of a theory; it is 0 where every growth is 1.

    Accuracy:
        With the default tolerance the largest growth ends at 1.001 (one gamma for 30 layers of
        tanh) to 1.006 (30 gammas); a smaller tolerance comes closer (benchmarks/tune_speed.py).
    """
    return Objective(_unit_growth)


def _unit_growth(theory: Theory) -> Array:
    return jnp.mean(_log_square(growth(theory)))


def growth(theory: Theory) -> Array:
    r"""Factor by which the squared gradient grows per layer, towards the input; (layers - 1,).

    .. math:: \frac{\tilde q^l s_l^2}{\tilde q^{l+1} s_{l+1}^2}

    With BatchNorm s_l^2 = q - q_xy, the variance of a pre-activation over inputs. The gradient is
    thus measured in the units of the next BatchNorm, so that a scale gamma that differs from layer
    to layer, and that the BatchNorm after it removes, has no effect: the growth of every layer is
    gamma^2 E[phi'^2] / Var(phi). Without BatchNorm s_l = 1, and the growth is chi_1.

    Args:
        theory: Theory of a chain of layers.

    Returns:
        The growth from each layer of weights to the one before it, first to last; 1 where the
        gradient keeps its size.

    Source:
        Yang et al. 2019 (arXiv:1902.08129): pi/(pi-1) for a rectifier.
    """
    order = theory.order_parameters
    normalized = has_batch_norm(theory.network)
    gradient = order.q_tilde * (order.q - order.q_xy if normalized else 1.0)
    return gradient[:-1] / gradient[1:]


def output_variance(theory: Theory) -> Array:
    """The variance of a network's output over the inputs, q - q_xy of the last layer."""
    order = theory.order_parameters
    return order.q[-1] - order.q_xy[-1]


def _log_square(ratio: Array) -> Array:
    return jnp.log(ratio) ** 2


def _positive(argument: str, value: Any) -> float:
    if isinstance(value, (int, float, np.number)) and 0 < value < math.inf:
        return float(value)
    cause, remedy = "must be a finite positive number", "pass, e.g., 0.1"
    raise problem(SpecError, argument, value, cause, remedy)
