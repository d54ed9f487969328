"""The state that travels through the layers: what two samples' pre-activations share.

``cov`` and ``tangent`` are matrices over pairs of samples. Most layer rules act on their entries
and never ask how they are stored: they go through ``jax.tree.map``. The few that do ask
(BatchNorm's averages over the batch) ask the kernel. :class:`EnsembleKernel` stores the two
different entries of a matrix over exchangeable (i.i.d.) samples as a :class:`Pair`.

In convolutional maps every entry is an array over positions. A flatten head gives distinct
positions independent weights, so only equal positions meet and the axes are (height, width). Where
distinct positions meet (a mean over positions), they are (height, width, height, width).
"""

import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

PUBLISHED = "wei2019"
STATISTICS = ("batch", "frozen", PUBLISHED)
"""What BatchNorm's mean and deviation are taken to be; theory, see :class:`BatchNorm`."""


class Pair(NamedTuple):
    """A matrix over exchangeable samples: its diagonal and its off-diagonal entry.

    Separate arrays rather than one with an axis of length two: an order of magnitude faster where
    thousands of networks are vmapped.
    """

    same: Any
    other: Any


def _static():
    return dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EnsembleKernel:
    """Covariance and tangent kernel of i.i.d. samples.

    Attributes:
        cov: Covariance of a unit's value for the two samples, around ``mean``; positions.
        tangent: <grad z_a, grad z_b> per unit over all parameters so far; positions.
        scale: The correlation E[z_hat_a z_hat_b] where a BatchNorm's trainable scale was just
            passed, else 0: the scale's tangent is z_hat_a z_hat_b, random until averaged.
        mean: E[z], equal for all samples and positions, a scalar; None where it is exactly 0.
        inverse_samples: 1/n for the n samples that BatchNorm averages over; 0 is the limit.
        channels: Units per position (width).
        statistics: ``"batch"``, ``"frozen"`` or ``"wei2019"``.
        all_positions: Whether pairs of distinct positions are kept.
    """

    cov: Pair
    tangent: Pair
    scale: Pair
    mean: Array | None
    inverse_samples: Array
    channels: int = _static()
    statistics: str = _static()
    all_positions: bool = _static()

    @property
    def positions(self) -> tuple[int, ...]:
        """The map's shape, () for a vector."""
        shape = self.cov.same.shape
        return shape[: len(shape) // 2] if self.all_positions else shape

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def moment(self) -> Pair:
        """Uncentred second moment E[z_a z_b]."""
        if self.mean is None:
            return self.cov
        square = self.mean**2
        return jax.tree.map(lambda entry: entry + square, self.cov)

    @property
    def settled_tangent(self) -> Pair:
        """The tangent where nothing correlated with z_hat follows: the scale's part averaged."""
        return jax.tree.map(jnp.add, self.tangent, self.scale)

    def same_positions(self, entry: Array) -> Array:
        """The part of an entry at equal positions, (height, width) or ()."""
        if not self.all_positions:
            return entry
        height, width = self.positions
        square = entry.reshape(height * width, height * width)
        return jnp.diagonal(square).reshape(height, width)

    def either(self, own: Array) -> tuple[Array, Array]:
        """A value of each position as that of either member of a pair, broadcastable."""
        if not self.all_positions:
            return own, own
        return own[..., None, None], own[None, None]

    def variances(self, matrix: Pair) -> tuple[Array, Array]:
        """The entries (a, a) and (b, b) that belong to every entry (a, b), broadcastable to it."""
        return self.either(self.same_positions(matrix.same))

    def center(self, matrix: Pair, over_positions: bool) -> Pair:
        """H M H, H = 1 - 11^T/n: the matrix of values whose batch mean was subtracted.

        Args:
            matrix: Any matrix of this kernel.
            over_positions: Whether the mean runs over samples and positions, or over samples only.

        Accuracy:
            Exact, but for one case: a mean over positions when only equal positions are kept
            takes the entries of unequal positions to be those of two samples.
        """
        share = self.inverse_samples
        pooled = share * matrix.same + (1 - share) * matrix.other
        if not (over_positions and self.positions):
            removed = pooled
        elif self.all_positions:
            row = pooled.mean((-2, -1), keepdims=True)
            column = pooled.mean((-4, -3), keepdims=True)
            removed = row + column - pooled.mean()
        else:
            share = share / (self.positions[0] * self.positions[1])
            removed = share * matrix.same.mean() + (1 - share) * matrix.other.mean()
        return jax.tree.map(lambda entry: entry - removed, matrix)


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
    zero = jnp.zeros_like(same)
    inverse = 0.0 if num_samples is None else 1.0 / jnp.asarray(num_samples, dtype)
    return EnsembleKernel(
        cov=Pair(same, zero),
        tangent=Pair(zero, zero),
        scale=Pair(zero, zero),
        mean=None,
        inverse_samples=jnp.asarray(inverse, dtype),
        channels=shape[-1],
        statistics=statistics,
        all_positions=all_positions and bool(positions),
    )
