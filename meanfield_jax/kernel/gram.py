"""The state of a real batch: one matrix entry for every pair of its samples.

:class:`GramKernel` stands where :class:`EnsembleKernel` stands for i.i.d. samples, and the layers'
rules are the same. Matrices are (n, n) for vectors and (pairs of positions, n, n) for maps, see
:class:`Positions`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import (
    Moments,
    Nonlinearity,
    batch_expectations,
    variance_expectations,
)
from meanfield_jax.kernel.positions import Positions
from meanfield_jax.kernel.sphere import on_sphere
from meanfield_jax.kernel.state import LOSS, Projection, Spread, lost, worse
from meanfield_jax.kernel.windows import pad_width, windows
from meanfield_jax.precise import einsum, matmul, tensordot
from meanfield_jax.status import Status


def _static():
    return dataclasses.field(metadata=dict(static=True))


Shape = tuple[int, ...]

MOST_SCATTER = 15.0
"""E[1 / variance] E[variance] that is too much: rare draws decide. In two directions it is infinite
(and computed as 37), in three of equal variance 3."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GramKernel:
    """Covariance and tangent kernel of the samples of one batch.

    Attributes:
        cov: Covariance of a unit's value for two samples, around ``mean``; ([pairs,] n, n).
        tangent: <grad z_a, grad z_b> per unit over all parameters so far; likewise.
        scale: Correlation E[z_hat_a z_hat_b] where a BatchNorm's trainable scale was just passed,
            else None; likewise.
        projection: What a BatchNorm just passed takes off the tangent as its variance depends on
            the parameters, or None.
        mean: E[z], equal for all samples and positions, a scalar; None where it is exactly 0.
        images: The images themselves before the first layer, else None: a convolution takes its
            windows from them, and their own ``cov`` is never formed.
        channels: Units per position (width).
        statistics: ``"batch"``, ``"frozen"`` or ``"wei2019"``.
        pairs: The pairs of positions kept; None for vectors.
        deviation: The covariance less what centring removes, without cancellation: less the
            constant of a bias, or that of centred inputs; None where it is ``cov`` itself.
        tangent_deviation: The same of ``tangent``.
        status: A :class:`Status` as integer: CONVERGED unless a normalization failed.
        scatter: The largest E[1 / variance] E[variance] of what was normalized over the batch.
    """

    cov: Array
    tangent: Array
    scale: Array | None
    projection: Projection | None
    mean: Array | None
    images: Array | None
    status: Array
    scatter: Array
    channels: int = _static()
    statistics: str = _static()
    pairs: Positions | None = _static()  # noqa: RUF009
    deviation: Array | None = None
    tangent_deviation: Array | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the arrays."""
        return self.cov.dtype

    @property
    def positions(self) -> Shape:
        """The map's shape, () for a vector."""
        return () if self.pairs is None else self.pairs.shape

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def behind(self, cov: Array, tangent: Array, **changes: Any) -> Self:
        """The kernel behind a layer that z_hat does not survive; its mean is 0."""
        rest = dict.fromkeys(
            ("scale", "projection", "mean", "images", "deviation", "tangent_deviation")
        )
        return self.replace(cov=cov, tangent=tangent, **(rest | changes))

    def filled(self) -> Self:
        """The same with zeros in place of what is known to be 0."""
        zero = jnp.zeros_like(self.cov)
        return self.replace(
            scale=zero if self.scale is None else self.scale,
            mean=jnp.zeros((), self.cov.dtype) if self.mean is None else self.mean,
            projection=self.projection or Projection(zero, zero, zero, zero, zero + 1),
            images=None,
            deviation=self.deviations[0],
            tangent_deviation=self.deviations[1],
        )

    @property
    def fluctuation(self) -> Array:
        """A matrix whose centred one is that of the covariance, with less to cancel."""
        return self.cov if self.deviation is None else self.deviation

    @property
    def scattered(self) -> dict[str, Array]:
        """What a sum of two kernels takes over from the later one."""
        return dict(scatter=self.scatter)

    @property
    def tangent_fluctuation(self) -> Array:
        """The same of the tangent."""
        if self.tangent_deviation is None:
            return self.settled_tangent
        return self.tangent_deviation

    @property
    def deviations(self) -> tuple[Array | None, Array | None]:
        """What a layer of weights keeps apart of the two: ``deviation``, ``tangent_deviation``."""
        if self.pairs is not None:
            return None, None  # of maps they would take as much memory again
        return self.fluctuation, self.tangent_fluctuation

    def centred_status(self, var: Array, eps: Array | float) -> Self:
        """The kernel with the status of a variance that comes from centring."""
        size = jnp.abs(self.diagonal(self.fluctuation)).max()
        return self.replace(status=worse(self.status, lost(size, var, eps)))

    def scattering(self, factor: Array, var: Array, eps: Array | float) -> Self:
        """The kernel with the status of a normalization over the batch.

        Args:
            factor: E[1 / variance] E[variance] over random weights.
            var: The variance.
            eps: What is added to it; where it is far above the variance nothing is random.

        Returns:
            The kernel.
        """
        random = jnp.mean(var) > LOSS * eps
        scatter = jnp.where(random, jnp.mean(factor), 1.0)
        few = jnp.where(scatter < MOST_SCATTER, 0, Status.FEW_DIRECTIONS)
        largest = jnp.maximum(self.scatter, scatter)
        return self.replace(status=worse(self.status, few), scatter=largest)

    @property
    def moment(self) -> Array:
        """Uncentred second moment E[z_a z_b]."""
        return self.cov if self.mean is None else self.cov + self.mean**2

    @property
    def settled_tangent(self) -> Array:
        """The tangent where nothing correlated with z_hat follows: its parts averaged."""
        return (
            self._projected_tangent if self.scale is None else self._projected_tangent + self.scale
        )

    @property
    def _projected_tangent(self) -> Array:
        if self.projection is None:
            return self.tangent
        correlation, cross, _, weight, _ = self.projection
        return self.tangent + weight * correlation - cross - self.transposed(cross)

    def transposed(self, matrix: Array) -> Array:
        """The matrix with the members of every pair exchanged."""
        turned = jnp.swapaxes(matrix, -1, -2)
        return turned if self.pairs is None else turned[self.pairs.swapped]

    def position_means(self, matrix: Array) -> tuple[Array, Array, Array]:
        """Means of every entry over the positions of its second member, its first, and both.

        Where pairs of positions are left out, those that are kept stand for them.

        Returns:
            The three means, each of the shape of the matrix.
        """
        if self.pairs is None:
            return matrix, matrix, matrix
        pairs, size = self.pairs, self.pairs.size
        weighted = jnp.asarray(size * pairs.weights, matrix.dtype)[:, None, None] * matrix
        rows, columns = (
            jax.ops.segment_sum(weighted, numbers, size)[numbers]
            for numbers in (pairs.first, pairs.second)
        )
        return rows, columns, jnp.broadcast_to(weighted.sum(0) / size, matrix.shape)

    def own_product(self, left: Array, right: Array) -> Array:
        """The mean over positions r of left[(a, p), (a, r)] right[(a, r), (b, q)]."""
        own = jnp.diagonal(left, axis1=-2, axis2=-1)
        if self.pairs is None:
            return own[:, None] * right
        result = right
        for places in self.pairs.groups:
            part = einsum("cpra,crqab->cpqab", own[places], right[places])
            result = result.at[places].set(part / places.shape[1])
        return result

    def diagonal(self, matrix: Array) -> Array:
        """The entries of a value with itself, ([positions,] n)."""
        own = matrix if self.pairs is None else matrix[self.pairs.equal]
        return jnp.diagonal(own, axis1=-2, axis2=-1)

    def either(self, own: Array) -> tuple[Array, Array]:
        """A number of each value, ([positions,] n), as that of either member of a pair."""
        if self.pairs is None:
            return own[:, None], own[None, :]
        return own[self.pairs.first][:, :, None], own[self.pairs.second][:, None, :]

    def variances(self, matrix: Array) -> tuple[Array, Array]:
        """The entries (a, a) and (b, b) that belong to every entry (a, b), broadcastable to it."""
        return self.either(self.diagonal(matrix))

    def batch_variance(self, matrix: Array, over_positions: bool) -> Array:
        """The diagonal averaged over the batch, as a number of each value, ([positions,] n)."""
        own = self.diagonal(matrix)
        average = own.mean() if over_positions else own.mean(-1, keepdims=True)
        return jnp.broadcast_to(average, own.shape)

    def sample_variance(self, matrix: Array) -> Array:
        """The diagonal averaged over the positions of a sample, as a number of each value."""
        own = self.diagonal(matrix)
        return own if self.pairs is None else jnp.broadcast_to(own.mean(0), own.shape)

    def shared(self, over_positions: bool) -> Array | float:
        """1 where the two values of a pair share what BatchNorm has one of, else 0."""
        if over_positions or self.pairs is None:
            return 1.0
        own = self.pairs.first == self.pairs.second
        return jnp.asarray(own, self.cov.dtype)[:, None, None]

    def totals(self, matrix: Array) -> tuple[Array, Array, Array]:
        """Sums over the entries of one sample, of two, and of two at two positions."""
        own = matrix if self.pairs is None else matrix[self.pairs.equal]
        same = jnp.trace(own, axis1=-2, axis2=-1).sum()
        unequal = 0.0
        if self.pairs is not None and len(self.pairs.first) > self.pairs.size:
            rest = matrix.sum() - own.sum()
            unequal = rest - (jnp.trace(matrix, axis1=-2, axis2=-1).sum() - same)
        return same, own.sum() - same, jnp.asarray(unequal, self.dtype)

    def averages(self) -> tuple[Array, Array, Array]:
        """Second moments of one sample, of two, and of two at two positions."""
        num_samples, kept = self.cov.shape[-1], 1 if self.pairs is None else len(self.pairs.first)
        two = max(num_samples * (num_samples - 1), 1)
        size = 1 if self.pairs is None else self.pairs.size
        if self.images is not None:
            total = self.images.sum(0)
            square = jnp.sum(self.images**2)
            same = square / self.images.size
            other = (jnp.sum(total**2) - square) / (self.images[0].size * two)
            unequal = jnp.sum(total.sum((0, 1)) ** 2) - jnp.sum(jnp.sum(self.images, (1, 2)) ** 2)
            unequal = unequal / (self.channels * two) - size * other
            return same, other, unequal / (size * (size - 1)) if size > 1 else other
        same, other, unequal = self.totals(self.moment)
        other = other / (size * two)
        if kept > size:
            unequal = unequal / ((kept - size) * two)
        return same / (size * num_samples), other, unequal if kept > size else other

    def center(self, matrix: Array, over_positions: bool) -> Array:
        """H M H, H = 1 - 11^T/n: the matrix of values whose batch mean was subtracted.

        Args:
            matrix: Any matrix of this kernel.
            over_positions: Whether the mean runs over samples and positions, or over samples only.

        Returns:
            The centered matrix, of the same shape.

        Accuracy:
            Exact if all pairs of positions are kept; otherwise a position's mean runs over those
            that it is kept with.
        """
        if self.pairs is None or not over_positions:
            rows, columns = matrix.mean(-1, keepdims=True), matrix.mean(-2, keepdims=True)
            return matrix - rows - columns + rows.mean(-2, keepdims=True)
        share = jnp.asarray(1 / self.pairs.partners, matrix.dtype)
        rows = share[:, None] * matrix.mean(-1)
        rows = jax.ops.segment_sum(rows, self.pairs.first, self.pairs.size)
        a, b = self.either(rows)
        means = [rows[members].mean() for members in self.pairs.classes]
        total = jnp.concatenate(
            [jnp.full(at.size, mean) for at, mean in zip(self.pairs.places, means, strict=True)]
        )
        return matrix - a - b + total[:, None, None]

    def spread(self, correlation: Array, over_positions: bool) -> Spread:
        """What it changes that a unit is normalized by its own variance, not by the expected one.

        Args:
            correlation: Covariance of the centred values over their expected variance.
            over_positions: As in :meth:`center`.

        Returns:
            ``first``, ([pairs,] n, n), and ``second``, likewise; ``factor`` broadcasts to them.

        Accuracy:
            Exact where statistics are over samples; to second order in 1/participation ratio where
            they are over positions, too. Derivatives are those of ``correlation`` alone.
        """
        fixed = lax.stop_gradient(correlation)
        if self.pairs is None:
            first, factor, second = on_sphere(fixed)
        elif not over_positions:
            equal = self.pairs.equal
            own = on_sphere(fixed[equal])
            first, second = (fixed.at[equal].set(matrix) for matrix in (own.first, own.second))
            factor = jnp.sqrt(own.factor[self.pairs.first] * own.factor[self.pairs.second])
        else:
            first = second = fixed
            factors = []
            for places in self.pairs.groups:
                own = on_sphere(_square(fixed, places))
                first = first.at[places].set(_pieces(own.first, places))
                second = second.at[places].set(_pieces(own.second, places))
                factors.append(own.factor.ravel())
            factor = jnp.concatenate(factors).mean()
        change = correlation - fixed
        return Spread(first + change, lax.stop_gradient(factor), second + change)

    def normalized(self, spread: Spread, over_positions: bool) -> Self:
        """This kernel, behind a BatchNorm, with the projection that its variance's derivative is.

        Args:
            spread: See :meth:`spread`.
            over_positions: As in :meth:`center`.

        Returns:
            The kernel with that projection; unchanged unless ``statistics`` is ``"batch"``.
        """
        if self.statistics != "batch":
            return self
        tangent, pairs, second = self.tangent, self.pairs, spread.second
        if pairs is None or not over_positions:
            num_samples = second.shape[-1]
            own = second if pairs is None else second[pairs.equal][pairs.first]
            projection = Projection(
                correlation=second,
                cross=matmul(own, tangent) / num_samples,
                own=jnp.sum(tangent * second, -2, keepdims=True) / num_samples,
                weight=jnp.mean(tangent * spread.first, (-2, -1), keepdims=True),
                stretch=1.0,
            )
            return self.replace(projection=projection)
        cross, own, weights = tangent, tangent[:, :1], []
        for places in pairs.groups:
            z, t = _square(second, places), _square(tangent, places)
            size = z.shape[-1]
            cross = cross.at[places].set(_pieces(matmul(z, t) / size, places))
            one_row = jnp.broadcast_to(jnp.mean(z * t, -2, keepdims=True), z.shape)
            own = own.at[places].set(_pieces(one_row, places)[..., :1, :])
            weights.append(jnp.mean(_square(spread.first, places) * t, (-2, -1)))
        projection = Projection(second, cross, own, jnp.concatenate(weights).mean(), 1.0)
        return self.replace(projection=projection)

    def activated(self, phi: Nonlinearity) -> Self:
        """The kernel behind an elementwise function."""
        stretch = 1.0 if self.projection is None else self.projection.stretch
        moments = self._moments(phi, self.cov / stretch)
        tangent = self.tangent * moments.derivative
        if self.scale is not None:
            scale_a, scale_b = self.variances(self.scale)
            tangent += safe.geometric_mean(scale_a, scale_b) * moments.scale
        if self.projection is not None:
            variances = self.variances(self.projection.correlation)
            both, cross = self.projection.behind(variances, moments)
            tangent += both - cross - self.transposed(cross)
        return self.behind(moments.product * stretch, tangent)

    def _moments(self, phi: Nonlinearity, cov: Array) -> Moments:
        moments = batch_expectations(phi, *self.variances(self.cov), cov, self.mean)
        if phi.closed_form is not None and self.mean is None:
            return moments
        own = variance_expectations(phi, self.diagonal(self.cov), self.mean)
        same = jnp.eye(self.cov.shape[-1])
        if self.pairs is not None:
            same = self.shared(over_positions=False) * same[None]
        return jax.tree.map(
            lambda entry, value: jnp.where(same > 0, self.either(value)[0], entry), moments, own
        )

    def windowed(self, positions: tuple[int, ...], side: int, stride: int, padding: str) -> Self:
        """The values under a moving window, taken together as one vector.

        Args:
            positions: The map behind.
            side: Side of the window.
            stride: Its step.
            padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.

        Returns:
            The kernel of these vectors at the new positions, with side^2 times the channels.

        Raises:
            SpecError: pairs of positions are needed that were left out.
        """
        assert self.pairs is not None
        pairs, channels = self.pairs.behind(positions, stride), side**2 * self.channels
        if self.images is not None:
            rows = windows(self.images, (1,), side, stride, padding)
            patches = [part for row in rows for part in windows(row, (2,), side, stride, padding)]
            cov = _gram(jnp.concatenate(patches, -1), pairs)
            return self.behind(cov, jnp.zeros_like(cov), channels=channels, pairs=pairs)
        places = [
            self.pairs.find(first, second)
            for first, second in zip(
                *(
                    _under_window(numbers, self.pairs.shape, pairs.shape, side, stride, padding)
                    for numbers in (pairs.first, pairs.second)
                ),
                strict=True,
            )
        ]
        left_out = len(self.pairs.first)
        if padding == "CIRCULAR" and any((at == left_out).any() for at in places):
            cause = "windows that wrap around meet pairs of positions that are not kept"
            remedy = "use 'SAME', or maps whose sides the strides divide"
            raise problem(SpecError, "Conv.padding", padding, cause, remedy)

        def average(matrix: Array) -> Array:
            parts = [jnp.take(matrix, at, 0, mode="fill", fill_value=0) for at in places]
            return functools.reduce(jnp.add, parts) / side**2

        return self.behind(
            average(self.moment),
            average(self.settled_tangent),
            channels=channels,
            pairs=pairs,
        )

    def flattened(self) -> Self:
        """Behind a flatten head: independent weights for each position, equal positions only."""
        assert self.pairs is not None
        pairs = self.pairs
        return self._pooled(lambda matrix: matrix[pairs.equal].mean(0), pairs.size)

    def pooled(self) -> Self:
        """Behind a mean over positions: the average over all pairs."""
        assert self.pairs is not None
        weights = jnp.asarray(self.pairs.weights, self.cov.dtype)
        return self._pooled(lambda matrix: tensordot(weights, matrix, 1), 1)

    def _pooled(self, average: Callable[[Array], Array], num_positions: int) -> Self:
        return self.behind(
            average(self.cov),
            average(self._projected_tangent),
            scale=None if self.scale is None else average(self.scale),
            mean=self.mean,
            deviation=None if self.deviation is None else average(self.deviation),
            tangent_deviation=(
                None if self.tangent_deviation is None else average(self.tangent_deviation)
            ),
            channels=num_positions * self.channels,
            pairs=None,
        )


def _under_window(
    numbers: np.ndarray, shape: Shape, behind: Shape, side: int, stride: int, padding: str
) -> list[np.ndarray]:
    """The positions, (2, pairs) as row and column, under each place of the window at others."""
    corners = [
        stride * index - pad_width(size, side, stride, padding)[0]
        for index, size in zip(np.unravel_index(numbers, behind), shape, strict=True)
    ]
    offsets = np.ndindex(side, side)
    places = (np.stack([corners[0] + row, corners[1] + column]) for row, column in offsets)
    if padding == "CIRCULAR":
        return [place % np.array(shape)[:, None] for place in places]
    return list(places)


def _square(matrix: Array, places: np.ndarray) -> Array:
    """The matrices over all samples at the positions of each class, (classes, size, size)."""
    classes, members, _ = places.shape
    size = members * matrix.shape[-1]
    return matrix[places].transpose(0, 1, 3, 2, 4).reshape(classes, size, size)


def _pieces(squares: Array, places: np.ndarray) -> Array:
    """The pairs of positions of such matrices, (classes, members, members, n, n)."""
    classes, members, _ = places.shape
    blocks = squares.reshape(classes, members, -1, members, squares.shape[-1] // members)
    return blocks.transpose(0, 1, 3, 2, 4)


def batch_kernel(x: Array, statistics: str, modulus: int) -> GramKernel:
    """A batch as it is: second moments over the features of a sample (the channels of a position).

    Args:
        x: (n, features) or (n, height, width, channels).
        statistics: One of :data:`STATISTICS`.
        modulus: Of the pairs of positions to keep, see :class:`Positions`.

    Returns:
        The kernel before the first layer; its tangent is 0.
    """
    pairs = None if x.ndim == 2 else Positions(x.shape[1:3], modulus)
    cov = _gram(x, pairs)
    return GramKernel(
        cov=cov,
        tangent=jnp.zeros_like(cov),
        scale=None,
        projection=None,
        mean=None,
        images=None if pairs is None else x,
        channels=x.shape[-1],
        statistics=statistics,
        pairs=pairs,
        deviation=_gram(x - x.mean(0, keepdims=True), None) if pairs is None else None,
        status=jnp.asarray(Status.CONVERGED, jnp.int32),
        scatter=jnp.ones((), x.dtype),
    )


def _gram(x: Array, pairs: Positions | None) -> Array:
    """x_a x_b per feature, for all pairs of samples (and the pairs of positions)."""
    if pairs is None:
        return matmul(x, x.T) / x.shape[-1]
    by_position = x.reshape(x.shape[0], pairs.size, x.shape[-1]).transpose(1, 0, 2)
    turned = jnp.swapaxes(by_position, -1, -2)
    return matmul(by_position[pairs.first], turned[pairs.second]) / x.shape[-1]
