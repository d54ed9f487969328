"""A recorded graph as the layers of a specification, with the path of each in the model."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.conversion.graph import Node
from meanfield_jax.conversion.modules import Part, as_layer, over_positions
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.nonlinearities import NONLINEARITIES
from meanfield_jax.layers import (
    Activation,
    AvgPool,
    Concat,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Layer,
    MaxPool,
    Offset,
    Product,
    Residual,
    Scale,
    Sequential,
)

GRID = np.linspace(-10, 10, 4001)
"""Where an elementwise function is looked at."""

EQUAL = 1e-5
"""Largest difference between two functions, relative to 1 + |x|, that are taken to be equal."""


class Translation:
    """The layers that stand for a graph.

    Attributes:
        parts: The layers of Flax, by path.
        params: The model's parameters outside of them, by path.
        variances: As in ``Network.from_flax``.
        paths: By identity of a layer, its path in the model.
    """

    def __init__(self, parts: dict[str, Part], params: dict[str, Array], variances: str):
        self.parts, self.params, self.variances = parts, params, variances
        self.paths: dict[int, str] = {}
        self.taken: dict[str, list[tuple[float, float]]] = {}

    def layers(self, last: Node) -> tuple[Layer, ...]:
        """The layers from the inputs to this node."""
        first = last
        while first.inputs:
            first = first.inputs[0]
        return self.between(first, last, _dominators(last))

    def between(self, first: Node, last: Node, before: dict[Node, list[Node]]) -> tuple[Layer, ...]:
        """The layers after one node up to another, through which every path to it leads."""
        found: list[Layer] = []
        while last is not first:
            if last.kind in ("sum", "product", "concat"):
                common = set.intersection(*(set(before[node]) for node in last.inputs))
                start = max(common, key=lambda node: node.order)
                branches = [self.between(start, node, before) for node in last.inputs]
                found.append(self.joined(branches, last))
                last = start
            else:
                found.append(self.layer(last))
                (last,) = last.inputs
        return _pools_first([la for la in reversed(found) if not _is_identity(la)])

    def joined(self, branches: list[tuple[Layer, ...]], node: Node) -> Layer:
        """The layer in which several branches come together."""
        if node.kind == "sum":
            return self.residual(branches, node)
        layers = tuple(map(Sequential, branches))
        return Concat(layers) if node.kind == "concat" else Product(*layers)

    def residual(self, branches: list[tuple[Layer, ...]], node: Node) -> Layer:
        """The sum of two branches, one of which ends in random weights."""
        fits = [Sequential(branch).ends_in_weights for branch in branches]
        if not any(fits):
            last = (type(branch[-1]).__name__ if branch else "x" for branch in branches)
            given = " and ".join(last)
            cause = "neither of the two ends in random weights, so that they are not independent"
            remedy = "measure the model with mf.fisher_operator(model, x)"
            raise problem(SpecError, f"sum of shape {node.shape[1:]}", given, cause, remedy)
        branch = max((0, 1), key=lambda side: (fits[side], len(branches[side])))
        return Residual(Sequential(branches[branch]), Sequential(branches[1 - branch]))

    def layer(self, node: Node) -> Layer:
        """The layer of one node."""
        detail = node.detail
        match node.kind:
            case "layer" | "scale" | "offset":
                layer = self.of_path(detail, node)
                self.paths[id(layer)] = detail
                return layer
            case "columns":
                path, first, last = detail
                layer = self.of_path(path, node, first, last)
                if not isinstance(layer, (Dense, Conv)) or getattr(layer, "groups", 1) > 1:
                    raise self.parts[path].refuse("features", "a part of its values has no theory")
                layer = layer.replace(width=last - first)
                self.paths[id(layer)] = f"{path}[{first}:{last}]"
                return layer
            case "row" | "turn":
                return Sequential()
            case "activation":
                return activation(detail)
            case "flatten":
                return Flatten()
            case "mean":
                return GlobalMeanPool()
            case "max":
                side = node.inputs[0].shape[1]
                return Sequential((MaxPool(side, side), GlobalMeanPool()))
            case "avg_pool":
                return AvgPool(*detail)
            case _:
                return MaxPool(*detail)

    def of_path(self, path: str, node: Node, first: float = 0, last: float = math.inf) -> Layer:
        """A layer of Flax, or a factor; each column may stand in one place of the specification."""
        taken = self.taken.setdefault(path, [])
        if any(first < end and start < last for start, end in taken):
            cause = "several branches go on from its values, which has no theory"
            remedy = "measure the model with mf.fisher_operator(model, x)"
            raise problem(SpecError, path, node.kind, cause, remedy)
        taken.append((first, last))
        if node.kind == "scale":
            return self.scale(path)
        if node.kind == "offset":
            value = np.asarray(self.params[path], np.float64)
            per = "channel" if value.size == node.shape[-1] else "position"
            return Offset(float(np.mean(value**2)), per)
        if node.inputs[0].turned:
            return over_positions(self.parts[path], self.variances, node.positions)
        return as_layer(self.parts[path], self.variances)

    def scale(self, name: str) -> Scale:
        """A factor that is a parameter of the model."""
        value = np.asarray(self.params[name], np.float64)
        per = "layer" if value.size == 1 else "channel"
        return Scale(float(np.sqrt(np.mean(value**2))), per)


def activation(function: Callable[[Array], Array]) -> Layer:
    """An elementwise function as a layer: one with a name, a factor, or the function itself."""
    x = jnp.asarray(GRID, jnp.float32)
    values, size = np.asarray(function(x), np.float64), 1 + np.abs(GRID)
    for name, known in NONLINEARITIES.items():
        if np.all(np.abs(np.asarray(known.function(x), np.float64) - values) < EQUAL * size):
            return Activation(name)
    slope = float(values[-1] / GRID[-1])
    if np.all(np.abs(values - slope * GRID) < EQUAL * size):
        return Scale(slope, "none")
    return Activation(function, _kinks(values))


def _kinks(values: np.ndarray) -> tuple[float, ...]:
    """Points of the grid where the slope jumps, to the step of the grid."""
    slopes = np.diff(values) / np.diff(GRID)
    jumps = np.abs(np.diff(slopes))
    usual = np.median(jumps) + 1e-3
    return tuple(float(GRID[1:-1][place]) for place in np.flatnonzero(jumps > 30 * usual))


def _is_identity(layer: Layer) -> bool:
    if layer == Sequential():
        return True
    if isinstance(layer, Activation):
        return layer.function == "identity"
    return isinstance(layer, Scale) and layer.per == "none" and math.isclose(layer.value, 1)


def _pools_first(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers with every MaxPool before the increasing activation that it follows."""
    found: list[Layer] = []
    for layer in layers:
        place = len(found)
        if isinstance(layer, MaxPool) and found and isinstance(found[-1], Activation):
            values = np.asarray(found[-1].nonlinearity.function(jnp.asarray(GRID)))
            place -= bool(np.all(np.diff(values) >= 0))
        found.insert(place, layer)
    return tuple(found)


def _dominators(last: Node) -> dict[Node, list[Node]]:
    """For every node, those through which all paths from the inputs to it lead, itself included."""
    nodes: dict[int, Node] = {}
    waiting = [last]
    while waiting:
        node = waiting.pop()
        if node.order not in nodes:
            nodes[node.order] = node
            waiting += node.inputs
    found: dict[Any, set[Node]] = {}
    for _, node in sorted(nodes.items()):
        through = [found[before] for before in node.inputs]
        found[node] = {node} | (set.intersection(*through) if through else set())
    return {node: list(through) for node, through in found.items()}
