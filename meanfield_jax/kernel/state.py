"""The state that travels through the layers: what two samples' pre-activations share.

``cov`` and ``tangent`` are matrices over pairs of samples. Most layer rules act on them element by
element and never ask how the pairs are stored; the few that do (BatchNorm's averages over the
batch) ask the kernel. :class:`EnsembleKernel` stores the two different entries of a matrix over
exchangeable (i.i.d.) samples.

Convolutional maps add position axes behind the pair axes. A flatten head gives distinct positions
independent weights, so only equal positions meet and the axes are (height, width). A mean-pool head
lets all positions meet: (height, width, height, width).
"""

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from jax import Array

PUBLISHED = "wei2019"
STATISTICS = ("batch", "frozen", PUBLISHED)
"""What BatchNorm's mean and deviation are taken to be; theory, see :class:`BatchNorm`."""


def _static():
    return dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleKernel:
    r"""Covariance and tangent kernel of i.i.d. samples.

    The leading axis of every array has the two kinds of pair: 0 the same sample twice, 1 two
    different samples. Position axes follow (see the module's docstring).

    Attributes:
        cov: Covariance of a unit's value for the pair, around ``mean``, (2, \\*positions).
        tangent: <grad z_a, grad z_b> per unit over all parameters so far, (2, \\*positions).
        scale: The correlation E[z_hat_a z_hat_b] where a BatchNorm's trainable scale was just
            passed, else 0: the scale's tangent is z_hat_a z_hat_b, random until averaged.
        mean: E[z], equal for all samples and positions, a scalar; None where it is exactly 0.
        inverse_samples: 1/n for the n samples that BatchNorm averages over; 0 is the limit.
        channels: Units per position (width).
        statistics: ``"batch"``, ``"frozen"`` or ``"wei2019"``.
        all_positions: Whether pairs of distinct positions are kept.
    """

    cov: Array
    tangent: Array
    scale: Array
    mean: Array | None
    inverse_samples: Array
    channels: int = _static()
    statistics: str = _static()
    all_positions: bool = _static()

    @property
    def positions(self) -> tuple[int, ...]:
        """The map's shape, () for a vector."""
        shape = self.cov.shape[1:]
        return shape[: len(shape) // 2] if self.all_positions else shape

    def replace(self, **changes) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def moment(self) -> Array:
        """Uncentred second moment E[z_a z_b], of the shape of ``cov``."""
        return self.cov if self.mean is None else self.cov + self.mean**2

    @property
    def settled_tangent(self) -> Array:
        """The tangent where nothing correlated with z_hat follows: the scale's part averaged."""
        return self.tangent + self.scale

    def same_positions(self, matrix: Array) -> Array:
        """The entries at equal positions, (2, height, width) or (2,)."""
        if not self.all_positions:
            return matrix
        height, width = self.positions
        flat = matrix.reshape(2, height * width, height * width)
        return jnp.diagonal(flat, axis1=1, axis2=2).reshape(2, height, width)

    def pairs(self, own: Array) -> tuple[Array, Array]:
        r"""A value of each position, (1, \*positions), as that of either member of a pair."""
        if not self.all_positions:
            return own, own
        return own[..., None, None], own[:, None, None]

    def variances(self, matrix: Array) -> tuple[Array, Array]:
        """The entries (a, a) and (b, b) that belong to every entry (a, b), broadcastable to it."""
        return self.pairs(self.same_positions(matrix)[:1])

    def center(self, matrix: Array, over_positions: bool) -> Array:
        r"""H M H, H = 1 - 11^T/n: the matrix of values whose batch mean was subtracted.

        Args:
            matrix: (2, \\*positions).
            over_positions: Whether the mean runs over samples and positions, or over samples only.

        Accuracy:
            Exact, but for one case: a mean over positions when only equal positions are kept
            takes the entries of unequal positions to be those of two samples. That is exact for
            circular padding and large batches; zero padding on 16x16 maps moves s^2 by under 1 %.
        """
        same, other = matrix[0], matrix[1]
        share = self.inverse_samples
        if not (over_positions and self.positions):
            return matrix - (share * same + (1 - share) * other)
        if self.all_positions:
            pooled = share * same + (1 - share) * other
            row = pooled.mean((-2, -1), keepdims=True)
            column = pooled.mean((0, 1), keepdims=True)
            return matrix - row - column + pooled.mean()
        share = share / (self.positions[0] * self.positions[1])
        return matrix - (share * same.mean() + (1 - share) * other.mean())


def input_kernel(
    shape: tuple[int, ...],
    num_samples: Array | float | None,
    statistics: str,
    all_positions: bool,
    dtype: jnp.dtype,
) -> EnsembleKernel:
    """Inputs whose features are independent N(0, 1): unit covariance with itself, 0 otherwise.

    Args:
        shape: (features,) or (height, width, channels).
        num_samples: n, or None for the limit n -> infinity.
        statistics: One of :data:`STATISTICS`.
        all_positions: Whether to keep pairs of distinct positions.
        dtype: Dtype of the arrays.

    Returns:
        The kernel before the first layer; its tangent is 0.
    """
    positions = shape[:-1]
    same = jnp.ones(positions, dtype)
    if all_positions and positions:
        size = positions[0] * positions[1]
        same = jnp.eye(size, dtype=dtype).reshape(*positions, *positions)
    cov = jnp.stack([same, jnp.zeros_like(same)])
    inverse = 0.0 if num_samples is None else 1.0 / jnp.asarray(num_samples, dtype)
    return EnsembleKernel(
        cov=cov,
        tangent=jnp.zeros_like(cov),
        scale=jnp.zeros_like(cov),
        mean=None,
        inverse_samples=jnp.asarray(inverse, dtype),
        channels=shape[-1],
        statistics=statistics,
        all_positions=all_positions,
    )
