"""A schedule of the learning rate, whose peak is that of the network."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.arguments import as_given, checked, momenta
from meanfield_jax.checks import pair, whole
from meanfield_jax.empirical.fisher import FisherOperator
from meanfield_jax.empirical.inputs import check_batch
from meanfield_jax.empirical.loss import Loss, checked_targets, mean_loss
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.experiments.learning_rate import Optimizer, learning_rate, rule_of
from meanfield_jax.experiments.measured_rate import measured_again, operator_of
from meanfield_jax.experiments.rate_result import LearningRate
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.pytree import pytree, static
from meanfield_jax.theory.stability import of_rate_1

WARMUP = 0.1
"""Fraction of all steps that are a warm-up unless its length is given."""

Batch = tuple[Any, Array]
"""Inputs and targets of one step."""


@pytree(eq=False, repr=False)
class Schedule:
    """A warm-up from 0 to a peak and a cosine to 0; :func:`suggest_schedule` returns it.

    It is a function from the number of a step to a learning rate, for optax:
    ``optax.sgd(schedule, 0.9)``.

    Attributes:
        rate: The learning rates of the network; the peak is the one that is recommended.
        warmup: The number of steps up to the peak.
        num_steps: The number of all steps, after which the rate is 0.
    """

    rate: LearningRate
    warmup: int = static()
    num_steps: int = static()

    @property
    def peak(self) -> Array:
        """The largest rate, ()."""
        return self.rate.recommended

    def __call__(self, step: Array | float) -> Array:
        """The learning rate of a step.

        Args:
            step: The number of steps before it, any shape.

        Returns:
            The rate, of the same shape.
        """
        step = jnp.asarray(step, jnp.result_type(float))
        rising = step / max(1, self.warmup)
        done = (step - self.warmup) / (self.num_steps - self.warmup)
        falling = (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1))) / 2
        return self.peak * jnp.where(step < self.warmup, rising, falling)

    def __repr__(self) -> str:
        peak = self.peak if isinstance(self.peak, Tracer) else f"{float(self.peak):.4g}"
        parts = (f"warm-up {self.warmup} steps", f"peak {peak} ({self.rate.source})")
        return f"Schedule({', '.join(parts)}, cosine to 0 at step {self.num_steps})"


@checked(model=as_given, optimizer=as_given, x=as_given, y=as_given, momentum=momenta)
def suggest_schedule(
    model: Network | nnx.Module | Callable[..., Array],
    x: Any = None,
    *,
    num_steps: int,
    warmup: int | None = None,
    batches: Sequence[tuple[Any, Any]] = (),
    params: Any = None,
    y: Array | None = None,
    optimizer: str | Optimizer = "heavy_ball",
    momentum: float | Array = 0.9,
    loss: Loss = "squared",
    statistics: str = "batch",
    num_samples: int | None = None,
    draws: int | None = None,
    fraction: float = 1.0,
) -> Schedule:
    r"""A warm-up and a cosine whose peak is the learning rate of the network.

    With the rate eta of :func:`learning_rate`, k steps of warm-up and n steps in all,

    .. math:: \eta_t = \eta \, t / k \; (t < k), \quad
        \eta_t = \frac{\eta}{2} \Big(1 + \cos \pi \frac{t - k}{n - k}\Big) \; (t \ge k)

    The rate is that of a random start. With ``batches`` a copy of a model is trained through the
    warm-up, and the parameters that no normalization follows are measured once more. If the rate of
    the model as it is then is smaller, as where a small gamma grows, it is the peak. If it is
    larger, the peak stays: it is the rate of a network that was trained with less, and would not
    be the same after a warm-up to a higher peak.

    Args:
        model: As in :func:`learning_rate`; it stays as it is.
        x: As in :func:`learning_rate`.
        num_steps: The number of steps of the whole training.
        warmup: The number of steps of the warm-up; None: a tenth of all.
        batches: For a model, training batches (inputs, targets), which the steps of the warm-up use
            in turn. Targets are those of the loss: integer labels or arrays of the outputs' shape.
            (): the peak is the rate at the start.
        params: As in :func:`learning_rate`, like all that follow.
        y: The targets of ``x``, for a measurement with Adam, or if the loss is a function.
        optimizer: The optimizer, made with a learning rate of 1.
        momentum: mu of the heavy ball.
        loss: The loss.
        statistics: What normalizations use.
        num_samples: The batch size where ``x`` is left out.
        draws: For a network, the number of networks to draw, or None.
        fraction: The peak is this fraction of the rate to start from.

    Returns:
        The schedule, a function of the step.

    Raises:
        SpecError, DataError: if an option, the model or the data are not valid.
        RuntimeError: if the theory, a search for an eigenvalue, or the warm-up failed.

    Accuracy:
        The peak is the largest rate without a spike, not the one that learns most. On 1000 digits,
        FC 64-100x2-10 with BatchNorm, 300 steps on batches of 100: half of the peak ends lower than
        a twentieth in three of three draws (tests/test_schedule.py), all of it lower than a tenth
        in two of three. In short full-batch training (FC 64-64-10, 60 steps on 200 digits) a tenth
        learns more.

    Example:
        >>> import meanfield_jax as mf, optax
        >>> net = mf.mlp([200] * 10, inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> schedule = mf.suggest_schedule(net, num_steps=1000, warmup=50)
        >>> schedule
        Schedule(warm-up 50 steps, peak 0.07089 (theory), cosine to 0 at step 1000)
        >>> optimizer = optax.sgd(schedule, momentum=0.9)

    Source:
        Loshchilov & Hutter 2017 (arXiv:1608.03983), equation 5, for the cosine.
    """
    num_steps = whole("num_steps", num_steps, 1)
    rise: int = int(WARMUP * num_steps) if warmup is None else whole("warmup", warmup, 0)
    if rise >= num_steps:
        cause, remedy = f"training has {num_steps} steps", "pass a smaller number"
        raise problem(SpecError, "warmup", rise, cause, remedy)
    options: dict[str, Any] = dict(
        optimizer=optimizer, momentum=momentum, loss=loss, statistics=statistics
    )
    if len(batches) > 0:
        _check_warmup(model, batches, optimizer, rise)
    rate = learning_rate(
        model,
        x,
        params=params,
        y=y,
        num_samples=num_samples,
        draws=draws,
        fraction=fraction,
        **options,
    )
    schedule = Schedule(rate, rise, num_steps)
    if len(batches) == 0:
        return schedule
    operator = operator_of(model, params, x, y, loss, statistics)
    warm = _warmed_up(operator, schedule, batches, loss, optimizer, momentum)
    if not isinstance(loss, str):
        warm = warm.with_loss(loss, y)
    rule = rule_of(optimizer, momentum)
    assert rule is not None
    again = measured_again(rate, warm, rule, loss, rise)
    again = dataclasses.replace(again, recommended=again.recommended * fraction)
    return Schedule(again if float(again) < float(rate) else rate, rise, num_steps)


def _check_warmup(model: Any, batches: Sequence[Any], optimizer: Any, warmup: int) -> None:
    """Raises SpecError if the model cannot be measured again after the warm-up."""
    given, remedy = f"{len(batches)} batches", "leave them out"
    if isinstance(model, Network):
        cause, remedy = "a specification has no parameters to train", "pass a model, or none"
        raise problem(SpecError, "batches", given, cause, remedy)
    if warmup == 0:
        raise problem(SpecError, "batches", given, "there is no warm-up to use them", remedy)
    within("STEPS", "warmup", warmup, warmup)
    if rule_of(optimizer, 0.0) is None:
        cause = "Adam's rule is that of its first steps, not of those after a warm-up"
        raise problem(SpecError, "batches", given, cause, remedy)


def _warmed_up(
    operator: FisherOperator,
    schedule: Schedule,
    batches: Sequence[Any],
    loss: Loss,
    optimizer: Any,
    momentum: float | Array,
) -> FisherOperator:
    """The operator of the model after the warm-up."""
    used = [_checked(operator, item, loss, i) for i, item in enumerate(batches[: schedule.warmup])]
    rule = None if isinstance(optimizer, str) else of_rate_1(optimizer)
    params, peak = operator.params, float(schedule.peak)
    memory = (rule or optax.sgd(1.0, 0.9)).init(params)
    value = jnp.zeros(())
    for step in range(schedule.warmup):
        at, y = used[step % len(used)]
        at, rate = at.unchecked(params=params), peak * step / schedule.warmup
        params, memory, value = _step(at, memory, y, rate, momentum, loss=loss, optimizer=rule)
    if not np.isfinite(float(value)):
        raise RuntimeError(
            f"suggest_schedule: the loss is not finite after {schedule.warmup} steps of warm-up; "
            "pass a smaller fraction"
        )
    return operator.unchecked(params=params)


def _checked(
    operator: FisherOperator, item: Any, loss: Loss, index: int
) -> tuple[FisherOperator, Array]:
    """The operator on one batch, and its targets."""
    name = f"batches[{index}]"
    x, y = pair(name, item)
    try:
        at = operator.unchecked(x=check_batch(x))
        shape = at.outputs.shape
    except (SpecError, DataError) as error:
        raise DataError(f"{name}: {error}") from None
    return at, checked_targets(loss, y, shape, operator.dtype, f"{name}[1]")


@partial(jax.jit, static_argnames=("loss", "optimizer"))
def _step(
    at: FisherOperator,
    memory: Any,
    y: Array,
    rate: float,
    momentum: float | Array,
    *,
    loss: Loss,
    optimizer: optax.GradientTransformation | None,
) -> tuple[Any, Any, Array]:
    """One step of training on the operator's batch: parameters, memory, and the loss before it."""
    rule = optax.sgd(1.0, momentum) if optimizer is None else optimizer

    def objective(params: Any) -> Array:
        return mean_loss(loss, at.evaluate(params, at.x), y)

    value, slope = jax.value_and_grad(objective)(at.params)
    updates, memory = rule.update(slope, memory, at.params)
    updates = jax.tree.map(lambda update: rate * update, updates)
    return optax.apply_updates(at.params, updates), memory, value
