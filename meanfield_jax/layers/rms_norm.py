"""RMSNorm: division of a sample by the root mean square of its channels."""

from typing import ClassVar

from flax import nnx

from meanfield_jax.layers.base import Injection, Kernel, Shape, layer
from meanfield_jax.layers.norm import FlaxNorm, Norm, flax_options
from meanfield_jax.pytree import static


@layer
class RMSNorm(Norm):
    """gamma z / sqrt(mean of z^2 + eps) + beta, over the channels of a sample (and position).

    Unlike :class:`LayerNorm` it subtracts no mean, so that it may follow any layer, and its offset
    is usually not a parameter.

    Rule, with s_a^2 = E[z_a^2]: K_ab <- gamma^2 E[z_a z_b] / (s_a s_b), and the same for T.

    Attributes:
        gamma, beta, eps, trainable, use_bias: See :class:`Norm`.

    Source:
        Zhang & Sennrich 2019 (arXiv:1910.07467).

    Accuracy:
        That of the wide limit: the fluctuation of the root mean square and its derivative are of
        relative size 1/channels.
    """

    norm_name: ClassVar[str | None] = "rms"
    abbreviation: ClassVar[str] = "RMS"
    on_parts: ClassVar[str | None] = "each"

    use_bias: bool = static(default=False, keyword=True)

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        return self.rule_of_part(kernel, kernel)

    def rule_of_part(self, kernel: Kernel, whole: Kernel) -> tuple[Kernel, Injection | None]:
        moment = kernel.moment
        gain = self.gain(moment, whole.moment.diagonal())
        return self.affine(kernel, moment * gain, kernel.effective_tangent * gain)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        options = flax_options(self, rngs)
        del options["use_bias"]
        return FlaxNorm(nnx.RMSNorm(shape[-1], **options), self, shape)
