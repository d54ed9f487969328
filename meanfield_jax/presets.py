"""Common networks: the presets ``mlp``, ``cnn`` and ``preact_resnet``."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import MOST_UNITS, check_choice, number, sequence, whole
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import (
    Activation,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Layer,
    Residual,
    Sequential,
)
from meanfield_jax.layers.base import as_layer, norm_layers
from meanfield_jax.limits import within
from meanfield_jax.network import Network

INITS = dict(paper=(2.0, 0.5), he=(2.0, 0.0), flax=(1.0, 0.0))
"""Variances of weights (times the fan-in) and biases, by whose initialization they are."""


@checked(weight_var=number, bias_var=number)
def mlp(
    widths: Sequence[int],
    *,
    inputs: int,
    outputs: int,
    activation: str | Callable[[Array], Array] | Activation = "relu",
    norm: Layer | type[Layer] | str | None = None,
    init: str = "paper",
    weight_var: float | Array | None = None,
    bias_var: float | Array | None = None,
) -> Network:
    """A fully connected network: [Dense, norm, activation] for each width, then Dense(outputs).

    Args:
        widths: Number of units of each hidden layer.
        inputs: Number of input features.
        outputs: Number of output units, C.
        activation: A name, a function, or an :class:`Activation`.
        norm: A layer inserted before each activation, such as ``BatchNorm(gamma=1.0)``; also its
            class, or its name, such as ``"batch"``.
        init: Whose initialization the variances are: ``"paper"`` (Wei et al. 2019: 2 and 0.5),
            ``"he"`` (He et al. 2015: 2 and 0) or ``"flax"`` (Flax's default layers: 1 and 0).
        weight_var: sigma_w^2 of every layer; None: that of ``init``.
        bias_var: sigma_b^2 of every layer; None: that of ``init``.

    Returns:
        The specification.

    Example:
        >>> import meanfield_jax as mf
        >>> mf.mlp([1000] * 3, inputs=784, outputs=10).num_parameters
        2797010
    """
    widths, norm = _blocks("widths", widths), _norm("norm", norm, widths)
    weight_var, bias_var = _variances(init, weight_var, bias_var)
    layers: list[Layer] = []
    for width in widths:
        layers += _around(norm, Dense(width, weight_var, bias_var), activation)
    return Network((inputs,), (*layers, Dense(outputs, weight_var, bias_var)))


@checked(weight_var=number, bias_var=number)
def cnn(
    channels: Sequence[int],
    *,
    inputs: tuple[int, ...] = (32, 32, 3),
    outputs: int = 10,
    kernel_size: int = 3,
    stride: int = 2,
    padding: str = "SAME",
    head: str = "flatten",
    activation: str | Callable[[Array], Array] | Activation = "relu",
    norm: Layer | type[Layer] | str | None = None,
    init: str = "paper",
    weight_var: float | Array | None = None,
    bias_var: float | Array | None = None,
) -> Network:
    """A convolutional network: [Conv, norm, activation] per entry, a head, then Dense(outputs).

    Args:
        channels: Number of channels of each convolution.
        inputs: (height, width, channels) of the images.
        outputs: Number of output units, C.
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.
        head: ``"flatten"`` or ``"mean"`` (over positions).
        activation: A name, a function, or an :class:`Activation`.
        norm: A layer inserted before each activation, such as ``BatchNorm(gamma=1.0)``; also its
            class, or its name, such as ``"batch"``.
        init: Whose initialization the variances are: ``"paper"`` (Wei et al. 2019: 2 and 0.5),
            ``"he"`` (He et al. 2015: 2 and 0) or ``"flax"`` (Flax's default layers: 1 and 0).
        weight_var: sigma_w^2 of every layer; None: that of ``init``.
        bias_var: sigma_b^2 of every layer; None: that of ``init``.

    Returns:
        The specification.

    Example:
        >>> import meanfield_jax as mf
        >>> mf.cnn([30, 60, 90], norm=mf.BatchNorm()).output_shape
        (10,)
    """
    heads: dict[str, Layer] = {"flatten": Flatten(), "mean": GlobalMeanPool()}
    if not isinstance(head, str) or head not in heads:
        raise problem(SpecError, "head", head, "unknown", "use 'flatten' or 'mean'")
    channels, norm = _blocks("channels", channels), _norm("norm", norm, channels)
    weight_var, bias_var = _variances(init, weight_var, bias_var)
    layers: list[Layer] = []
    for width in channels:
        conv = Conv(width, kernel_size, stride, padding, weight_var, bias_var)
        layers += _around(norm, conv, activation)
    return Network(inputs, (*layers, heads[head], Dense(outputs, weight_var, bias_var)))


@checked(weight_var=number, bias_var=number)
def preact_resnet(
    channels: Sequence[int],
    *,
    blocks: int = 2,
    inputs: tuple[int, ...] = (32, 32, 3),
    outputs: int = 10,
    activation: str | Callable[[Array], Array] | Activation = "relu",
    norm: Layer | type[Layer] | str | None = None,
    init: str = "he",
    weight_var: float | Array | None = None,
    bias_var: float | Array | None = None,
) -> Network:
    """A residual network that normalizes before weights, as He et al. 2016 (arXiv:1603.05027).

    It begins with a 3x3 convolution of stride 1. Each stage has residual blocks
    x + Conv(phi(norm(Conv(phi(norm(x)))))); all stages but the first begin with
    [norm, phi, Conv of stride 2], which sets their number of channels. At the end there are norm,
    phi, the mean over positions and Dense(outputs).

    Departure: a change of resolution is not a residual block, so that there is no projected
    shortcut; and biases are drawn (with variance 0), where He et al. have none.

    Args:
        channels: Number of channels of each stage; stages after the first halve the resolution.
        blocks: Number of residual blocks in each stage.
        inputs: (height, width, channels) of the images.
        outputs: Number of output units, C.
        activation: A name, a function, or an :class:`Activation`.
        norm: A layer inserted before each activation, such as ``BatchNorm(gamma=1.0)``; also its
            class, or its name, such as ``"batch"``.
        init: Whose initialization the variances are: ``"paper"`` (Wei et al. 2019: 2 and 0.5),
            ``"he"`` (He et al. 2015: 2 and 0) or ``"flax"`` (Flax's default layers: 1 and 0).
        weight_var: sigma_w^2 of every layer; None: that of ``init``.
        bias_var: sigma_b^2 of every layer; None: that of ``init``.

    Returns:
        The specification.

    Example:
        >>> import meanfield_jax as mf
        >>> mf.preact_resnet([16, 32, 64], blocks=3, norm=mf.BatchNorm()).num_parameters
        316778
    """
    blocks = whole("blocks", blocks, 1)
    channels, norm = _blocks("channels", channels), _norm("norm", norm, channels)
    weight_var, bias_var = _variances(init, weight_var, bias_var)
    if len(channels) == 0:
        raise problem(SpecError, "channels", channels, "empty", "pass at least one number")
    within("OPERATIONS", "blocks", blocks, 2 * blocks * len(channels))

    def conv(width: int, stride: int = 1) -> Conv:
        return Conv(width, 3, stride, "SAME", weight_var, bias_var)

    def before(weights: Conv) -> tuple[Layer, ...]:
        return (*_around(norm, None, activation), weights)

    def residual(width: int) -> Residual:
        inner = _around(norm, conv(width), activation)
        return Residual(Sequential((*_around(norm, None, activation), *inner, conv(width))))

    first, *rest = channels
    layers: list[Layer] = [conv(first), *[residual(first)] * blocks]
    for width in rest:
        layers += [*before(conv(width, stride=2)), *[residual(width)] * blocks]
    layers += [*_around(norm, None, activation), GlobalMeanPool()]
    return Network(inputs, (*layers, Dense(outputs, weight_var, bias_var)))


def _variances(
    init: str, weight_var: float | Array | None, bias_var: float | Array | None
) -> tuple[float | Array, float | Array]:
    """The variances that were given, else those of an initialization."""
    check_choice("init", init, tuple(INITS))
    weights, biases = INITS[init]
    return (
        weights if weight_var is None else weight_var,
        biases if bias_var is None else bias_var,
    )


def _blocks(argument: str, widths: Any) -> tuple[int, ...]:
    """The widths of a preset's layers, or stages, as integers."""
    within("OPERATIONS", argument, widths, len(sequence(argument, widths)))
    return tuple(whole(argument, width, 1, MOST_UNITS) for width in widths)


def _norm(argument: str, norm: Any, widths: Sequence[int]) -> Layer | None:
    """A norm given as a layer, by its name or by its class; None for no norm."""
    if isinstance(norm, str):
        check_choice(argument, norm, ("none", *norm_layers()))
        norm = norm_layers().get(norm)
    if norm is None:
        return None
    if isinstance(norm, type) and issubclass(norm, Layer) and norm.is_norm:
        return norm.fitting(widths)
    found = as_layer(argument, norm)
    if not (found.is_norm or found.norm_name):
        names = ", ".join(norm_layers())
        raise problem(SpecError, argument, norm, "not a norm", f"use one of {names}, or its layer")
    return found


def _around(norm: Layer | None, weights: Layer | None, activation) -> tuple[Layer, ...]:
    """Weights (if any), normalization and activation."""
    phi = activation if isinstance(activation, Activation) else Activation(activation)
    if norm is not None:
        return norm.around(weights, phi)
    return (phi,) if weights is None else (weights, phi)
