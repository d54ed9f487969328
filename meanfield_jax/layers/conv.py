"""Conv: a two-dimensional convolution with random weights and biases."""

import math
from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from meanfield_jax.checks import MOST_UNITS, check_choice, whole
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import PUBLISHED
from meanfield_jax.kernel.matrix import Window
from meanfield_jax.kernel.windows import windows
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Problem,
    Shape,
    Signal,
    layer,
    silent,
    tunable,
    variance_problems,
)
from meanfield_jax.layers.dense import (
    linear_options,
    linear_rule,
    multiplied,
    multiplier_problems,
)
from meanfield_jax.pytree import static

PADDINGS = ("SAME", "VALID", "CIRCULAR")


@layer
class Conv(Layer):
    """Convolution over a square window, W ~ N(0, weight_var / fan_in).

    fan_in = kernel_size^2 channels / groups. Rule, with <.> the average of the entries over all
    shifts within the window (zero where the window leaves a zero-padded map):
    K <- bias_var + weight_var <K>;  T <- fan_in <K_in> + 1 + weight_var <T>.

    Attributes:
        width: Number of output channels.
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: ``"SAME"`` (zeros), ``"VALID"`` (none), ``"CIRCULAR"`` (periodic), or the number of
            zeros on every side.
        weight_var: sigma_w^2, the variance of a weight times the fan-in.
        bias_var: sigma_b^2, the variance of a bias.
        use_bias: Whether there are biases; without them ``bias_var`` has no effect.
        groups: Number of groups of channels with weights of their own; as many as channels for a
            depthwise convolution.
        dilation: Step between neighbors within the window.
        multiplier: As in :class:`Dense`.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), section 3.2; Xiao et al. 2018.

        Departure: the paper treats all positions as alike. Here the moments are maps, so that the
        borders of zero-padded maps are taken into account; ``statistics="wei2019"`` treats
        ``"SAME"`` as circular, as published.

    Accuracy:
        That of the wide limit, in which a sum runs over many channels. With few channels in a group
        the outputs are not Gaussian: with a depthwise 3x3 convolution between BatchNorms the
        tangent kernel is off by 5 % (48 channels, tests/test_layer_options.py).
    """

    is_weights: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "mean"

    width: int = static(least=1)
    kernel_size: int = static(default=3, least=1)
    stride: int = static(default=1, least=1)
    padding: str | int = static(default="SAME")
    weight_var: float | Array = tunable(2.0, positive=True)
    bias_var: float | Array = tunable(0.5, positive=True)
    use_bias: bool = static(default=True)
    groups: int = static(default=1, least=1)
    dilation: int = static(default=1, least=1)
    multiplier: float | Array = silent(1.0)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "padding", checked_padding("Conv", self.padding))

    def output(self, signal: Signal) -> Signal:
        if len(signal.shape) != 3:
            cause = "Conv needs inputs of shape (height, width, channels)"
            remedy = "reshape the inputs, or use Dense for vectors"
            raise problem(SpecError, "input shape", signal.shape, cause, remedy)
        height, width, channels = signal.shape
        for name, count in (("inputs", channels), ("outputs", self.width)):
            if count % self.groups:
                cause = f"it does not divide the {count} channels of the {name}"
                remedy = "use a divisor, such as 1"
                raise problem(SpecError, "Conv.groups", self.groups, cause, remedy)
        if self.groups > 1 and signal.parts:
            cause = (
                "after a Concat, whose branches have variances of their own, groups have no theory"
            )
            remedy = "use one group"
            raise problem(SpecError, "Conv.groups", self.groups, cause, remedy)
        if self.stride > min(height, width):
            remedy = f"use a stride of at most {min(height, width)}"
            cause = f"it is larger than the {height}x{width} map"
            raise problem(SpecError, "Conv.stride", self.stride, cause, remedy)
        check_window("Conv", self.kernel_size, self._length, self.padding, signal.shape)
        return Signal((*self._map_after(height, width), self.width), gaussian=True, random=True)

    @property
    def _length(self) -> int:
        return (self.kernel_size - 1) * self.dilation + 1

    def _map_after(self, height: int, width: int) -> tuple[int, ...]:
        return map_after((height, width), self._length, self.stride, self.padding)

    def varies_positions(self, on_data: bool) -> bool:
        return on_data or self.padding not in ("VALID", "CIRCULAR", 0)

    def num_parameters(self, shape: Shape) -> int:
        return (self.kernel_size**2 * shape[-1] // self.groups + self.use_bias) * self.width

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection]:
        # as published: for i.i.d. inputs all positions are alike
        circular = kernel.statistics == PUBLISHED and kernel.covariance.iid
        padding = "CIRCULAR" if circular and self.padding == "SAME" else self.padding
        positions = self._map_after(*kernel.positions)
        window = Window(self.kernel_size, self.stride, padding, positions, self.dilation)
        return linear_rule(self, kernel.windowed(window), self.width, self.groups)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Conv(
            shape[-1],
            self.width,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.padding,
            feature_group_count=self.groups,
            kernel_dilation=self.dilation,
            conv_general_dilated=multiplied(convolve, self.multiplier),
            rngs=rngs,
            **linear_options(self, self.kernel_size**2 * shape[-1] // self.groups),
        )

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "weight_var", "bias_var")
        yield from multiplier_problems(self)


def checked_padding(layer: str, padding: object) -> str | int:
    """The padding, one of ``PADDINGS`` or a number; raises SpecError for anything else."""
    if not isinstance(padding, str):
        return whole(f"{layer}.padding", padding, 0, MOST_UNITS)
    check_choice(f"{layer}.padding", padding, PADDINGS)
    return padding


def map_after(
    shape: tuple[int, int], length: int, stride: int, padding: str | int
) -> tuple[int, int]:
    """Shape of the map after a window of this length has moved over it."""
    if not isinstance(padding, str):
        shape, padding = (shape[0] + 2 * padding, shape[1] + 2 * padding), "VALID"
    lost = length - 1 if padding == "VALID" else 0
    height, width = (math.ceil((size - lost) / stride) for size in shape)
    return height, width


def check_window(layer: str, size: int, length: int, padding: str | int, shape: Shape) -> None:
    """Raises SpecError if a window of this length does not fit on the map with its padding."""
    height, width, _ = shape
    around = 0 if isinstance(padding, str) else 2 * padding
    if padding != "SAME" and length > min(height, width) + around:
        remedy = f"use a kernel_size of at most {min(height, width)}, or padding='SAME'"
        cause = f"it is larger than the {height}x{width} map"
        raise problem(SpecError, f"{layer}.kernel_size", size, cause, remedy)


def convolve(
    x: Array,
    weights: Array,
    strides,
    padding,
    *,
    precision=None,
    feature_group_count: int = 1,
    rhs_dilation=(1, 1),
    **options,
) -> Array:
    """Convolution of (samples, height, width, channels) with (side, side, channels, width).

    On CPU it is computed by strided slices and one matrix product, which there is several times
    faster than XLA's convolution, and 10 to 20 times inside a scan. Elsewhere it is XLA's.

    Args:
        x: Inputs.
        weights: Weights of a square window.
        strides: The same step for both axes, as a pair.
        padding: ``"SAME"``, ``"VALID"``, or the zeros before and after each axis.
        precision: As in ``jax.lax.dot_general``.
        feature_group_count: Number of groups of channels.
        rhs_dilation: The same step within the window for both axes, as a pair.
        **options: Other options of ``jax.lax.conv_general_dilated``, used only with it.

    Returns:
        The map, (samples, height, width, width of the layer).
    """

    def by_slices(x: Array, weights: Array) -> Array:
        side, _, channels, width = weights.shape
        groups = feature_group_count
        around = padding if isinstance(padding, str) else padding[0][0]
        step = side, strides[0], around, rhs_dilation[0]
        pieces = [part for row in windows(x, (1,), *step) for part in windows(row, (2,), *step)]
        if groups == 1:
            patches = jnp.concatenate(pieces, axis=-1)
            flat = weights.reshape(side * side * channels, width)
            return jnp.matmul(patches, flat, precision=precision)
        patches = jnp.stack([part.reshape(*part.shape[:-1], groups, -1) for part in pieces])
        grouped = weights.reshape(side * side, channels, groups, width // groups)
        found = jnp.einsum("k...gc,kcgw->...gw", patches, grouped, precision=precision)
        return found.reshape(*found.shape[:-2], width)

    def by_xla(x: Array, weights: Array) -> Array:
        return lax.conv_general_dilated(
            x,
            weights,
            strides,
            padding,
            precision=precision,
            feature_group_count=feature_group_count,
            rhs_dilation=rhs_dilation,
            **options,
        )

    return lax.platform_dependent(x, weights, cpu=by_slices, default=by_xla)
