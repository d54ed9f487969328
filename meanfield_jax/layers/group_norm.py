"""GroupNorm: normalization of a sample over positions and a group of channels."""

import math
from collections.abc import Sequence
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import Projection
from meanfield_jax.kernel.sphere import LEAST_VALUES
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Matrix,
    Shape,
    Signal,
    layer,
)
from meanfield_jax.layers.norm import (
    FlaxNorm,
    Norm,
    check_gaussian,
    check_groups,
    fitting_groups,
    flax_options,
)
from meanfield_jax.pytree import static


@layer
class GroupNorm(Norm):
    """gamma (z - mean) / sqrt(variance + eps) + beta, over a sample's positions and channel groups.

    Channels are split into groups of neighbors; there is one scale and offset per channel. Samples
    are not coupled, so that training, evaluation and the three ``statistics`` of :func:`analyze`
    are the same.

    Rule: :func:`meanfield_jax.layers.group_norm.group_rule`, which for large groups is that of
    :class:`LayerNorm`.

    Attributes:
        gamma, beta, eps, trainable: See :class:`Norm`.
        num_groups: Number of groups, a divisor of the number of channels.

    Source:
        Wu & He 2018 (arXiv:1803.08494).

    Accuracy:
        See :func:`meanfield_jax.layers.group_norm.group_rule`.
    """

    norm_name: ClassVar[str | None] = "group"
    abbreviation: ClassVar[str] = "GN"
    within_sample: ClassVar[bool] = True

    num_groups: int = static(default=32, least=1)

    def couples_positions(self, vary: bool) -> bool:
        return True

    @classmethod
    def fitting(cls, widths: Sequence[int]) -> Layer:
        return cls(num_groups=fitting_groups(widths))

    def output(self, signal: Signal) -> Signal:
        check_gaussian("GroupNorm", signal)
        check_groups("GroupNorm", self.num_groups, signal.shape[-1])
        size = math.prod(signal.shape) // self.num_groups
        if size < LEAST_VALUES:
            cause = f"the inverse variance of only {size} values has no expectation"
            raise problem(
                SpecError, "GroupNorm.num_groups", self.num_groups, cause, "use fewer groups"
            )
        return signal

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        return group_rule(self, kernel, kernel.channels / self.num_groups)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        norm = nnx.GroupNorm(shape[-1], self.num_groups, **flax_options(self, rngs))
        return FlaxNorm(norm, self, shape)


def group_rule(
    spec: Norm, kernel: Kernel, group_size: Array | float
) -> tuple[Kernel, Injection | None]:
    """The rule for statistics over the positions and m channels of one sample.

    With <.>_q, <.>_p and <.>_pq the means over the positions of the second member of a pair, the
    first, and both:

    * C_ab = K_ab - (<K_ab>_q + <K_ab>_p - <K_ab>_pq) / m, divided by s_a s_b, s_a^2 = <C_aa>_p=q;
      the same for T.
    * A group is divided by its sample deviation, not by the expected one: ``_own_deviation``.
    * The deviation depends on the parameters: with z_hat = H z / s and M = m times the number of
      positions, dz_hat = (1/s) (1 - z_hat z_hat^T / M) H dz, for each sample of a pair with its
      own z_hat.

    Args:
        spec: The layer, with gamma, beta and eps.
        kernel: The kernel before the layer, with all pairs of positions.
        group_size: m, the number of channels per group.

    Returns:
        As :meth:`meanfield_jax.Layer.rule`.

    Accuracy:
        The kernel's ``fluctuation`` tells where a group varies in so few directions that the rule
        is not to be trusted, such as one channel on maps of 2x2: lambda_max was a quarter of that
        of drawn networks there.
        With a ReLU-like function after it, to first order in 1/D, where D = m PR is the effective
        number of values in a group and PR the participation ratio of the positions' covariance;
        with other functions, T of two samples is exact to zeroth order only. Predicted / measured
        for two 3x3 convolutions of stride 1, ReLU, one channel per group (64 channels, error
        .5 %), with flatten and mean head: on i.i.d. inputs and 4x4 maps T_same .99 and 1.00,
        T_other .97 and 1.00; on 8x8 maps 1.00 throughout (mean head). On digits (8x8, strongly
        correlated positions) T_same 1.00 and .94, T_other .98 and .93. Without the derivative of
        the deviation, T_same after a mean over positions would be 42 % too large on 4x4 maps and
        14 % on 8x8. Groups of 8 values of vectors, two layers: T_same .92, T_other .94
        (tests/test_sample_norms.py).
    """
    fraction = 1 / group_size
    kernel = kernel.around_means()
    centred = _centred(kernel.covariance, fraction)
    gain = spec.gain(centred, centred.sample_mean(centred.diagonal()))
    tangent = _centred(kernel.effective_tangent, fraction) * gain
    correlation, on_tangent, on_products = _own_deviation(centred * gain, fraction)
    kernel = kernel.with_fluctuation(_fluctuation(centred * gain, fraction))
    after, injection = spec.affine(kernel, correlation, tangent * on_tangent)
    _, own, weight = (correlation * after.tangent).position_means()
    cross = correlation.own_product(after.tangent)
    projection = Projection(correlation, cross, own, weight, on_products).scaled(fraction)
    return after.replace(projection=projection), injection


def _centred(matrix: Matrix, fraction: Array | float) -> Matrix:
    """The matrix of the values minus their mean over positions and 1/fraction channels."""
    row, column, both = matrix.position_means()
    return matrix - (row + column - both) * fraction


def _fluctuation(correlation: Matrix, fraction: Array | float) -> Float[Array, ""]:
    """The largest E[1 / s^2] E[s^2] of a sample, from below."""
    # to second order; and that of r free values, r / (r - 2)
    second = 1 + 2 * fraction * jnp.max((correlation * correlation).position_means()[2].diagonal())
    size = math.prod(correlation.positions) / fraction - 1
    return jnp.maximum(second, size / jnp.maximum(size - 2, 1e-3))


def _own_deviation(correlation: Matrix, fraction: Array | float) -> tuple[Matrix, Matrix, Matrix]:
    """E[z_hat z_hat^T], E[1 / (s_a s_b)] E[s_a^2]^(1/2) E[s_b^2]^(1/2), and a third factor.

    To second order in s^2 / E[s^2] - 1, whose covariance for two samples is
    2 t_ab / m, t_ab = <C_ab^2>_pq. The average of f(z_a, z_b) / (s_a s_b) for a function f is the
    second matrix times the Gaussian average of f with C - (C D_a C + C D_b C) / M in place of C,
    where D_a selects the positions of sample a. The variances of this matrix, on average over
    positions, differ from pair to pair.

    Returns:
        The three matrices; the second is a factor on the tangent, the third is the ``factor`` of a
        :class:`Projection`.
    """
    squares = (correlation * correlation).position_means()[2]
    a, b = squares.variances()
    on_tangent = squares.map(lambda both: 1 + fraction * (0.75 * (a + b) + 0.5 * both))
    removed = correlation.own_product(correlation)
    own = correlation * on_tangent - (removed + removed.T) * fraction
    on_products = squares.map(lambda both: 1 + fraction * ((a + b) / 4 - both / 2))
    return own, on_tangent, on_products
