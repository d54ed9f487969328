"""The layers of Flax, NNX and Linen, as layers of a specification."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from jax import Array
from jax.nn import initializers
from jax.tree_util import tree_flatten_with_path

from meanfield_jax.empirical.model import path_name
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import (
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    GroupNorm,
    InstanceNorm,
    Layer,
    LayerNorm,
    MixPositions,
    RMSNorm,
    SelfAttention,
)
from meanfield_jax.layers.conv import PADDINGS

NORMS = "BatchNorm", "LayerNorm", "GroupNorm", "InstanceNorm", "RMSNorm"
ATTENTION = "MultiHeadAttention", "MultiHeadDotProductAttention", "SelfAttention"
KNOWN = frozenset(["Linear", "Dense", "Conv", "Dropout", *NORMS, *ATTENTION])
"""Classes of Flax that are layers of a specification."""

REFUSED = {
    "ConvTranspose": "a transposed convolution",
    "ConvLocal": "a convolution with weights of its own at every position",
    "Embed": "an embedding",
    "Einsum": "a general product",
    "LinearGeneral": "a product over several axes",
    "DenseGeneral": "a product over several axes",
    "PReLU": "an activation with a trainable slope",
    "LoRA": "a low-rank update",
    "LoRALinear": "a low-rank update",
    "SpectralNorm": "a normalization of weights",
    "WeightNorm": "a normalization of weights",
    "RNN": "a recurrent network",
    "LSTMCell": "a recurrent network",
    "OptimizedLSTMCell": "a recurrent network",
    "GRUCell": "a recurrent network",
    "SimpleCell": "a recurrent network",
    "MGUCell": "a recurrent network",
    "ConvLSTMCell": "a recurrent network",
    "Bidirectional": "a recurrent network",
}
"""Classes of Flax that have no theory, and what they are."""

TORCH = 1 / 3
"""The variance of the weights of PyTorch's layers, times the fan-in."""

CERTAIN = 4.0
"""Standard errors within which drawn weights are taken to come from a distribution."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer of Flax, whether NNX or Linen.

    Attributes:
        path: Its path in the model.
        kind: The name of its class.
        options: Its attributes.
        values: Its parameters.
        is_map: Whether its inputs are maps, (n, height, width, channels).
    """

    path: str
    kind: str
    options: Mapping[str, Any]
    values: Mapping[str, Any]
    is_map: bool

    def refuse(self, option: str, cause: str) -> ValueError:
        """The error that this option has no theory."""
        remedy = "measure the model with mf.fisher_operator(model, x)"
        return problem(SpecError, f"{self.path}.{option}", self.options.get(option), cause, remedy)


def nnx_part(path: str, kind: str, module: Any, is_map: bool) -> Part:
    """The part of an NNX layer of this class; ``is_map``: whether its inputs are maps."""
    return Part(path, kind, dict(vars(module)), by_path(nnx.state(module, nnx.Param)), is_map)


def linen_part(path: str, module: nn.Module, values: Mapping[str, Any], is_map: bool) -> Part:
    """The part of a Linen layer with these parameters; ``is_map``: as in :func:`nnx_part`."""
    options = {field.name: getattr(module, field.name) for field in dataclasses.fields(module)}
    return Part(path, type(module).__name__, options, by_path(values), is_map)


def by_path(params: Any) -> dict[str, Array]:
    """Parameters as a dictionary from paths such as "blocks/0/norm/scale"."""
    named, _ = tree_flatten_with_path(params)
    return {path_name(path).removesuffix("/value"): value for path, value in named}


def as_layer(part: Part, variances: str) -> Layer:
    """The layer of a specification; raises SpecError if an option has no theory."""
    return _TRANSLATIONS[part.kind](part, variances)


def over_positions(part: Part, variances: str, positions: tuple[int, ...]) -> Layer:
    """The layer if positions are the last axis; ``positions``: (height, width) after it."""
    if part.kind == "Dropout":
        return _dropout(part, variances)
    if part.kind not in ("Linear", "Dense"):
        raise part.refuse("axis", f"{part.kind} over positions has no theory")
    options = _checked_dense(part, variances)
    return MixPositions((positions[0], positions[1]), **options)


def _dense(part: Part, variances: str) -> Layer:
    options, width = _checked_dense(part, variances), _shape(part, "kernel")[-1]
    # on a map, the same weights at every position
    return Conv(width, 1, **options) if part.is_map else Dense(width, **options)


def _checked_dense(part: Part, variances: str) -> dict[str, Any]:
    if part.options.get("dot_general") not in (None, jax.lax.dot_general):
        raise part.refuse("dot_general", "a product other than JAX's own has no theory")
    return _variances(part, variances)


def _conv(part: Part, variances: str) -> Conv:
    options, shape = part.options, _shape(part, "kernel")
    sides = shape[:-2]
    if len(sides) != 2 or sides[0] != sides[1]:
        raise part.refuse("kernel_size", "only square windows of two dimensions have a theory")
    if options.get("mask") is not None:
        raise part.refuse("mask", "masked weights have no theory")
    if _same(part, "input_dilation") != 1:
        raise part.refuse("input_dilation", "a transposed convolution has no theory")
    return Conv(
        shape[-1],
        sides[0],
        _same(part, "strides"),
        _padding(part, sides[0]),
        groups=options["feature_group_count"],
        dilation=_same(part, "kernel_dilation"),
        **_variances(part, variances),
    )


def _attention(part: Part, variances: str) -> SelfAttention:
    options, names = part.options, ("query", "key", "value", "out")
    if options.get("normalize_qk") or options.get("decode"):
        name = "normalize_qk" if options.get("normalize_qk") else "decode"
        raise part.refuse(name, "only plain attention has a theory")
    if getattr(options["attention_fn"], "__name__", "") != "dot_product_attention":
        raise part.refuse("attention_fn", "only softmax attention has a theory")
    channels, heads, size = _shape(part, "query/kernel")
    if _shape(part, "out/kernel") != (heads, size, channels) or heads * size != channels:
        raise part.refuse("qkv_features", "as many features as channels have a theory")
    found = [_variance(part, f"{name}/kernel", (channels, channels), variances) for name in names]
    use_bias = "out/bias" in part.values
    return SelfAttention(heads, found[3], *found[:3], use_bias=use_bias)


def _same(part: Part, option: str) -> int:
    """The one number of an option that may be given for each axis."""
    value = part.options[option]
    numbers = {1} if value is None else set(np.ravel(value).tolist())
    if len(numbers) > 1:
        raise part.refuse(option, "different numbers for the two axes have no theory")
    return int(numbers.pop())


def _padding(part: Part, side: int) -> str | int:
    given = part.options["padding"]
    if isinstance(given, str):
        if given not in PADDINGS:
            raise part.refuse("padding", f"only {', '.join(PADDINGS)} and zeros have a theory")
        return given
    numbers = set(np.ravel(given).tolist())
    if len(numbers) > 1:
        raise part.refuse("padding", "different numbers of zeros on the sides have no theory")
    return int(numbers.pop())


def _norm(part: Part, **own: Any) -> dict[str, Any]:
    options = part.options
    use_bias = options.get("use_bias", False)
    if use_bias and not options["use_scale"]:
        raise part.refuse("use_scale", "a norm with an offset and no scale has no theory")
    scale, bias = _values(part, "scale", 1.0), _values(part, "bias", 0.0)
    return dict(
        gamma=float(np.sqrt(np.mean(scale**2))),
        beta=float(np.mean(bias)),
        eps=float(options["epsilon"]),
        trainable=options["use_scale"],
        **own,
    ) | ({} if part.kind == "RMSNorm" else dict(use_bias=use_bias))


def _batch_norm(part: Part, variances: str) -> BatchNorm:
    if part.options["axis"] not in (-1, None):
        raise part.refuse("axis", "only a norm of the last axis has a theory")
    return BatchNorm(**_norm(part))


def _layer_norm(part: Part, variances: str) -> LayerNorm:
    axes = part.options["reduction_axes"]
    axes = tuple(axes) if isinstance(axes, (tuple, list)) else (axes,)
    return LayerNorm(over_positions=len(axes) > 1 or not part.is_map, **_norm(part))


def _rms_norm(part: Part, variances: str) -> RMSNorm:
    return RMSNorm(**_norm(part))


def _group_norm(part: Part, variances: str) -> GroupNorm:
    groups, size = part.options["num_groups"], part.options["group_size"]
    if groups is None or (size is not None and size > 0):
        if "scale" not in part.values:
            raise part.refuse("group_size", "without a scale the number of channels is not known")
        groups = _shape(part, "scale")[0] // size
    return GroupNorm(num_groups=groups, **_norm(part))


def _instance_norm(part: Part, variances: str) -> InstanceNorm:
    return InstanceNorm(**_norm(part))


def _dropout(part: Part, variances: str) -> Dropout:
    return Dropout(float(part.options["rate"]))


_TRANSLATIONS = {
    "Linear": _dense,
    "Dense": _dense,
    "Conv": _conv,
    "BatchNorm": _batch_norm,
    "LayerNorm": _layer_norm,
    "RMSNorm": _rms_norm,
    "GroupNorm": _group_norm,
    "InstanceNorm": _instance_norm,
    "Dropout": _dropout,
    **dict.fromkeys(ATTENTION, _attention),
}


def _shape(part: Part, name: str) -> tuple[int, ...]:
    return tuple(part.values[name].shape)


def _values(part: Part, name: str, default: float) -> np.ndarray:
    value = part.values.get(name)
    return np.asarray(default if value is None else value, np.float64)


def _variances(part: Part, variances: str) -> dict[str, Any]:
    """The variances of weights (times the fan-in) and biases."""
    bias_var = float(np.mean(_values(part, "bias", 0.0) ** 2))
    weight_var = _variance(part, "kernel", _shape(part, "kernel"), variances)
    return dict(weight_var=weight_var, bias_var=bias_var, use_bias="bias" in part.values)


def _variance(part: Part, name: str, shape: tuple[int, ...], variances: str) -> float:
    """The variance of weights of this shape, times the fan-in."""
    kernel, fan_in = _values(part, name, 0.0).reshape(shape), math.prod(shape[:-1])
    measured = fan_in * float(np.mean(kernel**2))
    if variances == "measured":
        return measured
    own = "out_kernel_init" if name == "out/kernel" else ""
    declared = part.options.get(own) or part.options.get("kernel_init")
    if declared is None:
        return _recognized(measured, kernel, fan_in)
    return _declared(declared, kernel.shape, fan_in)


def _declared(initializer: Any, shape: tuple[int, ...], fan_in: int) -> float:
    """The variance of an initializer, exact if it is one of JAX's, times the fan-in."""
    key = jax.random.key(0)
    values = np.asarray(initializer(key, shape, np.float32), np.float64)
    for name, variance in _usual(shape, fan_in).items():
        for distribution in ("normal", "uniform"):
            usual = getattr(initializers, f"{name}_{distribution}")()
            if np.allclose(values, usual(key, shape, np.float32), rtol=1e-5):
                return variance
    return fan_in * float(np.mean(values**2))


def _recognized(weight_var: float, kernel: np.ndarray, fan_in: int) -> float:
    """The variance of the usual distribution from which these weights can have been drawn.

    Layers of NNX do not keep their initializer, so that several may fit: the first is Flax's own.

    Returns:
        Its variance times the fan-in; the measured one if none fits.
    """
    usual = [*_usual(kernel.shape, fan_in).values(), TORCH]
    error = CERTAIN * math.sqrt(2 / kernel.size)
    return next((v for v in usual if abs(weight_var - v) < error * v), weight_var)


def _usual(shape: tuple[int, ...], fan_in: int) -> dict[str, float]:
    """Variances of the usual distributions, times the fan-in, by their names in JAX."""
    fan_out = math.prod(shape[:-2]) * shape[-1]
    return {"lecun": 1.0, "he": 2.0, "glorot": 2 * fan_in / (fan_in + fan_out)}
