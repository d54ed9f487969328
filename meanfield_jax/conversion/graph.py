"""The graph of a recorded run: its layers, and what happens between them.

A value is a node of the graph and an elementwise function of it. A node is the inputs, the outcome
of a layer or of a pooling window, or a sum of branches.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.conversion.record import MARK, Recording
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.windows import pad_width

INNER = "jaxpr", "call_jaxpr", "fun_jaxpr"
"""Where an equation keeps the function that it calls."""

ELEMENTWISE = frozenset(
    """
    abs add add_any and atan2 cbrt ceil clamp convert_element_type copy cos cosh div eq erf erf_inv
    erfc exp exp2 expm1 floor ge gt integer_pow is_finite le log log1p logistic lt max min mul ne
    neg not optimization_barrier or pow round rsqrt select_n sign sin sinh sqrt square
    stop_gradient sub tan tanh
    """.split()  # noqa: SIM905
)

REARRANGING = frozenset(
    ["broadcast_in_dim", "reshape", "squeeze", "expand_dims", "transpose", "convert_element_type"]
)

Function = Callable[[Array], Array]
Shape = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Node:
    """One step of the run.

    Attributes:
        kind: ``"inputs"``, ``"layer"``, ``"columns"`` (some of a layer), ``"activation"``,
            ``"sum"``, ``"product"``, ``"concat"``, ``"mean"``, ``"max"``, ``"scale"``,
            ``"offset"``, ``"flatten"``, ``"row"`` (a map's positions in one row), ``"turn"``
            (positions and channels exchanged), ``"avg_pool"`` or ``"max_pool"``.
        inputs: The nodes before it.
        shape: Shape of its values, with the samples.
        detail: The layer's path, that and the range of its columns, the function, or the window.
        order: Its place in the run.
        turned: Whether positions are its last axis, and channels the one before.
        positions: (height, width) of the map that its positions are of, as far as is known.
    """

    kind: str
    inputs: tuple["Node", ...]
    shape: Shape
    detail: Any = None
    order: int = 0
    turned: bool = False
    positions: Shape = ()


@dataclasses.dataclass(frozen=True)
class Value:
    """A value that depends on the inputs: an elementwise function of a node, None for itself."""

    node: Node
    function: Function | None = None


@dataclasses.dataclass(frozen=True)
class Known:
    """A value that depends neither on inputs nor on parameters; None if it is not uniform."""

    number: Any
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A value that depends on parameters alone.

    Attributes:
        name: The path of the (first) parameter.
        places: For each entry, which of the parameter's numbers it is; None if it is a function of
            them.
    """

    name: str
    places: np.ndarray | None


def read(recording: Recording) -> Node:
    """The node of the outputs.

    Args:
        recording: What :func:`record` returned.

    Returns:
        The last node, from which all others are reached through ``inputs``.

    Raises:
        SpecError: if a step has no theory.
    """
    return _Reader().outputs(recording)


class _Reader:
    """Walks through the equations of a run in their order."""

    def __init__(self):
        self.count = 0
        self.activations: dict[tuple[int, int], Node] = {}
        self.factors = set[str]()
        self.concats: list[tuple[tuple[Node, ...], Node]] = []
        self.maps: dict[int, Shape] = {}

    def node(self, kind: str, inputs: tuple[Node, ...], shape: Shape, detail: Any = None) -> Node:
        self.count += 1
        in_row = len(shape) == 3
        turned = in_row and bool(inputs) and inputs[0].turned != (kind == "turn")
        positions = shape[1:3] if len(shape) == 4 else ()
        if in_row:
            count = shape[2 if turned else 1]
            positions = self.maps.get(count, (count, 1))
        return Node(kind, inputs, tuple(shape), detail, self.count, turned, positions)

    def outputs(self, recording: Recording) -> Node:
        closed = recording.jaxpr
        variables = closed.jaxpr.invars
        num_inputs = len(variables) - len(recording.names)
        if num_inputs != 1 or len(closed.jaxpr.outvars) != 1:
            cause = f"it has {num_inputs} inputs and {len(closed.jaxpr.outvars)} outputs"
            remedy = "pass a model of one array that returns one array"
            raise problem(SpecError, "model", "several arrays", cause, remedy)
        given: list[Any] = [
            Parameter(name, np.arange(var.aval.size).reshape(var.aval.shape))
            for name, var in zip(recording.names, variables, strict=False)
        ]
        given.append(Value(self.node("inputs", (), variables[-1].aval.shape)))
        (found,) = self.run(closed.jaxpr, closed.consts, given)
        if not isinstance(found, Value):
            cause, remedy = "its outputs do not depend on its inputs", "check the model's call"
            raise problem(SpecError, "model", "constant", cause, remedy)
        return self.node_of(found)

    def run(self, jaxpr: Any, consts: Any, given: list[Any]) -> list[Any]:
        """The values of the outputs of a function of these values."""
        values: dict[Any, Any] = dict(zip(jaxpr.invars, given, strict=True))
        values |= {v: _known(c) for v, c in zip(jaxpr.constvars, consts, strict=True)}
        needed = _needed(jaxpr)

        def value(atom: Any) -> Any:
            return _known(atom.val) if hasattr(atom, "val") else values[atom]

        for index, equation in enumerate(jaxpr.eqns):
            if index in needed:
                found = self.equation(equation, [value(atom) for atom in equation.invars])
                values |= dict(zip(equation.outvars, found, strict=True))
        return [value(atom) for atom in jaxpr.outvars]

    def equation(self, equation: Any, given: list[Any]) -> list[Any]:
        """The values that one equation gives."""
        kind, shape = equation.primitive.name, equation.outvars[0].aval.shape
        inner = next((equation.params[n] for n in INNER if n in equation.params), None)
        name = str(equation.params.get("name", ""))
        if name.startswith(MARK):
            before = self.node_of(given[0])
            return [Value(self.node("layer", (before,), shape, name.removeprefix(MARK)))]
        if inner is not None and kind not in ("scan", "while", "cond"):
            jaxpr = getattr(inner, "jaxpr", inner)
            return self.run(jaxpr, getattr(inner, "consts", ()), given)
        if not any(isinstance(value, Value) for value in given):
            return self.without_inputs(equation, given)
        if kind == "split":
            ends = np.cumsum(equation.params["sizes"]).tolist()
            ranges = zip([0, *ends], ends, equation.outvars, strict=False)
            axis = equation.params["axis"]
            return [self.columns(given[0], axis, (a, b), var.aval.shape) for a, b, var in ranges]
        return [self.step(kind, equation, given, tuple(shape))]

    def without_inputs(self, equation: Any, given: list[Any]) -> list[Any]:
        """A value that depends on constants and parameters alone."""
        names = [value.name for value in given if isinstance(value, Parameter)]
        shapes = [variable.aval.shape for variable in equation.outvars]
        if names:
            kept = len(given) == 1 and equation.primitive.name in REARRANGING
            places = given[0].places if kept else None
            if places is not None and equation.primitive.name != "convert_element_type":
                places = np.asarray(equation.primitive.bind(jnp.asarray(places), **equation.params))
            return [Parameter(names[0], places) for _ in shapes]
        if all(value.number is not None for value in given):
            arrays = [jnp.full(value.shape, value.number) for value in given]
            found = equation.primitive.bind(*arrays, **equation.params)
            several = equation.primitive.multiple_results
            return [_known(part) for part in (found if several else [found])]
        return [Known(None, shape) for shape in shapes]

    def step(self, kind: str, equation: Any, given: list[Any], shape: Shape) -> Any:
        """A value that depends on the inputs."""
        params = [value for value in given if isinstance(value, Parameter)]
        values = [value for value in given if isinstance(value, Value)]
        first, options = values[0], equation.params
        if params:
            return self.scaled(kind, params[0], values, shape)
        if kind in ("reshape", "squeeze", "expand_dims"):
            return self.reshaped(first, shape)
        if kind == "broadcast_in_dim" and shape == first.node.shape:
            return first
        if kind == "transpose" and len(shape) == 3 and tuple(options["permutation"]) == (0, 2, 1):
            return Value(self.node("turn", (self.node_of(first),), shape))
        if kind == "slice" and options["strides"] is None:
            starts, ends = options["start_indices"], options["limit_indices"]
            cut = [i for i, size in enumerate(first.node.shape) if ends[i] - starts[i] < size]
            if len(cut) == 1:
                return self.columns(first, cut[0], (starts[cut[0]], ends[cut[0]]), shape)
        if kind == "concatenate" and len(values) == len(given):
            return self.concatenated(options["dimension"], values, shape)
        if kind in ELEMENTWISE and all(value.node.shape == shape for value in values):
            return self.elementwise(kind, equation, given)
        positions = {4: (1, 2), 3: (2,) if first.node.turned else (1,)}
        over_map = tuple(options.get("axes", ())) == positions.get(len(first.node.shape))
        if kind == "reduce_max" and over_map and len(first.node.shape) == 4:
            return Value(self.node("max", (self.node_of(first),), shape))
        if kind == "reduce_sum" and over_map:
            size = math.prod(first.node.positions)
            return Value(self.node("mean", (self.node_of(first),), shape), lambda x: x * size)
        if kind in ("reduce_window_sum", "reduce_window_max") and len(shape) == 4:
            return self.pooled(kind, options, first, shape)
        raise self.unknown(kind, first)

    def scaled(self, kind: str, param: Parameter, values: list[Value], shape: Shape) -> Value:
        """A product with, or a sum of, a parameter of the model's own."""
        per = None
        if param.places is not None and len(values) == 1 and not values[0].node.turned:
            per = _per(np.broadcast_to(param.places, shape))
        plain = per in {"mul": ("layer", "channel"), "add": ("channel", "position")}.get(kind, ())
        if plain and param.name not in self.factors:
            self.factors.add(param.name)
            kind = {"mul": "scale", "add": "offset"}[kind]
            return Value(self.node(kind, (self.node_of(values[0]),), shape, param.name))
        cause = (
            "a parameter outside of Flax's layers, of which only factors of a layer or of channels "
            "and offsets of channels or positions, used once, have a theory"
        )
        remedy = "measure the model with mf.fisher_operator(model, x)"
        raise problem(SpecError, param.name, kind, cause, remedy)

    def reshaped(self, value: Value, shape: Shape) -> Value:
        before = value.node.shape
        if shape == before:
            return value
        if len(shape) == 2 and shape[0] == before[0] and len(before) > 2:
            return Value(self.node("flatten", (self.node_of(value),), shape))
        if len(before) == 4 and shape == (before[0], before[1] * before[2], before[3]):
            self.maps[shape[1]] = before[1:3]
            return Value(self.node("row", (self.node_of(value),), shape))
        raise self.unknown(f"a reshape from {before} to {shape}", value)

    def columns(self, value: Value, axis: int, place: tuple[int, int], shape: Shape) -> Value:
        """Some of the columns of a layer, which is as many independent layers as it has."""
        node = value.node
        if node.kind != "layer" or value.function or node.turned or axis != len(shape) - 1:
            raise self.unknown("a part of the values", value)
        return Value(self.node("columns", node.inputs, shape, (node.detail, *place)))

    def concatenated(self, axis: int, values: list[Value], shape: Shape) -> Value:
        """Branches side by side; those of an earlier concatenation are taken as its outcome."""
        inputs = tuple(self.node_of(value) for value in values)
        if axis != len(shape) - 1 or any(node.turned for node in inputs):
            raise self.unknown(f"a concatenation along axis {axis}", values[0])
        merged = inputs
        for earlier, node in reversed(self.concats):
            size = len(earlier)
            for place in range(len(merged) - size + 1):
                if merged[place : place + size] == earlier:
                    merged = (*merged[:place], node, *merged[place + size :])
                    break
        if len(merged) == 1:
            return Value(merged[0])
        node = self.node("concat", merged, shape)
        self.concats.append((inputs, node))
        return Value(node)

    def elementwise(self, kind: str, equation: Any, given: list[Any]) -> Value:
        values = [value for value in given if isinstance(value, Value)]
        nodes = {id(value.node) for value in values}
        if any(isinstance(value, Known) and value.number is None for value in given):
            cause = "an array that is not one number"
            raise self.unknown(f"{kind} with {cause}", values[0])
        if len(nodes) > 1:
            names = {"add": "sum", "add_any": "sum", "mul": "product"}
            if kind in names and len(given) == 2:
                inputs = tuple(self.node_of(value) for value in values)
                return Value(self.node(names[kind], inputs, inputs[0].shape))
            raise self.unknown(f"{kind} of two branches", values[0])
        primitive, options = equation.primitive, equation.params

        def function(x: Array) -> Array:
            arrays = [
                jnp.full_like(x, v.number, jnp.result_type(v.number))
                if isinstance(v, Known)
                else (x if v.function is None else v.function(x))
                for v in given
            ]
            if primitive.name in ("convert_element_type", "optimization_barrier", "copy"):
                return arrays[0]
            return primitive.bind(*(_in_dtype(array, x.dtype) for array in arrays), **options)

        return Value(values[0].node, function)

    def pooled(self, kind: str, options: dict[str, Any], value: Value, shape: Shape) -> Value:
        window, strides = options["window_dimensions"], options["window_strides"]
        dilated = any(
            size != 1 for name in ("base_dilation", "window_dilation") for size in options[name]
        )
        square = window[1] == window[2] and strides[1] == strides[2]
        if dilated or not square or (window[0], window[3]) != (1, 1):
            raise self.unknown(f"a pooling window of shape {window}", value)
        side, stride = window[1], strides[1]
        pads = options["padding"][1:3]
        detail = side, stride, _padding(pads, value.node.shape[1:3], side, stride)
        if detail[2] is None:
            raise self.unknown(f"a pooling window with padding {pads}", value)
        if kind == "reduce_window_max":
            return Value(self.node("max_pool", (self.node_of(value),), shape, detail))
        node = self.node("avg_pool", (self.node_of(value),), shape, detail)
        return Value(node, lambda x: x * side**2)

    def node_of(self, value: Value) -> Node:
        """The node of a value, with its function as a node of its own."""
        if value.function is None:
            return value.node
        key = id(value.node), id(value.function)
        if key not in self.activations:
            node = self.node("activation", (value.node,), value.node.shape, value.function)
            self.activations[key] = node
        return self.activations[key]

    def unknown(self, what: str, value: Value) -> ValueError:
        """The error that a step has no theory, at the last layer before it."""
        node = value.node
        while node.kind != "layer" and node.inputs:
            node = node.inputs[0]
        path = node.detail if node.kind == "layer" else "the inputs"
        remedy = "measure the model with mf.fisher_operator(model, x)"
        return problem(SpecError, f"after {path}", what, "it has no theory", remedy)


def _per(places: np.ndarray) -> str | None:
    """What the numbers of a parameter are of, if each stands where it should; else None."""
    one = places[:1]
    parts = dict(layer=one.ravel()[:1], channel=one.reshape(-1, one.shape[-1])[0], position=one)
    for per, part in parts.items():
        if np.unique(part).size == part.size and (places == part).all():
            return per
    return None


def _in_dtype(array: Array, dtype: Any) -> Array:
    """The array; if it is of floating point, in this dtype."""
    return array.astype(dtype) if jnp.issubdtype(array.dtype, jnp.floating) else array


def _known(value: Any) -> Known:
    """A constant, whose number is None unless all its entries are equal."""
    value = jnp.asarray(value)
    if isinstance(value, Tracer) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return Known(None, value.shape)
    array = np.asarray(value)
    uniform = array.size > 0 and bool((array == array.ravel()[0]).all())
    return Known(array.ravel()[0] if uniform else None, array.shape)


def _needed(jaxpr: Any) -> set[int]:
    """The equations on which the outputs depend."""
    wanted = {v for v in jaxpr.outvars if not hasattr(v, "val")}
    needed = set[int]()
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        if wanted & set(equation.outvars):
            needed.add(index)
            wanted |= {v for v in equation.invars if not hasattr(v, "val")}
    return needed


def _padding(pads: Any, sizes: Shape, side: int, stride: int) -> str | int | None:
    """The padding as a layer has it; None if it has no such padding."""
    pads = tuple(map(tuple, pads))
    for padding in ("VALID", "SAME"):
        if pads == tuple(pad_width(size, side, stride, padding) for size in sizes):
            return padding
    numbers = set(np.ravel(pads).tolist())
    return int(numbers.pop()) if len(numbers) == 1 else None
