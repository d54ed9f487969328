"""Conv: a two-dimensional convolution with random weights and biases."""

import math
from collections.abc import Iterator
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

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
    tunable,
    variance_problems,
)
from meanfield_jax.layers.dense import linear_options, linear_rule
from meanfield_jax.pytree import static

PADDINGS = ("SAME", "VALID", "CIRCULAR")


@layer
class Conv(Layer):
    """Convolution over a square window, W ~ N(0, weight_var / fan_in).

    fan_in = kernel_size^2 channels. Rule, with <.> the average of the entries over all shifts
    within the window (zero where the window leaves a zero-padded map):
    K <- bias_var + weight_var <K>;  T <- fan_in <K_in> + 1 + weight_var <T>.

    Attributes:
        width: Number of output channels.
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: ``"SAME"`` (zeros), ``"VALID"`` (none) or ``"CIRCULAR"`` (periodic).
        weight_var: sigma_w^2, the variance of a weight times the fan-in.
        bias_var: sigma_b^2, the variance of a bias.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), section 3.2; Xiao et al. 2018.

        Departure: the paper treats all positions as alike. Here the moments are maps, so that the
        borders of zero-padded maps are taken into account; ``statistics="wei2019"`` treats
        ``"SAME"`` as circular, as published.
    """

    is_weights: ClassVar[bool] = True

    width: int = static(least=1)
    kernel_size: int = static(default=3, least=1)
    stride: int = static(default=1, least=1)
    padding: str = static(default="SAME", choices=PADDINGS)
    weight_var: float | Array = tunable(2.0, positive=True)
    bias_var: float | Array = tunable(0.5, positive=True)

    def output(self, signal: Signal) -> Signal:
        if len(signal.shape) != 3:
            cause = "Conv needs inputs of shape (height, width, channels)"
            remedy = "reshape the inputs, or use Dense for vectors"
            raise problem(SpecError, "input shape", signal.shape, cause, remedy)
        height, width, _ = signal.shape
        if self.stride > min(height, width):
            remedy = f"use a stride of at most {min(height, width)}"
            cause = f"it is larger than the {height}x{width} map"
            raise problem(SpecError, "Conv.stride", self.stride, cause, remedy)
        if self.padding != "SAME" and self.kernel_size > min(height, width):
            remedy = f"use a kernel_size of at most {min(height, width)}, or padding='SAME'"
            cause = f"it is larger than the {height}x{width} map"
            raise problem(SpecError, "Conv.kernel_size", self.kernel_size, cause, remedy)
        return Signal((*self._map_after(height, width), self.width), gaussian=True)

    def _map_after(self, height: int, width: int) -> tuple[int, ...]:
        lost = self.kernel_size - 1 if self.padding == "VALID" else 0
        return tuple(math.ceil((size - lost) / self.stride) for size in (height, width))

    def varies_positions(self, on_data: bool) -> bool:
        return on_data or self.padding == "SAME"

    def num_parameters(self, shape: Shape) -> int:
        return (self.kernel_size**2 * shape[-1] + 1) * self.width

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection]:
        # as published: for i.i.d. inputs all positions are alike
        circular = kernel.statistics == PUBLISHED and kernel.covariance.iid
        padding = "CIRCULAR" if circular and self.padding == "SAME" else self.padding
        positions = self._map_after(*kernel.positions)
        window = Window(self.kernel_size, self.stride, padding, positions)
        return linear_rule(self, kernel.windowed(window), self.width)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Conv(
            shape[-1],
            self.width,
            (self.kernel_size, self.kernel_size),
            strides=self.stride,
            padding=self.padding,
            conv_general_dilated=convolve,
            rngs=rngs,
            **linear_options(self, self.kernel_size**2 * shape[-1]),
        )

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "weight_var", "bias_var")


def convolve(
    x: Array, weights: Array, strides, padding: str, *, precision=None, **options
) -> Array:
    """Convolution of (samples, height, width, channels) with (side, side, channels, width).

    On CPU it is computed by strided slices and one matrix product, which there is several times
    faster than XLA's convolution, and 10 to 20 times inside a scan. Elsewhere it is XLA's.

    Args:
        x: Inputs.
        weights: Weights of a square window.
        strides: The same step for both axes, as a pair.
        padding: ``"SAME"`` or ``"VALID"``.
        precision: As in ``jax.lax.dot_general``.
        **options: Other options of ``jax.lax.conv_general_dilated``, used only with it.

    Returns:
        The map, (samples, height, width, width of the layer).
    """

    def by_slices(x: Array, weights: Array) -> Array:
        side, _, channels, width = weights.shape
        rows = windows(x, (1,), side, strides[0], padding)
        pieces = [piece for row in rows for piece in windows(row, (2,), side, strides[1], padding)]
        patches = jnp.concatenate(pieces, axis=-1)
        return jnp.matmul(
            patches, weights.reshape(side * side * channels, width), precision=precision
        )

    def by_xla(x: Array, weights: Array) -> Array:
        return lax.conv_general_dilated(
            x, weights, strides, padding, precision=precision, **options
        )

    return lax.platform_dependent(x, weights, cpu=by_slices, default=by_xla)
