"""InstanceNorm: normalization of each channel of a sample over positions."""

import math
from typing import ClassVar

from flax import nnx

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.sphere import LEAST_VALUES
from meanfield_jax.layers.base import Injection, Kernel, Shape, Signal, layer
from meanfield_jax.layers.group_norm import group_rule
from meanfield_jax.layers.norm import FlaxNorm, Norm, check_gaussian, flax_options


@layer
class InstanceNorm(Norm):
    """gamma (z - mean) / sqrt(variance + eps) + beta, over the positions of a sample and channel.

    There is one scale and offset per channel. Samples are not coupled, so that training, evaluation
    and the three ``statistics`` of :func:`analyze` are the same.

    Rule: :func:`meanfield_jax.layers.group_norm.group_rule` with groups of one channel.

    Attributes:
        gamma, beta, eps, trainable: See :class:`Norm`.

    Source:
        Ulyanov, Vedaldi & Lempitsky 2016 (arXiv:1607.08022).

    Accuracy:
        See :func:`meanfield_jax.layers.group_norm.group_rule`.
    """

    norm_name: ClassVar[str | None] = "instance"
    abbreviation: ClassVar[str] = "IN"
    within_sample: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "each"

    def couples_positions(self, vary: bool) -> bool:
        return True

    def output(self, signal: Signal) -> Signal:
        if len(signal.shape) != 3:
            cause = "InstanceNorm needs inputs of shape (height, width, channels)"
            remedy = "use LayerNorm for vectors"
            raise problem(SpecError, "InstanceNorm", signal.shape, cause, remedy)
        check_gaussian("InstanceNorm", signal)
        size = math.prod(signal.shape[:-1])
        if size < LEAST_VALUES:
            cause = f"the inverse variance of only {size} values has no expectation"
            raise problem(SpecError, "InstanceNorm", signal.shape, cause, "use it on larger maps")
        return signal

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        return group_rule(self, kernel, 1)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return FlaxNorm(nnx.InstanceNorm(shape[-1], **flax_options(self, rngs)), self, shape)
