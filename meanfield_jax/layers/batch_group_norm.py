"""BatchGroupNorm: normalization over the batch and over groups of channels."""

import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Shape,
    Signal,
    layer,
)
from meanfield_jax.layers.batch_norm import BatchNormModule, batch_rule
from meanfield_jax.layers.norm import Norm, check_groups, fitting_groups
from meanfield_jax.pytree import static


@layer
class BatchGroupNorm(Norm):
    """gamma (z - mean) / sqrt(variance + eps) + beta, over the batch and a group of values.

    The values of each sample, ordered by channel, are split into groups of neighbors. With as many
    groups as channels this is BatchNorm; with one group it is LayerNorm with its statistics pooled
    over the batch; with more groups than channels, a group is a part of a channel's map, taken row
    by row. Larger groups improve the statistics of small batches. There is one scale and offset per
    channel, and one pair of running statistics per group.

    Rule for m channels per group (there is none for parts of a channel): channels are independent,
    so that subtracting their mean removes only 1/m of what it removes in BatchNorm,
    K - (K - H K H)/m, H the centring. The same holds for T with ``"batch"`` statistics, and for the
    fluctuation and the derivative of the variance.

    Attributes:
        num_groups: G, a divisor of the number of channels, or a multiple of that number that
            divides the number of values of a sample.
        gamma, beta, eps, trainable: See :class:`Norm`.

    Source:
        Zhou, Lu, Chen, Yang, Xu & Zheng 2020 (arXiv:2012.02782).

    Accuracy:
        That of BatchNorm at G = C. For m > 1 the fluctuation of the variance is included to first
        order in 1/m: for FC 50-256x2-4 and n = 32 the predicted outlier over the measured one is
        1.075 at m = 2, 1.014 +- .013 at m = 8, .995 +- .012 with one group
        (tests/test_batch_group_norm.py).
    """

    norm_name: ClassVar[str | None] = "batch_group"
    abbreviation: ClassVar[str] = "BGN"
    over_batch: ClassVar[bool] = True

    num_groups: int = static(default=32, least=1)

    @classmethod
    def fitting(cls, widths: Sequence[int]) -> Layer:
        return cls(num_groups=fitting_groups(widths))

    def output(self, signal: Signal) -> Signal:
        *positions, channels = signal.shape
        parts, rest = divmod(self.num_groups, channels)
        if rest or math.prod(positions) % parts:
            check_groups("BatchGroupNorm", self.num_groups, channels)
        return signal

    def couples_positions(self, vary: bool) -> bool:
        return vary

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        fraction = self.num_groups / kernel.channels
        return batch_rule(self, kernel, over_positions=True, fraction=fraction)

    def check_theory(self, shape: Shape) -> None:
        if self.num_groups > shape[-1]:
            cause = f"there is no theory for more groups than the {shape[-1]} channels"
            remedy = f"use at most {shape[-1]} groups"
            raise problem(SpecError, "BatchGroupNorm.num_groups", self.num_groups, cause, remedy)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return BatchGroupNormModule(self, shape, (self.num_groups,))


class BatchGroupNormModule(BatchNormModule):
    """The Flax module of :class:`BatchGroupNorm`; attributes as in :class:`BatchNormModule`."""

    def statistics(self, x: Array) -> tuple[Array, Array]:
        """Mean and variance to use: (channels,), or of a sample's shape if groups split maps."""
        *positions, channels = x.shape[1:]
        groups = len(self.mean[...])
        if groups <= channels:
            merged = x.reshape(*x.shape[:-1], groups, -1).swapaxes(-1, -2)
            mean, var = super().statistics(merged)
            return jnp.repeat(mean, channels // groups), jnp.repeat(var, channels // groups)
        merged = jnp.moveaxis(x, -1, 1).reshape(len(x), groups, -1)
        mean, var = (
            jnp.repeat(value, merged.shape[-1]).reshape(channels, *positions)
            for value in super().statistics(merged.swapaxes(1, 2))
        )
        return jnp.moveaxis(mean, 0, -1), jnp.moveaxis(var, 0, -1)
