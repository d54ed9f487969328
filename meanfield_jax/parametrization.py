"""Parametrizations of the weights: neural tangent and maximal update."""

import math
from typing import Any

from flax import nnx

from meanfield_jax.checks import check_choice
from meanfield_jax.empirical.model import build, functional
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import Layer
from meanfield_jax.network import Network, walk


def parametrized(network: Network, kind: str, base: Network | None) -> Network:
    """The network of ``Network.in_parametrization``."""
    check_choice("kind", kind, ("ntk", "mup"))
    changes = iter(_neural_tangent(network) if kind == "ntk" else _maximal_update(network, base))

    def change(inner: Layer) -> Layer:
        return inner.replace(**next(changes)) if inner.is_weights else inner

    return network.replace(network.body.changed(change).layers)


def _neural_tangent(network: Network) -> list[dict[str, Any]]:
    """The changes in every layer of weights, in their order."""
    return [
        dict(multiplier=(layer.weight_var / fan_in) ** 0.5)
        for layer, fan_in in _weights(network).values()
    ]


def _maximal_update(network: Network, base: Network | None) -> list[dict[str, Any]]:
    """The changes in every layer of weights, in their order."""
    found = _weights(network)
    start = _weights(base) if isinstance(base, Network) else {}
    if start.keys() != found.keys():
        cause = "not a network of the same structure"
        remedy = "pass the network at the width at which nothing changes"
        raise problem(SpecError, "base", base, cause, remedy)
    changes = list[dict[str, Any]]()
    for path, (layer, fan_in) in found.items():
        before, fan_in_before = start[path]
        wider_in, wider_out = fan_in / fan_in_before, layer.width / before.width
        changes.append(
            dict(
                multiplier=layer.multiplier * math.sqrt(wider_out / wider_in),
                weight_var=layer.weight_var / (wider_in if wider_out == 1 else 1),
            )
        )
    return changes


def _weights(network: Network) -> dict[str, tuple[Any, int]]:
    """The layers of weights and their fan-in, by path."""
    model = nnx.eval_shape(lambda: build(network, rngs=nnx.Rngs(0)))
    shapes = {path: value.shape for path, value in functional(model)[1].items()}
    found = dict[str, tuple[Any, int]]()
    for path, layer in walk(network.body):
        if layer.is_weights:
            shape = shapes[f"{path}/kernel"]
            # a repeated block has a leading axis over its repetitions
            found[path] = layer, math.prod(shape[path.split("/").count("block") : -1])
    return found
