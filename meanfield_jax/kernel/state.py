"""The state that travels through the layers: what two samples' pre-activations share.

``cov`` and ``tangent`` are matrices over pairs of samples. Layer rules act on their entries
and never ask how they are stored: they go through ``jax.tree.map``, or ask the kernel (for averages
over the batch, over windows). :class:`EnsembleKernel` stores the two different entries of a matrix
over exchangeable (i.i.d.) samples as a :class:`Pair`; for a real batch, see gram.py.

In convolutional maps every entry is an array over positions. A flatten head gives distinct
positions independent weights, so only equal positions meet and the axes are (height, width). Where
distinct positions meet (a mean over positions), they are (height, width, height, width).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import Array

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import Moments, Nonlinearity, expectations
from meanfield_jax.kernel.windows import windows
from meanfield_jax.precise import einsum
from meanfield_jax.status import Status

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


class Spread(NamedTuple):
    """What follows from a BatchNorm's variance being that of each unit, not the expected one.

    Attributes:
        first: E[z_hat z_hat^T], n E[z z^T / |z|^2].
        factor: The expected inverse variance over the inverse of the expected variance.
        second: E[z z^T / |z|^4] in units that make it ``first`` where variances do not fluctuate.
    """

    first: Any
    factor: Array
    second: Any


class Projection(NamedTuple):
    """What a BatchNorm's variance does to the tangent as it depends on the parameters.

    With z_hat = H z / s, dz_hat = (1/s) (1 - z_hat z_hat^T / n) H dz: the tangent T of H z / s
    turns into T - (z_hat v^T + v z_hat^T) + w z_hat z_hat^T, v = T z_hat / n, w = z_hat^T v / n.
    Averages over z_hat are taken where the next layer is known.

    Attributes:
        correlation: E[z_hat_a z_hat_b].
        cross: E[z_hat_a v_b].
        own: E[z_hat_b v_b], broadcastable to it.
        weight: w, broadcastable to it.
        stretch: By how much products of functions of z_hat_a and z_hat_b exceed those of Gaussian
            ones, broadcastable to it: not 1 where each of the two has a deviation of its own.
    """

    correlation: Any
    cross: Any
    own: Any
    weight: Any
    stretch: Any

    def scaled(self, share: Array | float) -> Self:
        """The projection of a variance that depends so much less on the parameters."""
        changes = (self.cross, self.own, self.weight)
        cross, own, weight = jax.tree.map(lambda entry: share * entry, changes)
        return self._replace(cross=cross, own=own, weight=weight)

    def behind(self, variances: tuple[Array, Array], moments: Moments) -> tuple[Array, Array]:
        """E[phi' phi' w z_hat_a z_hat_b] and E[phi' phi' z_hat_a v_b], entry by entry.

        v_b is Gaussian together with the two z_hat: it is regressed on them, and the rest drops
        out. The regression on z_hat_b comes first, which leaves nothing on the diagonal.

        Args:
            variances: The correlation's entries (a, a) and (b, b) for every entry.
            moments: Of the function behind.

        Returns:
            The two expectations, of the shape of the correlation.
        """
        var_a, var_b = variances
        slope = safe.divide(self.own, var_b)
        ratio = safe.divide(self.correlation, var_b)
        both = safe.geometric_mean(var_a, var_b) * moments.scale
        left = var_a - ratio * self.correlation
        resolved = left > 100 * jnp.finfo(left.dtype).eps * var_a
        partial = jnp.where(resolved, self.cross - slope * self.correlation, 0.0)
        partial = partial / jnp.where(resolved, left, 1.0)
        cross = slope * both + partial * (var_a * moments.square - ratio * both)
        return self.weight * both, cross


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
        projection: What a BatchNorm just passed takes off the tangent as its variance depends on
            the parameters, or None.
        mean: E[z], equal for all samples and positions, a scalar; None where it is exactly 0.
        inverse_samples: 1/n for the n samples that BatchNorm averages over; 0 is the limit.
        channels: Units per position (width).
        statistics: ``"batch"``, ``"frozen"`` or ``"wei2019"``.
        all_positions: Whether pairs of distinct positions are kept.
        deviation: The covariance less a constant that all pairs share (that of a bias), which is
            what centring is exact on; None where it is ``cov`` itself.
        tangent_deviation: The same of ``tangent``.
        status: A :class:`Status` as integer: CONVERGED unless a normalization failed.
    """

    cov: Pair
    tangent: Pair
    scale: Pair
    projection: Projection | None
    mean: Array | None
    inverse_samples: Array
    status: Array
    channels: int = _static()
    statistics: str = _static()
    all_positions: bool = _static()
    deviation: Pair | None = None
    tangent_deviation: Pair | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """The map's shape, () for a vector."""
        shape = self.cov.same.shape
        return shape[: len(shape) // 2] if self.all_positions else shape

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the arrays."""
        return self.cov.same.dtype

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def behind(self, cov: Pair, tangent: Pair, **changes: Any) -> Self:
        """The kernel behind a layer that z_hat does not survive; its mean is 0 unless given."""
        rest = dict(scale=jax.tree.map(jnp.zeros_like, cov))
        rest |= dict.fromkeys(("projection", "mean", "deviation", "tangent_deviation"))
        return self.replace(cov=cov, tangent=tangent, **(rest | changes))

    def filled(self) -> Self:
        """The same with numbers in place of what is known to be 0."""
        zero, one = (jax.tree.map(like, self.cov) for like in (jnp.zeros_like, jnp.ones_like))
        return self.replace(
            mean=jnp.zeros((), self.dtype) if self.mean is None else self.mean,
            projection=self.projection or Projection(zero, zero, zero, zero, one),
            deviation=self.fluctuation,
            tangent_deviation=self.tangent_fluctuation,
        )

    @property
    def fluctuation(self) -> Pair:
        """The covariance up to a constant that all pairs share."""
        return self.cov if self.deviation is None else self.deviation

    @property
    def scattered(self) -> dict[str, Array]:
        """What a sum of two kernels takes over from the later one."""
        return {}

    @property
    def tangent_fluctuation(self) -> Pair:
        """The same of the tangent."""
        if self.tangent_deviation is None:
            return self.settled_tangent
        return self.tangent_deviation

    @property
    def deviations(self) -> tuple[Pair, Pair]:
        """What a layer of weights keeps apart of the two: ``deviation``, ``tangent_deviation``."""
        return self.fluctuation, self.tangent_fluctuation

    def centred_status(self, var: Array, eps: Array | float) -> Self:
        """The kernel with the status of a variance that comes from centring."""
        size = jnp.abs(self.same_positions(self.fluctuation.same)).max()
        return self.replace(status=worse(self.status, lost(size, var, eps)))

    def scattering(self, factor: Array, var: Array, eps: Array | float) -> Self:
        """The kernel: that n is large enough was checked."""
        return self

    @property
    def moment(self) -> Pair:
        """Uncentred second moment E[z_a z_b]."""
        if self.mean is None:
            return self.cov
        square = self.mean**2
        return jax.tree.map(lambda entry: entry + square, self.cov)

    @property
    def settled_tangent(self) -> Pair:
        """The tangent where nothing correlated with z_hat follows: its parts averaged."""
        return jax.tree.map(jnp.add, self._projected_tangent, self.scale)

    @property
    def _projected_tangent(self) -> Pair:
        if self.projection is None:
            return self.tangent
        correlation, cross, _, weight, _ = self.projection
        return jax.tree.map(
            lambda t, c, x, y, w: t + w * c - x - y,
            self.tangent,
            correlation,
            cross,
            self.transposed(cross),
            weight,
        )

    def same_positions(self, entry: Array) -> Array:
        """The part of an entry at equal positions, (height, width) or ()."""
        if not self.all_positions:
            return entry
        height, width = self.positions
        square = entry.reshape(height * width, height * width)
        return jnp.diagonal(square).reshape(height, width)

    def totals(self, matrix: Pair) -> tuple[Array, Array, Array]:
        """Sums over the entries of one sample, of two, and of two at two positions."""
        own = self.same_positions(matrix.other).sum()
        return self.same_positions(matrix.same).sum(), own, matrix.other.sum() - own

    def averages(self) -> tuple[Array, Array, Array]:
        """Second moments of one sample, of two, and of two at two positions."""
        own = self.same_positions(self.cov.same).size
        rest = self.cov.same.size - own
        same, other, unequal = self.totals(self.moment)
        return same / own, other / own, unequal / rest if rest else other / own

    def transposed(self, matrix: Any) -> Any:
        """A matrix, or one of its entries, with the members of every pair exchanged."""
        if not self.all_positions:
            return matrix
        return jax.tree.map(lambda entry: jnp.moveaxis(entry, (0, 1), (2, 3)), matrix)

    def position_means(self, matrix: Pair) -> tuple[Pair, Pair, Pair]:
        """Means of every entry over the positions of its second member, its first, and both.

        Returns:
            The three means, each of the shape of the matrix; exact where all pairs of positions
            are kept.
        """
        if not self.all_positions:
            return matrix, matrix, matrix

        def averaged(*axes: int) -> Pair:
            return jax.tree.map(
                lambda entry: jnp.broadcast_to(entry.mean(axes, keepdims=True), entry.shape), matrix
            )

        return averaged(2, 3), averaged(0, 1), averaged(0, 1, 2, 3)

    def own_product(self, left: Pair, right: Pair) -> Pair:
        """The mean over positions r of left[(a, p), (a, r)] right[(a, r), (b, q)]."""
        if not self.all_positions:
            return jax.tree.map(lambda entry: left.same * entry, right)
        height, width = self.positions

        def product(entry: Array) -> Array:
            return einsum("ijkl,klmn->ijmn", left.same, entry)

        return jax.tree.map(lambda entry: product(entry) / (height * width), right)

    def either(self, own: Array) -> tuple[Array, Array]:
        """A value of each position as that of either member of a pair, broadcastable."""
        if not self.all_positions:
            return own, own
        return own[..., None, None], own[None, None]

    def diagonal(self, matrix: Pair) -> Array:
        """The entries of a value with itself, a number of each position."""
        return self.same_positions(matrix.same)

    def variances(self, matrix: Pair) -> tuple[Array, Array]:
        """The entries (a, a) and (b, b) that belong to every entry (a, b), broadcastable to it."""
        return self.either(self.diagonal(matrix))

    def center(self, matrix: Pair, over_positions: bool) -> Pair:
        """H M H, H = 1 - 11^T/n: the matrix of values whose batch mean was subtracted.

        Args:
            matrix: Any matrix of this kernel.
            over_positions: Whether the mean runs over samples and positions, or over samples only.

        Returns:
            The centered matrix, of the same shape.

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

    def batch_variance(self, matrix: Pair, over_positions: bool) -> Array:
        """The diagonal of a matrix averaged over the batch, as a number of each position."""
        own = self.same_positions(matrix.same)
        return jnp.broadcast_to(own.mean(), own.shape) if over_positions else own

    def sample_variance(self, matrix: Pair) -> Array:
        """The diagonal averaged over the positions of a sample, as a number of each position."""
        return self.batch_variance(matrix, over_positions=True)

    def shared(self, over_positions: bool) -> Array | float:
        """1 where the two values of a pair share what BatchNorm has one of, else 0."""
        if over_positions or not self.all_positions:
            return 1.0
        same = self.cov.same
        return jnp.eye(self.positions[0] * self.positions[1], dtype=same.dtype).reshape(same.shape)

    def spread(self, correlation: Pair, over_positions: bool) -> Spread:
        """What it changes that a unit is normalized by its own variance, not by the expected one.

        That of n independent values follows chi^2 with n - 1 degrees of freedom.

        Returns:
            ``first`` and ``second``, which are the correlation itself, and ``factor``,
            (1 - 1/m) / (1 - 3/m) for the m values that a variance is over.
        """
        share = self.inverse_samples
        if over_positions and self.positions:
            share = share / (self.positions[0] * self.positions[1])
        return Spread(correlation, (1 - share) / (1 - 3 * share), correlation)

    def normalized(self, spread: Spread, over_positions: bool) -> Self:
        """This kernel, behind a BatchNorm, with the projection that its variance's derivative is.

        Departure: left out, of order 1/n, where pairs of distinct positions count.

        Returns:
            The kernel with that projection; unchanged where it is left out, and unless
            ``statistics`` is ``"batch"``.
        """
        mixed = bool(self.positions) and (over_positions or self.all_positions)
        if self.statistics != "batch" or mixed:
            return self
        share = self.inverse_samples

        def matmul(a: Pair, b: Pair) -> Pair:
            both = a.other * b.other
            crossed = a.same * b.other + a.other * b.same
            return Pair(
                share * a.same * b.same + (1 - share) * both,
                share * crossed + (1 - 2 * share) * both,
            )

        cross = matmul(spread.second, self.tangent)
        own, weight = (
            Pair(entry, entry) for entry in (cross.same, matmul(spread.first, self.tangent).same)
        )
        one = jax.tree.map(jnp.ones_like, cross)
        return self.replace(projection=Projection(spread.second, cross, own, weight, one))

    def activated(self, phi: Nonlinearity) -> Self:
        """The kernel behind an elementwise function."""
        variances = self.variances(self.cov)
        scale_a, scale_b = self.variances(self.scale)
        scale = safe.geometric_mean(scale_a, scale_b)
        stretch = Pair(1.0, 1.0) if self.projection is None else self.projection.stretch
        moments = [
            expectations(phi, *variances, entry / times, self.mean)
            for entry, times in zip(self.cov, stretch, strict=True)
        ]
        tangent = [
            entry * moment.derivative + scale * moment.scale
            for entry, moment in zip(self.tangent, moments, strict=True)
        ]
        if self.projection is not None:
            variances = self.variances(self.projection.correlation)
            for index, moment in enumerate(moments):
                entry = Projection(*(matrix[index] for matrix in self.projection))
                both, cross = entry.behind(variances, moment)
                tangent[index] += both - cross - self.transposed(cross)
        products = [moment.product * times for moment, times in zip(moments, stretch, strict=True)]
        return self.behind(Pair(*products), Pair(*tangent))

    def windowed(self, positions: tuple[int, ...], side: int, stride: int, padding: str) -> Self:
        """The values under a moving window, taken together as one vector.

        ``"wei2019"`` takes every position to be alike: zero padding is circular there.

        Args:
            positions: The map behind.
            side: Side of the window.
            stride: Its step.
            padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.

        Returns:
            The kernel of these vectors at the new positions, with side^2 times the channels.
        """
        if self.statistics == PUBLISHED and padding == "SAME":
            padding = "CIRCULAR"
        axes = ((-4, -2), (-3, -1)) if self.all_positions else ((-2,), (-1,))

        def average(entry: Array) -> Array:
            for shifted_together in axes:
                shifted = windows(entry, shifted_together, side, stride, padding)
                entry = functools.reduce(jnp.add, shifted)
            return entry / side**2

        moment = jax.tree.map(average, self.moment)
        tangent = jax.tree.map(average, self.settled_tangent)
        return self.behind(moment, tangent, channels=side**2 * self.channels)

    def flattened(self) -> Self:
        """Behind a flatten head: the average over equal positions."""
        count = self.positions[0] * self.positions[1]
        return self._pooled(lambda entry: self.same_positions(entry).mean(), count)

    def pooled(self) -> Self:
        """Behind a mean over positions: the average over all pairs of them."""
        return self._pooled(jnp.mean, 1)

    def _pooled(self, average: Callable[[Array], Array], num_positions: int) -> Self:
        return self.replace(
            cov=jax.tree.map(average, self.cov),
            tangent=jax.tree.map(average, self._projected_tangent),
            projection=None,
            scale=jax.tree.map(average, self.scale),
            deviation=jax.tree.map(average, self.deviation),
            tangent_deviation=jax.tree.map(average, self.tangent_deviation),
            channels=num_positions * self.channels,
            all_positions=False,
        )


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
        projection=None,
        mean=None,
        inverse_samples=jnp.asarray(inverse, dtype),
        channels=shape[-1],
        statistics=statistics,
        all_positions=all_positions and bool(positions),
        status=jnp.asarray(Status.CONVERGED, jnp.int32),
    )


LOSS = 0.01
"""Relative error of a variance, by cancellation, that is too much."""


def lost(size: Array, var: Array, eps: Array | float) -> Array:
    """CANCELLATION where the rounding of numbers of this size is too much of var + eps."""
    rounding = jnp.finfo(var.dtype).eps * size
    return jnp.where(rounding > LOSS * (jnp.mean(var) + eps), Status.CANCELLATION, 0)


def worse(status: Array, other: Array) -> Array:
    """The first failure of two."""
    return jnp.where(status == Status.CONVERGED, other, status).astype(status.dtype)
