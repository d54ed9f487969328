"""``tune``: gradient descent, through the theory, on the numbers of a specification."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import whole
from meanfield_jax.descent import (
    FAR,
    TOLERANCE,
    Leaf,
    Problem,
    State,
    descend,
    largest,
)
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import tunable_fields
from meanfield_jax.network import Network
from meanfield_jax.objectives import Objective
from meanfield_jax.status import Status
from meanfield_jax.theory.analyze import Theory
from meanfield_jax.theory.learning_rate import eta_max

if TYPE_CHECKING:
    import xarray as xr


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning:
    """What :func:`tune` returns.

    Attributes:
        network: The tuned specification.
        before: Theory of the network at the start.
        after: Theory of the tuned network.
        status: A :class:`Status`: CONVERGED, MAX_STEPS, STALLED, NOT_FINITE, DIVERGED or
            INDEPENDENT, see :func:`tune`.
        message: The status in words, with a remedy if the descent failed.
        history: A data set over ``step``: objective, lambda_max, eta_max, and, also over ``layer``,
            every tuned field (NaN for layers without it).
    """

    network: Network
    before: Theory
    after: Theory
    status: Status
    message: str
    history: xr.Dataset

    def raise_if_failed(self) -> Tuning:
        """Returns itself.

        Raises:
            RuntimeError: the status is not CONVERGED.
        """
        if self.status == Status.CONVERGED:
            return self
        raise RuntimeError(f"tune: {self.message}")

    def __repr__(self) -> str:
        ends = self.history.isel(step=[0, -1])

        def change(values: xr.DataArray) -> str:
            return " -> ".join(f"{value:.6g}" for value in values.values)

        lines = [f"Tuning of {self.history.objective.long_name}: {self.message}"]
        lines += [f"  {name}  {change(ends[name])}" for name in SCALARS]
        for layer in ends.layer.values:
            parts = (
                f"{field} {change(ends[field].sel(layer=layer))}"
                for field in tunable_fields()
                if field in ends and np.isfinite(ends[field].sel(layer=layer)).all()
            )
            lines.append(f"  {layer}  {', '.join(parts)}")
        return "\n".join(lines)


SCALARS = ("objective", "lambda_max", "eta_max")


@checked()
def tune(
    network: Network,
    objective: Callable[[Theory], Array],
    *,
    over: str | Sequence[str] = "gamma",
    shared: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | None = None,
    draws: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    max_steps: int = 200,
    tolerance: float | None = None,
    momentum: float = 0.9,
    progress: bool = False,
) -> Tuning:
    """Minimizes an objective of a network's theory over some of the network's numbers.

    The descent is one compiled loop. It is compiled once for each structure and objective, which
    takes 6 s for three layers, minutes for thirty written out, and 13 s for thirty in a
    :class:`Repeat`; every other run, from any numbers, takes milliseconds to seconds
    (benchmarks/tune_speed.py). gamma and the variances are varied on a logarithmic scale, beta on a
    linear one, and fields with ``bounds`` on the scale of a sigmoid between the bounds, so that no
    step leaves them. The computation is in float64 under ``jax.enable_x64()``.

    Args:
        network: The specification, with the numbers to start from. All repetitions inside a
            :class:`Repeat` use the same number; to tune one for each, write the layers out, as
            ``mlp`` does.
        objective: A function from :class:`Theory` to a scalar, from ``mf.objectives`` or any other.
        over: The fields to tune: gamma, beta, weight_var, bias_var.
        shared: Whether all layers get the same value (starting from the mean of their values).
        bounds: (low, high) for some of the fields.
        data: A batch, to use the theory for these inputs, see :func:`analyze`.
        statistics: As in :func:`analyze`.
        num_samples: As in :func:`analyze`.
        draws: With ``data``, the number of networks to draw, as in :func:`analyze`: lambda_max is
            then that of the median draw, whose random numbers stay the same during the descent.
        optimizer: Any optax optimizer; None: L-BFGS, with each step halved until the objective
            falls.
        max_steps: Largest number of steps.
        tolerance: The descent has converged when no derivative of the objective with respect to
            the coordinates (the logarithm of gamma, beta itself) exceeds this number, in units of
            max(1, |objective|); None: 1e-5, or in float32 the square root of eps, 3.5e-4.
        momentum: Momentum of eta_max in the history.
        progress: Whether to show step and objective on a terminal.

    Returns:
        The tuned network, its theory and the history. The status is ``"diverged"`` if a number
        without bounds changed by a factor of 100 (the objective has no minimum nearby, such as
        eta_max alone), ``"not_finite"`` if the objective was not finite, ``"independent"`` if the
        objective is not at its target and does not depend on the tuned numbers, and ``"stalled"``
        if no step makes it smaller although its derivative is not 0, at a kink or because of
        rounding.

    Raises:
        SpecError: if a field, a number or an option is not valid.
        DataError: if the data do not fit the network.

    Accuracy:
        A target learning rate is reached to 5e-6, in float32 to 2e-4 (tests/test_tune.py).

    Example:
        >>> import meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm())
        >>> tuned = mf.tune(net, lambda theory: (theory.fisher.lambda_max / 50 - 1) ** 2)
        >>> tuned.status.name, round(float(tuned.after.fisher.lambda_max), 1)
        ('CONVERGED', 50.0)
    """
    max_steps = whole("max_steps", max_steps, 1)
    network.validate()
    if draws is not None and data is None:
        cause, remedy = "drawn networks need a batch", "pass data"
        raise problem(SpecError, "draws", draws, cause, remedy)
    if any(np.shape(number) for number in jax.tree.leaves(network)):
        cause, remedy = "some of its numbers are arrays", "tune one network at a time"
        raise problem(SpecError, "network", network, cause, remedy)
    network = jax.tree.map(float, network)
    fields = _checked_fields(network, over)
    leaves = _leaves(network, fields, shared)
    setting = Problem(
        numbers=_without_zero_offsets(network, leaves),
        bounds=_checked_bounds(bounds or {}, fields),
        # any other function becomes static, and is compiled for
        objective=objective if isinstance(objective, Objective) else Objective(objective),
        num_samples=num_samples,
        structure=jax.tree.structure(network),
        leaves=leaves,
        optimizer=optimizer,
        statistics=statistics,
        draws=draws,
    )
    before = setting.theory(network, data)
    _check_scalar(objective, setting.objective(before, data))
    start = setting.position(_start(setting))
    if tolerance is None:
        tolerance = max(TOLERANCE, math.sqrt(jnp.finfo(before.kernel.dtype).eps))
    state, rows = descend(setting, start, data, tolerance, max_steps, progress)
    tuned = setting.network_at({field: rows[field][-1].tolist() for field in start})
    present = {leaf.field for leaf in _leaves(network, tuple(tunable_fields()), shared=False)}
    return Tuning(
        network=tuned,
        before=before,
        after=setting.theory(tuned, data),
        status=Status(int(state.status)),
        message=_message(state, tolerance, sorted(present)),
        history=_history(leaves, rows, momentum, objective),
    )


def _without_zero_offsets(network: Network, tuned: tuple[Leaf, ...]) -> list[float | None]:
    """The numbers of the network; None for offsets that are 0 and are not tuned."""
    positions = {leaf.position for leaf in tuned}
    return [
        None if path[-1].name == "beta" and number == 0 and index not in positions else number
        for index, (path, number) in enumerate(jax.tree_util.tree_leaves_with_path(network))
    ]


def _checked_fields(network: Network, over: str | Sequence[str]) -> tuple[str, ...]:
    """The given fields, in the order of :func:`tunable_fields`."""
    named = (over,) if isinstance(over, str) else tuple(over)
    present = {leaf.field for leaf in _leaves(network, tuple(tunable_fields()), shared=False)}
    for field in named or ("",):
        if field not in present:
            cause = "no layer of this network has such a field"
            remedy = f"use one or more of {', '.join(sorted(present))}"
            raise problem(SpecError, "over", over, cause, remedy)
    return tuple(field for field in tunable_fields() if field in named)


def _checked_bounds(
    bounds: Mapping[str, tuple[float, float]], fields: Sequence[str]
) -> dict[str, tuple[float, float]]:
    for field, ends in bounds.items():
        name = f"bounds[{field!r}]"
        if field not in fields:
            cause = "this field is not tuned"
            raise problem(SpecError, name, ends, cause, f"use one of {', '.join(fields)}")
        least = 0.0 if tunable_fields()[field] else -math.inf
        if not (len(ends) == 2 and least <= ends[0] < ends[1] < math.inf and ends[0] > -math.inf):
            cause = "must be two finite numbers, the lower one first"
            cause += " and not negative" * tunable_fields()[field]
            raise problem(SpecError, name, ends, cause, "pass, e.g., (0.05, 5)")
    return {field: (float(low), float(high)) for field, (low, high) in bounds.items()}


def _leaves(network: Network, fields: Sequence[str], shared: bool) -> tuple[Leaf, ...]:
    """The numbers with these names, from the first layer to the last."""
    leaves, count = [], dict.fromkeys(fields, 0)
    for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(network)):
        field = path[-1].name
        if field in count:
            layer = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            leaves.append(Leaf(index, field, layer, 0 if shared else count[field]))
            count[field] += 1
    return tuple(leaves)


def _start(setting: Problem) -> dict[str, np.ndarray]:
    """The numbers to start from, by field: those of the network, or their mean if shared."""
    values: dict[str, dict[int, list[Any]]] = {}
    for leaf in setting.leaves:
        value = setting.numbers[leaf.position]
        assert value is not None
        free = (0.0 if tunable_fields()[leaf.field] else -math.inf, math.inf)
        low, high = setting.bounds.get(leaf.field, free)
        if not low < value < high:
            name = f"{leaf.layer}.{leaf.field}"
            cause = f"must be above {low:g} and below {high:g}"
            remedy = "start from a number between these, or do not tune it"
            raise problem(SpecError, name, value, cause, remedy)
        values.setdefault(leaf.field, {}).setdefault(leaf.place, []).append(value)
    return {
        field: np.array([np.mean(same) for same in places.values()])
        for field, places in values.items()
    }


def _check_scalar(objective: Callable[[Theory], Array], value: Any) -> None:
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        cause, remedy = f"its value is {value!r}", "return one real number, such as a mean"
        raise problem(SpecError, "objective", objective, cause, remedy)


def _history(
    leaves: tuple[Leaf, ...],
    rows: dict[str, np.ndarray],
    momentum: float,
    objective: Callable[[Theory], Array],
) -> xr.Dataset:
    import xarray as xr

    layers = list(dict.fromkeys(leaf.layer for leaf in leaves))
    steps = len(rows["objective"])
    name = getattr(objective, "__name__", None) or repr(objective)
    rate = np.asarray(eta_max(1.0, momentum)) / rows["lambda_max"]
    data: dict[str, Any] = {
        "objective": ("step", rows["objective"], dict(long_name=name)),
        "lambda_max": ("step", rows["lambda_max"]),
        "eta_max": ("step", rate, dict(momentum=momentum)),
    }
    for leaf in leaves:
        if leaf.field not in data:
            data[leaf.field] = (("step", "layer"), np.full((steps, len(layers)), np.nan))
        data[leaf.field][1][:, layers.index(leaf.layer)] = rows[leaf.field][:, leaf.place]
    return xr.Dataset(data, dict(step=np.arange(steps), layer=layers))


def _message(state: State, tolerance: float, present: list[str]) -> str:
    """The status in words; ``present`` lists all fields of the network that can be tuned."""
    fields, steps = tuple(state.position), int(state.step)
    names, last = " and ".join(fields), f"step {steps - 1}"
    others = [name for name in present if name not in fields]
    if state.status == Status.CONVERGED:
        return f"converged at {last}"
    if state.status == Status.NOT_FINITE:
        return f"the objective is not finite at {last}; use other starting values or bounds"
    if state.status == Status.DIVERGED:
        return (
            f"{names} changed by a factor of {FAR:g} up to {last} and the objective still falls: "
            "it has no minimum nearby; use bounds, or an objective that holds something fixed, "
            "such as objectives.max_eta_max (a floor on the outputs) or objectives.target_eta_max"
        )
    if state.status == Status.INDEPENDENT:
        more = f"; tune {others[0]} as well: over={(*fields, others[0])!r}" if others else ""
        return f"the objective does not depend on {names}{more}"
    steepest = float(largest(state.slope))
    if state.status == Status.STALLED:
        return f"no step from {last} makes the objective smaller, its derivative is {steepest:.1e}"
    reached = f"the derivative is {steepest:.1e}, the tolerance {tolerance:.1e}"
    return f"not converged at {last}: {reached}; raise max_steps"
