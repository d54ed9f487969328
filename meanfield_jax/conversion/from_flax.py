"""The specification of a Flax model, and a specification's numbers brought back into it."""

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.conversion.graph import read
from meanfield_jax.conversion.record import by_path, record
from meanfield_jax.conversion.translate import Translation
from meanfield_jax.empirical.model import path_name
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import Layer, MixPositions, Norm, Offset, Scale, SelfAttention
from meanfield_jax.network import walk

VARIANCES = "initial", "measured"


def layers_of(
    model: Any, x: Any, variances: str, call: Any
) -> tuple[tuple[int, ...], tuple[Layer, ...], dict[int, str]]:
    """Input shape and layers of a model, and by identity of a layer its path in the model."""
    recording = record(model, x, call)
    last = read(recording)
    translation = Translation(recording.parts, recording.params, variances)
    layers = translation.layers(last)
    first = last
    while first.inputs:
        first = first.inputs[0]
    if len(first.shape) == 3:
        cause = "sequences have no theory, only vectors and maps (height, width, channels)"
        remedy = "measure the model with mf.fisher_operator(model, x)"
        raise problem(SpecError, "x.shape", first.shape, cause, remedy)
    return first.shape[1:], layers, translation.paths


def applied(network: Any, model: Any) -> Any:
    """The model with the network's numbers, see ``Network.apply_to``."""
    nnx_model = isinstance(model, nnx.Module)
    params = by_path(nnx.state(model, nnx.Param) if nnx_model else model[1]["params"])
    layers = dict(walk(network.body))
    changed: dict[str, Array] = {}
    for place, path, *variances in network.origin:
        layer, changes = layers[place], dict[str, Any]()
        if isinstance(layer, Norm):
            changes = dict(scale=layer.gamma, bias=layer.beta)
        elif isinstance(layer, Scale):
            changed[path] = _filled(params, path, layer.value)
        elif isinstance(layer, Offset):
            changed[path] = params[path] * _factor(path, layer.bias_var, variances[1])
        elif isinstance(layer, SelfAttention):
            factor = _factor(path, layer.weight_var, variances[0])
            changed[f"{path}/out/kernel"] = params[f"{path}/out/kernel"] * factor
        elif isinstance(layer, MixPositions) or layer.is_weights:
            path, columns = _columns(path)
            changes = _rescaled(params | changed, path, columns, layer, *variances)
        for name, value in changes.items():
            if f"{path}/{name}" in params:
                changed[f"{path}/{name}"] = _filled(params, f"{path}/{name}", value)
    return _with_params(model, changed)


def _filled(params: dict[str, Array], path: str, value: Any) -> Array:
    """The value in the form of this parameter; raises SpecError if the model has none."""
    if path not in params:
        cause, remedy = "the model has no such parameter", "pass the model that the network is of"
        raise problem(SpecError, "model", path, cause, remedy)
    return jnp.broadcast_to(jnp.asarray(value, params[path].dtype), params[path].shape)


def _rescaled(
    params: dict[str, Array],
    path: str,
    columns: slice,
    layer: Any,
    weight_var: float,
    bias_var: float,
) -> dict[str, Array]:
    """Weights and biases multiplied so that they have the layer's variances instead of these."""
    if f"{path}/kernel" not in params:
        _filled(params, f"{path}/kernel", 0.0)

    def times(name: str, factor: float) -> Array:
        return params[f"{path}/{name}"].at[..., columns].multiply(factor)

    found = {"kernel": times("kernel", _factor(path, layer.weight_var, weight_var))}
    if layer.use_bias:
        found["bias"] = times("bias", _factor(path, layer.bias_var, bias_var))
    return found


def _columns(path: str) -> tuple[str, slice]:
    """Path and columns of a layer that is some columns of a model's layer, "path[first:last]"."""
    found = re.fullmatch(r"(.*)\[(\d+):(\d+)\]", path)
    return (found[1], slice(int(found[2]), int(found[3]))) if found else (path, slice(None))


def _factor(path: str, variance: Any, before: float) -> float:
    """The factor that gives values of one variance another one."""
    if variance == before:
        return 1.0
    if before == 0:
        cause, remedy = "the model's are 0 and cannot be scaled", "leave this variance at 0"
        raise problem(SpecError, f"{path} variance", variance, cause, remedy)
    return math.sqrt(variance / before)


def _with_params(model: Any, changed: dict[str, Array]) -> Any:
    """A copy of the model, or of a Linen module's variables, with some parameters changed."""

    def replace(path: tuple[Any, ...], value: Any) -> Any:
        return changed.get(path_name(path).removesuffix("/value"), value)

    if isinstance(model, nnx.Module):
        copy = nnx.clone(model)
        state = nnx.state(copy, nnx.Param)
        nnx.update(copy, jax.tree_util.tree_map_with_path(replace, state))
        return copy
    variables = model[1]
    params = jax.tree_util.tree_map_with_path(replace, variables["params"])
    return {**variables, "params": params}
