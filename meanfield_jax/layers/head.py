"""Flatten and GlobalMeanPool: from a map to a vector."""

from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import Kernel, Layer, Shape, Signal, layer


@layer
class Flatten(Layer):
    """(height, width, channels) -> (height * width * channels,).

    Rule: the average over equal positions, because each position has independent weights after it.
    """

    on_parts: ClassVar[str | None] = "each"

    def output(self, signal: Signal) -> Signal:
        return Signal((_check_map("Flatten", signal)[0],), gaussian=False)

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        return kernel.flattened(), None

    def build(self, shape: Shape, rngs: nnx.Rngs):
        return flatten


@layer
class GlobalMeanPool(Layer):
    """(height, width, channels) -> (channels,), the mean over positions.

    Rule: the average over all pairs of positions.
    """

    on_parts: ClassVar[str | None] = "each"

    def couples_positions(self, vary: bool) -> bool:
        return True

    def output(self, signal: Signal) -> Signal:
        _check_map("GlobalMeanPool", signal)
        return Signal(signal.shape[-1:], signal.gaussian, signal.random)

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        return kernel.pooled(), None

    def build(self, shape: Shape, rngs: nnx.Rngs):
        return global_mean_pool


def flatten(x: Array) -> Array:
    """(samples, height, width, channels) -> (samples, height * width * channels)."""
    return x.reshape(x.shape[0], -1)


def global_mean_pool(x: Array) -> Array:
    """(samples, height, width, channels) -> (samples, channels)."""
    return jnp.mean(x, axis=(1, 2))


def _check_map(name: str, signal: Signal) -> tuple[int]:
    if len(signal.shape) != 3:
        cause = f"{name} needs inputs of shape (height, width, channels)"
        remedy = "leave it out for vectors"
        raise problem(SpecError, "input shape", signal.shape, cause, remedy)
    height, width, channels = signal.shape
    return (height * width * channels,)
