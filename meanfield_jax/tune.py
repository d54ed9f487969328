"""``tune``: gradient descent, through the theory, on the numbers of a specification."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from jax import Array
from jax.flatten_util import ravel_pytree
from rich.console import Console

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import check_positive_int
from meanfield_jax.network import Network
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.propagate import Theory, analyze, compiled

POSITIVE = ("gamma", "weight_var", "bias_var")
FIELDS = (*POSITIVE, "beta")
"""What can be tuned; the positive ones on a logarithmic scale."""

FAR = 100.0
"""A number without bounds has run away when it changed by this factor (beta: by this much)."""

FLAT = 1e-3
"""An objective is said not to depend on a number that changes it, relatively, by less."""

TOLERANCE = 1e-5
"""A BatchNorm's eps makes objectives fall that much with scales that mean nothing otherwise."""

CHUNK = 20
"""Steps between two looks from the host."""

RUNNING, CONVERGED, STALLED, NOT_FINITE, RUNAWAY, INDEPENDENT = range(6)
STATUS = ("max_steps", "converged", "stalled", "diverged", "diverged", "independent")

LONGEST, SHORTEST = 1.0, 2.0**-30
"""Of the default optimizer: longest step in any coordinate (a factor e), least share of one."""

QUASI_NEWTON = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0))

Objective = Callable[[Theory], Array]
Position = dict[str, Array]
"""By field, the unconstrained coordinates of its tuned numbers, (numbers,)."""


class Leaf(NamedTuple):
    """A number of the specification that is tuned.

    Attributes:
        position: Among the leaves of the network.
        field: Its name.
        layer: The layer's path.
        place: Among the tuned numbers of this field.
    """

    position: int
    field: str
    layer: str
    place: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """All that a descent is compiled for.

    Attributes:
        network: The specification, its tuned numbers all 1.
        leaves: The tuned numbers.
        bounds: Field, lower and upper bound.
        objective: To be made small.
        optimizer: From optax.
        statistics: As in :func:`analyze`.
        num_samples: Likewise.
        max_steps: Length of the history.
    """

    network: Network
    leaves: tuple[Leaf, ...]
    bounds: tuple[tuple[str, float, float], ...]
    objective: Objective
    optimizer: optax.GradientTransformation | None
    statistics: str
    num_samples: int | None
    max_steps: int

    def values(self, position: Position) -> dict[str, Array]:
        """The numbers themselves: within bounds by a sigmoid, positive by exp."""
        bounds = {field: ends for field, *ends in self.bounds}

        def value(field: str, at: Array) -> Array:
            if field in bounds:
                low, high = bounds[field]
                return low + (high - low) * jax.nn.sigmoid(at)
            return jnp.exp(at) if field in POSITIVE else at

        return {field: value(field, at) for field, at in position.items()}

    def position(self, values: Mapping[str, np.ndarray]) -> Position:
        """The inverse of ``values``."""
        bounds = {field: ends for field, *ends in self.bounds}

        def at(field: str, value: np.ndarray) -> np.ndarray:
            if field in bounds:
                low, high = bounds[field]
                return np.log((value - low) / (high - value))
            return np.log(value) if field in POSITIVE else value

        return {field: jnp.asarray(at(field, value), float) for field, value in values.items()}

    def network_at(self, values: Mapping[str, Any]) -> Network:
        """The specification with these numbers."""
        numbers, structure = jax.tree.flatten(self.network)
        for leaf in self.leaves:
            numbers[leaf.position] = values[leaf.field][leaf.place]
        return jax.tree.unflatten(structure, numbers)

    def theory(self, network: Network, x: Array | None) -> Theory:
        """What the objective is taken of."""
        options: Any = dict(statistics=self.statistics, num_samples=self.num_samples)
        return analyze(network, data=x, **options)


class State(NamedTuple):
    """A descent under way.

    Attributes:
        step: How many steps were taken; ``history`` is filled up to there.
        status: One of the codes above.
        position: Where it is.
        start: Where it began.
        memory: Of the optimizer.
        slope: The objective's gradient.
        way: The next step at full length.
        rate: How much of it is tried, halved until the objective falls enough.
        history: One row a step.
    """

    step: Array
    status: Array
    position: Position
    start: Position
    memory: Any
    slope: Position
    way: Position
    rate: Array
    history: dict[str, Array]


@dataclasses.dataclass(frozen=True, repr=False)
class Tuning:
    """What :func:`tune` returns.

    Attributes:
        network: The tuned specification.
        before: Theory at the start.
        after: Theory of the tuned one.
        status: ``"converged"``, ``"max_steps"``, ``"stalled"``, ``"diverged"`` or
            ``"independent"``, see :func:`tune`.
        message: The same in words, with what to do about it.
        history: By ``step``: objective, lambda_max, eta_max, and by ``layer`` too every field tuned
            (NaN where a layer has none).
    """

    network: Network
    before: Theory
    after: Theory
    status: str
    message: str
    history: xr.Dataset

    def raise_if_failed(self) -> "Tuning":
        """Returns itself.

        Raises:
            RuntimeError: the status is not ``"converged"``.
        """
        if self.status == "converged":
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
                for field in FIELDS
                if field in ends and np.isfinite(ends[field].sel(layer=layer)).all()
            )
            lines.append(f"  {layer}  {', '.join(parts)}")
        return "\n".join(lines)


SCALARS = ("objective", "lambda_max", "eta_max")


def tune(
    network: Network,
    objective: Objective,
    *,
    over: str | Sequence[str] = "gamma",
    shared: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | None = None,
    optimizer: optax.GradientTransformation | None = None,
    max_steps: int = 200,
    tolerance: float | None = None,
    momentum: float = 0.9,
    progress: bool = False,
) -> Tuning:
    """Changes numbers of a network until an objective of its theory is least.

    The descent is one compiled loop, and is compiled once for each structure and objective. gamma
    and the variances move on a logarithmic scale, beta on its own, and those with ``bounds`` on
    that of a sigmoid between them, which no step leaves. Float64 under ``jax.enable_x64()``.

    Args:
        network: The specification, with the numbers to start from. Inside a :class:`Repeat` one
            number serves all repetitions: to tune one for each, write the layers out, as ``mlp``
            does.
        objective: A function from :class:`Theory` to a scalar: one of ``mf.objectives``, or yours.
        over: The fields to tune: gamma, beta, weight_var, bias_var.
        shared: Whether all layers get the same value (at first the mean of theirs).
        bounds: For some of the fields (low, high).
        data: A batch, for the theory of these very inputs, see :func:`analyze`.
        statistics: As in :func:`analyze`.
        num_samples: As in :func:`analyze`.
        optimizer: Any of optax; None: L-BFGS, each step halved until the objective falls.
        max_steps: Most steps.
        tolerance: It has converged where no derivative of the objective with respect to the
            coordinates (the logarithm of gamma, beta itself) is larger, in units of
            max(1, |objective|); None: 1e-5, or in float32 the square root of eps, 3.5e-4.
        momentum: Of eta_max in the history.
        progress: Whether to show step and objective on a terminal.

    Returns:
        The tuned network, its theory and the history. The status is ``"diverged"`` where a number
        without bounds left its start by a factor of 100 (the objective has no minimum nearby, such
        as eta_max alone), or the objective was not finite, ``"independent"`` where the objective is
        not solved and does not depend on what is tuned, and ``"stalled"`` where no step makes it
        smaller though its derivative is not 0: a kink, or rounding.

    Raises:
        SpecError: for fields, numbers or options that make no sense.
        DataError: for data that does not fit.

    Accuracy:
        A learning rate as target is met to 5e-6, in float32 to 2e-4 (tests/test_tune.py).

    Example:
        >>> import meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm())
        >>> tuned = mf.tune(net, lambda theory: (theory.fisher.lambda_max / 50 - 1) ** 2)
        >>> tuned.status, round(float(tuned.after.fisher.lambda_max), 1)
        ('converged', 50.0)
    """
    check_positive_int("max_steps", max_steps)
    eta_max(1.0, momentum)  # pyright: ignore[reportArgumentType] - checks the momentum
    network.validate()
    if any(np.shape(number) for number in jax.tree.leaves(network)):
        cause, remedy = "some of its numbers are arrays", "tune one network at a time"
        raise problem(SpecError, "network", network, cause, remedy)
    network = jax.tree.map(float, network)
    fields = _checked_fields(network, over)
    setting = Problem(
        network=network,
        leaves=_leaves(network, fields, shared),
        bounds=_checked_bounds(bounds or {}, fields),
        objective=objective,
        optimizer=optimizer,
        statistics=statistics,
        num_samples=num_samples,
        max_steps=max_steps,
    )
    before = setting.theory(network, data)
    _check_scalar(objective, before)
    start = setting.position(_start(setting))
    # equal for all starts, so that they share what is compiled
    ones = {field: np.ones(len(at)) for field, at in start.items()}
    setting = dataclasses.replace(setting, network=setting.network_at(ones))
    if tolerance is None:
        tolerance = max(TOLERANCE, math.sqrt(jnp.finfo(before.kernel.dtype).eps))
    state, values = _descended(setting, start, data, tolerance, progress)
    tuned = setting.network_at(values)
    return Tuning(
        network=tuned,
        before=before,
        after=setting.theory(tuned, data),
        status=STATUS[state.status],
        message=_message(setting, state, tolerance),
        history=_history(setting, state, momentum),
    )


def _descended(
    setting: Problem, start: Position, data: Array | None, tolerance: float, progress: bool
) -> tuple[State, dict[str, list[float]]]:
    """The state at the end, on the host, and the numbers there."""
    state = _started(setting, start)
    console = Console(stderr=True, quiet=not progress)
    with console.status("Tuning: compiling") as line:
        state = jax.device_get(_descend(setting, state, data, tolerance, 1))
        if _independent(setting, state, data, tolerance):
            state = state._replace(status=INDEPENDENT)
        while state.status == RUNNING and state.step < setting.max_steps:
            limit = min(int(state.step) + CHUNK, setting.max_steps)
            state = jax.device_get(_descend(setting, state, data, tolerance, limit))
            line.update(f"Tuning: step {state.step}, objective {_last(state)['objective']:.4g}")
    last = _last(state)
    return state, {field: last[field].tolist() for field in state.position}


def _started(setting: Problem, start: Position) -> State:
    dtype = jnp.zeros(()).dtype
    columns = {name: () for name in ("objective", "lambda_max")}
    columns |= {field: at.shape for field, at in start.items()}
    return State(
        step=jnp.zeros((), int),
        status=jnp.asarray(RUNNING, int),
        position=start,
        start=start,
        memory=(setting.optimizer or QUASI_NEWTON).init(start),
        slope=jax.tree.map(jnp.zeros_like, start),
        way=jax.tree.map(jnp.zeros_like, start),
        rate=jnp.ones((), dtype),
        history={
            name: jnp.full((setting.max_steps, *shape), jnp.nan, dtype)
            for name, shape in columns.items()
        },
    )


def _descend_to(
    setting: Problem, state: State, data: Array | None, tolerance: Array, limit: Array
) -> State:
    """Goes on until the descent ends or has recorded so many steps.

    One evaluation a turn, of a trial that is taken or tried again at half the length: a line search
    of its own would be compiled as several more copies of theory and derivative.
    """
    searching = setting.optimizer is None
    optimizer = optax.with_extra_args_support(setting.optimizer or QUASI_NEWTON)

    def evaluate(position: Position):
        values = setting.values(position)
        theory = setting.theory(setting.network_at(values), data)
        value = setting.objective(theory)
        return value, dict(objective=value, lambda_max=theory.fisher.lambda_max, **values)

    def turn(state: State) -> State:
        trial = jax.tree.map(lambda at, way: at + state.rate * way, state.position, state.way)
        (value, row), slope = jax.value_and_grad(evaluate, has_aux=True)(trial)
        halved = state._replace(rate=state.rate / 2)
        status = jnp.where(halved.rate < SHORTEST, STALLED, RUNNING)
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
        return (state.status == RUNNING) & (state.step < limit)

    return jax.lax.while_loop(unfinished, turn, state)


def _sufficient(state: State) -> Array:
    """What a trial's objective may be at most: a share of the linear decrease, or rounding."""
    value = state.history["objective"][state.step - 1]
    rounding = 8 * jnp.finfo(value.dtype).eps * jnp.maximum(1.0, jnp.abs(value))
    return value + 1e-4 * state.rate * _dot(state.slope, state.way) + rounding


def _bounded(way: Position, slope: Position) -> Position:
    """At most LONGEST in any coordinate, and never uphill: then the gradient itself."""
    uphill = _dot(way, slope) >= 0
    way = jax.tree.map(lambda step, up: jnp.where(uphill, -up, step), way, slope)
    scale = jnp.minimum(1.0, LONGEST / jnp.maximum(_largest(way), jnp.finfo(float).tiny))
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
    """The state at a trial, which the history gains."""
    columns = {name: column.at[state.step].set(row[name]) for name, column in state.history.items()}
    status = _status(setting, trial, state.start, value, slope, tolerance)
    return state._replace(
        step=state.step + 1,
        status=status,
        position=trial,
        slope=slope,
        rate=jnp.ones_like(state.rate),
        history=columns,
    )


def _select(condition: Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _dot(a: Position, b: Position) -> Array:
    return jnp.sum(jnp.stack([jnp.sum(a[field] * b[field]) for field in a]))


_descend = compiled(_descend_to, ("setting",))


def _status(
    setting: Problem,
    position: Position,
    start: Position,
    value: Array,
    slope: Position,
    tolerance: Array,
) -> Array:
    steepest = _largest(slope)
    bounded = {field for field, *_ in setting.bounds}
    moved = {field: at - start[field] for field, at in position.items() if field not in bounded}
    far = [_largest(part) > _reach(field) for field, part in moved.items()]
    conditions = [
        ~(jnp.isfinite(value) & jnp.isfinite(steepest)),
        jnp.any(jnp.stack(far)) if far else jnp.zeros((), bool),
        steepest <= tolerance * jnp.maximum(1.0, jnp.abs(value)),
    ]
    results = [jnp.asarray(status, int) for status in (NOT_FINITE, RUNAWAY, CONVERGED)]
    return jnp.select(conditions, results, jnp.asarray(RUNNING, int))


def _reach(field: str) -> float:
    """How far a coordinate may go: a factor for those that are logarithms."""
    return math.log(FAR) if field in POSITIVE else FAR


def _largest(tree: Any) -> Array:
    return jnp.max(jnp.concatenate([jnp.abs(leaf) for leaf in jax.tree.leaves(tree)]))


def _independent(setting: Problem, state: State, data: Array | None, tolerance: float) -> bool:
    """Whether the objective, not being solved, is the same at the start and to both sides of it."""
    value = float(state.history["objective"][0])
    flat = FLAT * abs(value)
    if state.status == NOT_FINITE or abs(value) <= tolerance or _largest(state.slope) > flat:
        return False
    start, unravel = ravel_pytree(state.start)
    for factor in (0.5, 2.0):
        # each number by another amount: moving all alike may be the one thing that changes nothing
        change = math.log(factor) * jnp.cos(jnp.arange(start.size))
        moved = setting.values(unravel(start + change))
        network = setting.network_at({field: at.tolist() for field, at in moved.items()})
        if abs(float(setting.objective(setting.theory(network, data))) - value) > flat:
            return False
    return True


def _last(state: State) -> dict[str, Any]:
    """The last row of the history."""
    return {name: column[state.step - 1] for name, column in state.history.items()}


def _checked_fields(network: Network, over: str | Sequence[str]) -> tuple[str, ...]:
    """The fields named, in the order of ``FIELDS``."""
    named = (over,) if isinstance(over, str) else tuple(over)
    present = {leaf.field for leaf in _leaves(network, FIELDS, shared=False)}
    for field in named or ("",):
        if field not in present:
            cause = "no layer of this network has such a number"
            remedy = f"use one or more of {', '.join(name for name in FIELDS if name in present)}"
            raise problem(SpecError, "over", over, cause, remedy)
    return tuple(field for field in FIELDS if field in named)


def _checked_bounds(
    bounds: Mapping[str, tuple[float, float]], fields: Sequence[str]
) -> tuple[tuple[str, float, float], ...]:
    for field, ends in bounds.items():
        name = f"bounds[{field!r}]"
        if field not in fields:
            raise problem(SpecError, name, ends, "not tuned", f"use one of {', '.join(fields)}")
        least = 0.0 if field in POSITIVE else -math.inf
        if not (len(ends) == 2 and least <= ends[0] < ends[1] < math.inf and ends[0] > -math.inf):
            cause = "not two finite numbers, the lower one first"
            cause += " and not negative" * (field in POSITIVE)
            raise problem(SpecError, name, ends, cause, "give e.g. (0.05, 5)")
    return tuple((field, float(low), float(high)) for field, (low, high) in bounds.items())


def _leaves(network: Network, fields: Sequence[str], shared: bool) -> tuple[Leaf, ...]:
    """The numbers with these names, first layer to last."""
    leaves, count = [], dict.fromkeys(fields, 0)
    for index, (path, _) in enumerate(jax.tree_util.tree_leaves_with_path(network)):
        field = path[-1].name
        if field in count:
            layer = jax.tree_util.keystr(path[:-1], simple=True, separator="/")
            leaves.append(Leaf(index, field, layer, 0 if shared else count[field]))
            count[field] += 1
    return tuple(leaves)


def _start(setting: Problem) -> dict[str, np.ndarray]:
    """The numbers to start from, by field: those of the network, the mean of those that share."""
    numbers, values = jax.tree.leaves(setting.network), {}
    bounds = {field: ends for field, *ends in setting.bounds}
    for leaf in setting.leaves:
        value = numbers[leaf.position]
        low, high = bounds.get(leaf.field, (0.0 if leaf.field in POSITIVE else -math.inf, math.inf))
        if not low < value < high:
            name = f"{leaf.layer}.{leaf.field}"
            remedy = "start from a number between them, or do not tune it"
            raise problem(SpecError, name, value, f"not above {low:g} and below {high:g}", remedy)
        values.setdefault(leaf.field, {}).setdefault(leaf.place, []).append(value)
    return {
        field: np.array([np.mean(same) for same in places.values()])
        for field, places in values.items()
    }


def _check_scalar(objective: Objective, theory: Theory) -> None:
    value = objective(theory)
    if jnp.shape(value) != () or not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        cause, remedy = f"its value is {value!r}", "return one real number, such as a mean"
        raise problem(SpecError, "objective", objective, cause, remedy)


def _history(setting: Problem, state: State, momentum: float) -> xr.Dataset:
    layers = list(dict.fromkeys(leaf.layer for leaf in setting.leaves))
    columns = {name: column[: state.step] for name, column in state.history.items()}
    rate = eta_max(columns["lambda_max"], momentum)
    data: dict[str, Any] = {
        "objective": ("step", columns["objective"], dict(long_name=_name(setting.objective))),
        "lambda_max": ("step", columns["lambda_max"]),
        "eta_max": ("step", np.asarray(rate), dict(momentum=momentum)),
    }
    for field in state.position:
        values = np.full((int(state.step), len(layers)), np.nan)
        for leaf in setting.leaves:
            if leaf.field == field:
                values[:, layers.index(leaf.layer)] = columns[field][:, leaf.place]
        data[field] = (("step", "layer"), values)
    return xr.Dataset(data, dict(step=np.arange(int(state.step)), layer=layers))


def _name(objective: Objective) -> str:
    return getattr(objective, "__name__", None) or repr(objective)


def _message(setting: Problem, state: State, tolerance: float) -> str:
    fields, steps = tuple(state.position), int(state.step)
    names, last = " and ".join(fields), f"step {steps - 1}"
    others = [name for name in ("beta", *FIELDS) if name in _present(setting) - set(fields)]
    if state.status == CONVERGED:
        return f"converged at {last}"
    if state.status == NOT_FINITE:
        return f"the objective is not finite at {last}; start elsewhere or give bounds"
    if state.status == RUNAWAY:
        return (
            f"{names} left the start by a factor of {FAR:g} by {last} and the objective still "
            "falls: it has no minimum nearby; give bounds, or hold something fixed, as "
            "objectives.max_eta_max (a floor on the outputs) and objectives.target_eta_max do"
        )
    if state.status == INDEPENDENT:
        more = f"; tune {others[0]} as well: over={(*fields, others[0])!r}" if others else ""
        return f"the objective does not depend on {names}{more}"
    steepest = float(_largest(state.slope))
    if state.status == STALLED:
        return f"no step from {last} makes the objective smaller, derivative {steepest:.1e}"
    reached = f"derivative {steepest:.1e}, tolerance {tolerance:.1e}"
    return f"not converged at {last}: {reached}; raise max_steps"


def _present(setting: Problem) -> set[str]:
    """All fields of the network that can be tuned."""
    return {leaf.field for leaf in _leaves(setting.network, FIELDS, shared=False)}
