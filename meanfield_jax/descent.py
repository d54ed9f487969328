"""The descent of ``tune``: one compiled loop over the coordinates of a network's numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.flatten_util import ravel_pytree
from rich.console import Console

from meanfield_jax.layers.base import tunable_fields
from meanfield_jax.network import Network
from meanfield_jax.objectives import Objective
from meanfield_jax.pytree import pytree, static
from meanfield_jax.status import Status
from meanfield_jax.theory.analyze import Theory, analyze
from meanfield_jax.theory.compiled import compiled

FAR = 100.0
"""The descent has diverged when a number without bounds changed by this factor (beta: amount)."""

FLAT = 1e-3
"""An objective is called independent of numbers that change it by less than this fraction."""

TOLERANCE = 1e-5
"""Default tolerance; the eps of a BatchNorm gives objectives slopes of this size along scales that
have no effect otherwise."""

CHUNK = 20
"""Steps between two checks by the host, and rows of history that the device keeps."""

LONGEST, SHORTEST = 1.0, 2.0**-30
"""For the default optimizer, the longest step in any coordinate (a factor e) and its smallest
fraction."""

QUASI_NEWTON = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0))

Position = dict[str, Array]
"""The unconstrained coordinates of the tuned numbers, (numbers,), by field."""


class Leaf(NamedTuple):
    """A number of the specification that is tuned.

    Attributes:
        position: Its index among the leaves of the specification.
        field: Its name.
        layer: The path of its layer.
        place: Its index among the tuned numbers of this field.
    """

    position: int
    field: str
    layer: str
    place: int


@pytree
class Problem:
    """The definition of a descent; a pytree, so that other numbers use the same compiled code.

    Attributes:
        numbers: Numbers of the specification; None for an offset that is known to be 0 and not
            tuned, for which the theory needs no quadrature.
        bounds: The lower and the upper bound, by field.
        objective: The objective to minimize.
        num_samples: As in :func:`analyze`.
        structure: Structure of the specification.
        leaves: The tuned numbers.
        optimizer: An optax optimizer; None: L-BFGS.
        statistics: As in :func:`analyze`.
        draws: As in :func:`analyze`.
    """

    numbers: Sequence[float | None]
    bounds: dict[str, tuple[float, float]]
    objective: Objective
    num_samples: int | None
    structure: Any = static()
    leaves: tuple[Leaf, ...] = static()
    optimizer: optax.GradientTransformation | None = static()
    statistics: str = static()
    draws: int | None = static()

    def values(self, position: Position) -> dict[str, Array]:
        """The numbers at these coordinates: a sigmoid keeps them in bounds, exp positive."""

        def value(field: str, at: Array) -> Array:
            if field in self.bounds:
                low, high = self.bounds[field]
                return low + (high - low) * jax.nn.sigmoid(at)
            return jnp.exp(at) if tunable_fields()[field] else at

        return {field: value(field, at) for field, at in position.items()}

    def position(self, values: Mapping[str, np.ndarray]) -> Position:
        """The coordinates of these numbers, the inverse of ``values``."""

        def at(field: str, value: np.ndarray) -> np.ndarray:
            if field in self.bounds:
                low, high = self.bounds[field]
                return np.log((value - low) / (high - value))
            return np.log(value) if tunable_fields()[field] else value

        return {field: jnp.asarray(at(field, value), float) for field, value in values.items()}

    def network_at(self, values: Mapping[str, Any]) -> Network:
        """The specification with these numbers."""
        numbers: list[Any] = [0.0 if number is None else number for number in self.numbers]
        for leaf in self.leaves:
            numbers[leaf.position] = values[leaf.field][leaf.place]
        return jax.tree.unflatten(self.structure, numbers)

    def theory(self, network: Network, x: Array | None) -> Theory:
        """The theory from which the objective is computed."""
        options: Any = dict(statistics=self.statistics, num_samples=self.num_samples)
        return analyze(network, data=x, draws=self.draws, **options)


class State(NamedTuple):
    """The state of a descent.

    Attributes:
        step: Number of steps taken.
        status: A :class:`Status`; MAX_STEPS while the descent is running.
        position: The present coordinates.
        start: The initial coordinates.
        value: The objective at ``position``; NaN before the first step.
        memory: State of the optimizer.
        slope: Gradient of the objective.
        way: The next step at full length.
        rate: The fraction of ``way`` that is tried, halved until the objective falls enough.
        rows: History of the last ``CHUNK`` steps, step i in row i modulo ``CHUNK``.
    """

    step: Array
    status: Array
    position: Position
    start: Position
    value: Array
    memory: Any
    slope: Position
    way: Position
    rate: Array
    rows: dict[str, Array]


def descend(
    setting: Problem,
    start: Position,
    data: Array | None,
    tolerance: float,
    max_steps: int,
    progress: bool,
) -> tuple[State, dict[str, np.ndarray]]:
    """The final state, on the host, and the history, with one row per step."""
    state, parts = _started(setting, start), []
    console = Console(stderr=True, quiet=not progress)
    with console.status("Tuning: compiling") as line:
        # the check after the first step tells whether the objective depends on the numbers
        for limit in sorted({1, *range(CHUNK, max_steps, CHUNK), max_steps}):
            taken = int(state.step)
            state = jax.device_get(_descend(setting, state, data, tolerance, limit))
            rows = np.arange(taken, state.step) % CHUNK
            parts.append({name: column[rows] for name, column in state.rows.items()})
            if limit == 1 and _independent(setting, state, data, tolerance):
                state = state._replace(status=Status.INDEPENDENT)
            if state.status != Status.MAX_STEPS:
                break
            line.update(f"Tuning: step {state.step}, objective {state.value:.4g}")
    return state, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _started(setting: Problem, start: Position) -> State:
    dtype = jnp.zeros(()).dtype
    columns = {name: () for name in ("objective", "lambda_max")}
    columns |= {field: at.shape for field, at in start.items()}
    return State(
        step=jnp.zeros((), int),
        status=jnp.asarray(Status.MAX_STEPS, int),
        position=start,
        start=start,
        value=jnp.full((), jnp.nan, dtype),
        memory=(setting.optimizer or QUASI_NEWTON).init(start),
        slope=jax.tree.map(jnp.zeros_like, start),
        way=jax.tree.map(jnp.zeros_like, start),
        rate=jnp.ones((), dtype),
        rows={name: jnp.zeros((CHUNK, *shape), dtype) for name, shape in columns.items()},
    )


def _descend_to(
    setting: Problem, state: State, data: Array | None, tolerance: Array, limit: Array
) -> State:
    """Continues until the descent ends or has recorded ``limit`` steps.

    Each turn evaluates one trial step, which is either taken or tried again at half the length. A
    separate line search would be compiled as several more copies of theory and derivative.

    Returns:
        The state at the end of the descent, or after ``limit`` recorded steps.
    """
    searching = setting.optimizer is None
    optimizer = optax.with_extra_args_support(setting.optimizer or QUASI_NEWTON)

    def evaluate(position: Position):
        values = setting.values(position)
        theory = setting.theory(setting.network_at(values), data)
        value = setting.objective(theory, data)
        return value, dict(objective=value, lambda_max=theory.fisher.lambda_max, **values)

    def turn(state: State) -> State:
        trial = jax.tree.map(lambda at, way: at + state.rate * way, state.position, state.way)
        (value, row), slope = jax.value_and_grad(evaluate, has_aux=True)(trial)
        halved = state._replace(rate=state.rate / 2)
        status = jnp.where(halved.rate < SHORTEST, Status.STALLED, Status.MAX_STEPS)
        halved = halved._replace(status=status.astype(int))
        taken = _taken(setting, state, trial, value, slope, row, tolerance)
        way: Any
        way, memory = optimizer.update(
            slope,
            state.memory,
            trial,
            value=value,
            grad=slope,
            value_fn=lambda position: evaluate(position)[0],
        )
        way = _bounded(way, slope) if searching else way
        taken = taken._replace(way=way, memory=memory)
        enough = (value <= _sufficient(state)) | (state.step == 0)
        return _select(enough, taken, halved) if searching else taken

    def unfinished(state: State) -> Array:
        return (state.status == Status.MAX_STEPS) & (state.step < limit)

    return jax.lax.while_loop(unfinished, turn, state)


def _sufficient(state: State) -> Array:
    """The largest accepted objective of a trial: a fraction of the linear decrease, or rounding."""
    value = state.value
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.maximum(1.0, jnp.abs(value))
    return value + 1e-4 * state.rate * _dot(state.slope, state.way) + rounding


def _bounded(way: Position, slope: Position) -> Position:
    """The step limited to LONGEST per coordinate; the negative gradient if it would go uphill."""
    uphill = _dot(way, slope) >= 0
    way = jax.tree.map(lambda step, up: jnp.where(uphill, -up, step), way, slope)
    scale = jnp.minimum(1.0, LONGEST / jnp.maximum(largest(way), jnp.finfo(float).tiny))
    return jax.tree.map(lambda step: scale * step, way)


def _taken(
    setting: Problem,
    state: State,
    trial: Position,
    value: Array,
    slope: Position,
    row: dict[str, Array],
    tolerance: Array,
) -> State:
    """The state after taking a trial step, which becomes a row of the history."""
    place = state.step % CHUNK
    rows = {name: column.at[place].set(row[name]) for name, column in state.rows.items()}
    status = _status(setting, trial, state.start, value, slope, tolerance)
    return state._replace(
        step=state.step + 1,
        status=status,
        position=trial,
        value=value,
        slope=slope,
        rate=jnp.ones_like(state.rate),
        rows=rows,
    )


def _select(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _dot(a: Position, b: Position) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(a[field] * b[field]) for field in a]))


_descend = compiled(_descend_to)


def _status(
    setting: Problem,
    position: Position,
    start: Position,
    value: Array,
    slope: Position,
    tolerance: Array,
) -> Array:
    steepest = largest(slope)
    free = [field for field in position if field not in setting.bounds]
    moved = {field: position[field] - start[field] for field in free}
    far = [largest(part) > _reach(field) for field, part in moved.items()]
    conditions = [
        ~(jnp.isfinite(value) & jnp.isfinite(steepest)),
        jnp.any(jnp.stack(far)) if far else jnp.zeros((), bool),
        steepest <= tolerance * jnp.maximum(1.0, jnp.abs(value)),
    ]
    results = [
        jnp.asarray(status, int)
        for status in (Status.NOT_FINITE, Status.DIVERGED, Status.CONVERGED)
    ]
    return jnp.select(conditions, results, jnp.asarray(Status.MAX_STEPS, int))


def _reach(field: str) -> float:
    """How far a coordinate may move, which is a factor for those that are logarithms."""
    return math.log(FAR) if tunable_fields()[field] else FAR


def largest(tree: Any) -> Array:
    """The largest absolute value among all numbers."""
    return jnp.max(jnp.concatenate([jnp.abs(leaf) for leaf in jax.tree.leaves(tree)]))


def _independent(setting: Problem, state: State, data: Array | None, tolerance: float) -> bool:
    """Whether an unsolved objective is the same at the start and on both sides of it."""
    value = float(state.value)
    flat = FLAT * abs(value)
    if state.status == Status.NOT_FINITE or abs(value) <= tolerance or largest(state.slope) > flat:
        return False
    start, unravel = ravel_pytree(state.start)
    for factor in (0.5, 2.0):
        # each number by a different amount, as moving all alike may happen to have no effect
        change = math.log(factor) * jnp.cos(jnp.arange(start.size))
        moved = setting.values(unravel(start + change))
        network = setting.network_at({field: at.tolist() for field, at in moved.items()})
        if abs(float(setting.objective(setting.theory(network, data), data)) - value) > flat:
            return False
    return True
