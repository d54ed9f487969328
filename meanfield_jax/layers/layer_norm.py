"""LayerNorm: normalization of a sample over all its features."""

from typing import ClassVar

from flax import nnx

from meanfield_jax.layers.base import Injection, Kernel, Matrix, Shape, Signal, layer
from meanfield_jax.layers.norm import FlaxNorm, Norm, check_gaussian, flax_options
from meanfield_jax.pytree import static


@layer
class LayerNorm(Norm):
    """gamma (z - mean) / sqrt(variance + eps) + beta, over the channels of a sample.

    There is one scale and offset per channel. Samples are not coupled, so that training, evaluation
    and the three ``statistics`` of :func:`analyze` are the same.

    Rule, with s_a^2 = K_aa, or its average over positions: K_ab <- gamma^2 K_ab / (s_a s_b), and
    the same for T.

    Attributes:
        gamma, beta, eps, trainable: See :class:`Norm`.
        over_positions: Whether statistics are also taken over the positions of a map.

    Source:
        Ba, Kiros & Hinton 2016 (arXiv:1607.06450).

        Departure: the paper leaves open what the units of a layer are on maps; here they include
        positions, as is usual for images (:class:`GroupNorm` with one group), unless
        ``over_positions`` is False, which is Flax's default and that of ConvNeXt.

    Accuracy:
        That of the wide limit: the mean over channels, the fluctuation of the variance and the
        derivatives of both are of relative size 1/channels.
    """

    norm_name: ClassVar[str | None] = "layer"
    abbreviation: ClassVar[str] = "LN"
    on_parts: ClassVar[str | None] = "each"

    over_positions: bool = static(default=True)

    def output(self, signal: Signal) -> Signal:
        check_gaussian("LayerNorm", signal)
        return signal

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        return self.rule_of_part(kernel, kernel)

    def rule_of_part(self, kernel: Kernel, whole: Kernel) -> tuple[Kernel, Injection | None]:
        covariance, tangent = self._centred(kernel)
        var = self._centred(whole)[0].diagonal()
        gain = self.gain(covariance, covariance.sample_mean(var) if self.over_positions else var)
        return self.affine(kernel, covariance * gain, tangent * gain)

    def _centred(self, kernel: Kernel) -> tuple[Matrix, Matrix]:
        """Covariance and tangent after the mean over channels is subtracted."""
        covariance, tangent = kernel.around_means().covariance, kernel.effective_tangent
        if self.over_positions:
            return covariance, tangent
        covariance = covariance if kernel.shared is None else covariance - kernel.shared
        shared = kernel.shared_tangent
        return covariance, tangent if shared is None else tangent - shared

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        axes = tuple(range(-len(shape), 0)) if self.over_positions else -1
        norm = nnx.LayerNorm(shape[-1], reduction_axes=axes, **flax_options(self, rngs))
        return FlaxNorm(norm, self, shape)
