"""InstanceEnhancementBatchNorm: BatchNorm with a gate computed from each sample by itself."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.layers.base import Injection, Kernel, Problem, Shape, layer
from meanfield_jax.layers.batch_norm import BatchNormModule, batch_rule
from meanfield_jax.layers.norm import Norm, normalize, of_rank, statistics_dtype


@layer
class InstanceEnhancementBatchNorm(Norm):
    r"""gamma a z_hat + beta: the z_hat of BatchNorm, scaled by a gate a per sample and channel.

    .. math:: a = \mathrm{sigmoid}(\hat\gamma m + \hat\beta)

    m is the mean of the sample's z over positions. gamma_hat starts at 0 and beta_hat at ``gate``,
    so that at the start a = sigmoid(-1) = .269 everywhere, and what passes through BatchNorm
    contributes 1/a^2 = 13.8 times less to the Fisher matrix.

    Rule, at the start: that of BatchNorm over channels, with gamma a in place of gamma, and an
    injection from the four parameters of each channel. There is no theory of trained gates.

    Attributes:
        gate: beta_hat at the start.
        gamma, beta, eps, trainable: See :class:`Norm`; gamma_hat and beta_hat train with them.

    Source:
        Liang, Huang, Liang & Yang 2019 (arXiv:1908.04008).

    Accuracy:
        That of BatchNorm. The contribution of gamma_hat to T, O(1) compared with O(width), treats
        m and z_hat as independent (tests/test_batch_group_norm.py).
    """

    norm_name: ClassVar[str | None] = "instance_enhancement"
    abbreviation: ClassVar[str] = "IEBN"
    over_batch: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "each"

    gate: float | Array = -1.0

    def couples_positions(self, vary: bool) -> bool:
        return vary

    def num_parameters(self, shape: Shape) -> int:
        return 2 * super().num_parameters(shape)

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        a = jax.nn.sigmoid(jnp.asarray(self.gate, kernel.dtype))
        gated = dataclasses.replace(self, gamma=a * self.gamma)
        after, own = batch_rule(gated, kernel, over_positions=True)
        if own is None or own.scale is None:
            return after, None
        # contributions of gamma and of the gate's parameters: beta_hat, and gamma_hat times m
        instance = (kernel.pooled() if kernel.positions else kernel).moment
        gates = (self.gamma * a * (1 - a)) ** 2
        # the means of the instances, at all pairs of positions
        scale = own.scale.map(
            lambda entry, means: (a**2 + gates * (1 + of_rank(means, entry.ndim))) * entry,
            instance,
        )
        return after, dataclasses.replace(own, scale=scale)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return InstanceEnhancementModule(self, shape, self.parameter_shape(shape))

    def value_problems(self) -> Iterator[Problem]:
        yield from super().value_problems()
        if not np.all(np.isfinite(self.gate)):
            yield "gate", self.gate, "must be finite", "pass a finite number"


class InstanceEnhancementModule(BatchNormModule):
    """The Flax module of :class:`InstanceEnhancementBatchNorm`; see also :class:`BatchNormModule`.

    Attributes:
        gate_scale: gamma_hat, (channels,).
        gate_bias: beta_hat, (channels,).
    """

    def __init__(self, spec: InstanceEnhancementBatchNorm, shape: Shape, size: Shape):
        super().__init__(spec, shape, size)
        start = dataclasses.replace(spec, gamma=0.0, beta=spec.gate)
        self.gate_scale, self.gate_bias = start.parameters(shape)

    def __call__(self, x: Array) -> Array:
        """Normalizes x of shape (samples, *positions, channels)."""
        positions = tuple(range(1, x.ndim - 1))
        means = x.astype(statistics_dtype(x)).mean(positions, keepdims=True)
        gate_scale, gate_bias, scale = (
            of_rank(value[...], x.ndim) for value in (self.gate_scale, self.gate_bias, self.scale)
        )
        gate = jax.nn.sigmoid(gate_scale * means + gate_bias)
        return normalize(x, *self.statistics(x), gate * scale, self.bias[...], self.eps)
