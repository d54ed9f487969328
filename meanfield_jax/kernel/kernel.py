"""The kernel that is propagated through the layers: covariance and tangent of a unit's values.

Both are matrices over pairs of values, see matrix.py; everything here holds for i.i.d. samples as
well as for a batch of data.
"""

import dataclasses
from typing import Any, Generic, NamedTuple, Self, TypeVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import Moments, Nonlinearity, mean_value
from meanfield_jax.kernel.gram_matrix import GramMatrix, gram
from meanfield_jax.kernel.matrix import Matrix, Number, Window
from meanfield_jax.kernel.pair_matrix import PairMatrix
from meanfield_jax.kernel.positions import Positions
from meanfield_jax.pytree import pytree, static
from meanfield_jax.status import Status

M = TypeVar("M", bound=Matrix)

PUBLISHED = "wei2019"
STATISTICS = ("batch", "frozen", PUBLISHED)
"""How BatchNorm's mean and standard deviation are treated; for theory see :class:`BatchNorm`."""

MOST_FLUCTUATION = 15.0
"""E[1 / variance] E[variance] from which on rare draws dominate. For two directions it is infinite
(and computed as 37), for three of equal variance it is 3."""

LOSS = 0.01
"""Relative error of a variance, caused by cancellation, from which on the result is a failure."""


class Projection(NamedTuple):
    """How a norm changes the tangent because its variance depends on the parameters.

    With z_hat = H z / s and dz_hat = (1/s) (1 - z_hat z_hat^T / n) H dz, the tangent T of H z / s
    becomes T - (z_hat v^T + v z_hat^T) + w z_hat z_hat^T, where v = T z_hat / n and
    w = z_hat^T v / n. Averages over z_hat are taken where the next layer is known.

    Attributes:
        correlation: E[z_hat_a z_hat_b], a matrix.
        cross: E[z_hat_a v_b], a matrix.
        own: E[z_hat_b v_b], a matrix, or an array that broadcasts to one.
        weight: w, a matrix, or an array that broadcasts to one.
        factor: Factor by which E[f(z_hat_a) f(z_hat_b)] exceeds its Gaussian value. It is not 1
            where the two are divided by different sample deviations; None for 1.
    """

    correlation: Matrix
    cross: Matrix
    own: Matrix | Number
    weight: Matrix | Number
    factor: Matrix | None

    def scaled(self, fraction: Array | float) -> Self:
        """The projection of a variance that depends on the parameters by only this fraction."""
        cross, own, weight = (part * fraction for part in (self.cross, self.own, self.weight))
        return self._replace(cross=cross, own=own, weight=weight)

    def of_function(self, moments: Moments[M]) -> tuple[M, Matrix]:
        """E[phi' phi' w z_hat_a z_hat_b] and E[phi' phi' z_hat_a v_b].

        v_b is jointly Gaussian with the two z_hat: it is regressed on them, and the remainder drops
        out. The regression on z_hat_b comes first, so that nothing remains on the diagonal.

        Args:
            moments: Moments of the function phi.

        Returns:
            The two matrices.
        """
        var_a, var_b = self.correlation.variances()
        both = moments.scale * safe.geometric_mean(var_a, var_b)

        def regressed(
            correlation: Array, cross: Array, own: Array, both: Array, square: Array
        ) -> Array:
            slope = safe.divide(own, var_b)
            ratio = safe.divide(correlation, var_b)
            left = var_a - ratio * correlation
            resolved = left > 100 * jnp.finfo(left.dtype).eps * var_a
            partial = jnp.where(resolved, cross - slope * correlation, 0.0)
            partial = partial / jnp.where(resolved, left, 1.0)
            return slope * both + partial * (var_a * square - ratio * both)

        cross = self.correlation.map(regressed, self.cross, self.own, both, moments.square)
        return both * self.weight, cross


@pytree
class Kernel(Generic[M]):
    """Covariance and tangent of the values of a unit, for all pairs of samples (and positions).

    Attributes:
        covariance: Around ``mean``.
        tangent: <grad z_a, grad z_b> per unit over all parameters so far, without the contributions
            of ``scale`` and ``projection``.
        scale: The correlation E[z_hat_a z_hat_b] right after a norm with a trainable scale, else
            None. The tangent of the scale is z_hat_a z_hat_b, which is random until averaged.
        projection: How the norm just passed changes the tangent because its variance depends on the
            parameters, or None.
        mean: E[z], equal for all samples and positions, (), or after a :class:`MaxPool` on a batch
            one number per value; None where it is exactly 0.
        unit_mean: After an activation, whose outputs do not have mean 0: the average of E[z], which
            ``covariance`` still contains, (); None where it is 0.
        deviation: The covariance without a constant that subtracting a mean removes (from a bias,
            or from the mean of the inputs), so that there is no cancellation; None where it equals
            ``covariance``.
        tangent_deviation: The same for ``tangent``.
        status: A :class:`Status` as an integer: CONVERGED unless a normalization failed.
        fluctuation: The largest E[1 / variance] E[variance] of the values that were normalized
            over a batch, or within a sample. Over i.i.d. samples it depends only on their number,
            and is left out.
        channels: Units per position (width), a number.
        statistics: ``"batch"``, ``"frozen"`` or ``"wei2019"``.
        shared: The part of ``covariance`` that is of values equal in all channels, which a mean
            over channels removes, as after :class:`MixPositions`; None for 0.
        shared_tangent: The same part of ``tangent``.
    """

    covariance: M
    tangent: M
    scale: M | None
    projection: Projection | None
    mean: Float[Array, "..."] | None
    unit_mean: Float[Array, ""] | None
    deviation: M | None
    tangent_deviation: M | None
    status: Int[Array, ""]
    fluctuation: Float[Array, ""]
    channels: Float[Array, ""] | float
    statistics: str = static()
    shared: M | None = None
    shared_tangent: M | None = None

    @property
    def positions(self) -> tuple[int, ...]:
        """The map's shape, () for a vector."""
        return self.covariance.positions

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the matrices."""
        return self.covariance.dtype

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def after(self, covariance: Matrix, tangent: Matrix, **changes: Any) -> Self:
        """The kernel after a layer: mean 0 and no bookkeeping of the last norm, unless given."""
        reset = "scale", "projection", "mean", "unit_mean", "deviation", "tangent_deviation"
        rest = dict.fromkeys((*reset, "shared", "shared_tangent"))
        return self.replace(covariance=covariance, tangent=tangent, **(rest | changes))

    def with_numbers(self) -> Self:
        """The same kernel with arrays in place of None, as a scan over layers requires."""
        covariance = self.covariance + 0.0
        zero, one = covariance.full(0.0), covariance.full(1.0)
        parts = Projection(zero, zero, zero, zero, one)
        if self.projection is not None:
            correlation, cross, own, weight, factor = self.projection
            known = (correlation, cross, own, weight, factor or one)
            parts = Projection(*(zero + part for part in known))
        return self.replace(
            covariance=covariance,
            scale=self.scale or zero,
            mean=zero_if_none(self.mean, self.dtype),
            unit_mean=zero_if_none(self.unit_mean, self.dtype),
            projection=parts,
            deviation=self.deviations[0],
            tangent_deviation=self.deviations[1],
            shared=self.shared or zero,
            shared_tangent=self.shared_tangent or zero,
        )

    def around_means(self) -> Self:
        """The kernel with ``unit_mean`` in the mean and no longer in the covariance."""
        if self.unit_mean is None:
            return self
        return self.replace(
            covariance=self.covariance - self.unit_mean**2,
            mean=self.unit_mean if self.mean is None else self.mean + self.unit_mean,
            unit_mean=None,
        )

    @property
    def moment(self) -> M:
        """Uncentred second moment E[z_a z_b]."""
        if self.mean is None:
            return self.covariance
        if self.mean.ndim == 0:
            return self.covariance + self.mean**2
        a, b = self.covariance.of_members(self.mean)
        return self.covariance + a * b

    def with_one_mean(self) -> Self:
        """The kernel with the same second moments and one mean for all values."""
        if self.mean is None or self.mean.ndim == 0:
            return self
        mean = self.mean.mean()
        return self.replace(covariance=self.moment - mean**2, mean=mean)

    @property
    def effective_tangent(self) -> M:
        """The tangent if nothing correlated with z_hat follows, so that its parts are averaged."""
        tangent = self._projected_tangent
        return tangent if self.scale is None else tangent + self.scale

    @property
    def _projected_tangent(self) -> M:
        if self.projection is None:
            return self.tangent
        correlation, cross, _, weight, _ = self.projection
        return self.tangent + correlation * weight - cross - cross.T

    @property
    def deviations(self) -> tuple[M | None, M | None]:
        """``deviation`` and ``tangent_deviation`` if they are kept at all, else None."""
        if not self.covariance.keeps_deviations:
            return None, None
        return self._loose_covariance, self._loose_tangent

    @property
    def _loose_covariance(self) -> M:
        return self.covariance if self.deviation is None else self.deviation

    @property
    def _loose_tangent(self) -> M:
        return self.effective_tangent if self.tangent_deviation is None else self.tangent_deviation

    def centred(self, over_positions: bool) -> M:
        """The covariance of the values after their mean over the batch is subtracted."""
        return self._loose_covariance.centred(over_positions)

    def centred_tangent(self, over_positions: bool) -> M:
        """The tangent of the values after their mean over the batch is subtracted."""
        return self._loose_tangent.centred(over_positions)

    def with_variance(self, var: Float[Array, "..."], eps: Array | float) -> Self:
        """The kernel, with status CANCELLATION if this variance is lost to rounding."""
        size = jnp.abs(self._loose_covariance.diagonal()).max()
        rounding = jnp.finfo(var.dtype).eps * size
        lost = jnp.where(rounding > LOSS * (jnp.mean(var) + eps), Status.CANCELLATION, 0)
        return self.replace(status=first_failure_of(self.status, lost))

    def with_fluctuation(self, factor: Float[Array, ""]) -> Self:
        """The kernel, with status FEW_DIRECTIONS if a variance fluctuates too much.

        Args:
            factor: E[1 / variance] E[variance] over random weights.

        Returns:
            The kernel.
        """
        few = jnp.where(factor < MOST_FLUCTUATION, 0, Status.FEW_DIRECTIONS)
        largest = jnp.maximum(self.fluctuation, factor)
        return self.replace(status=first_failure_of(self.status, few), fluctuation=largest)

    def activated(self, phi: Nonlinearity) -> Self:
        """The kernel after an elementwise function."""
        factor = None if self.projection is None else self.projection.factor
        moments = self.covariance.expectations(phi, self.mean, factor)
        tangent = self.tangent * moments.derivative
        if self.scale is not None:
            tangent += moments.scale * safe.geometric_mean(*self.scale.variances())
        if self.projection is not None:
            both, cross = self.projection.of_function(moments)
            tangent += both - cross - cross.T
        product = moments.product if factor is None else moments.product * factor
        average = mean_value(phi, self.covariance.diagonal(), self.mean).mean()
        return self.after(product, tangent, unit_mean=average)

    def windowed(self, window: Window) -> Self:
        """The kernel of the values under a moving window, taken together as one vector.

        Args:
            window: The window of the convolution.

        Returns:
            The kernel of these vectors at the new positions, with side^2 times as many channels.
        """
        moment = self.moment.windows(window)
        inputs = self.covariance.of_inputs
        tangent = moment.full(0.0) if inputs else self.effective_tangent.windows(window)
        return self.after(moment, tangent, channels=window.side**2 * self.channels)

    def flattened(self) -> Self:
        """The kernel after a flatten head with independent weights: only equal positions count."""
        return self.with_one_mean()._pooled("flattened", self.positions[0] * self.positions[1])

    def pooled(self) -> Self:
        """The kernel after a mean over positions: the average over all pairs of positions."""
        return self.with_one_mean()._pooled("pooled", 1)

    def _pooled(self, average: str, num_positions: int) -> Self:
        def averaged(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else getattr(matrix, average)()

        return self.replace(
            covariance=averaged(self.covariance),
            tangent=averaged(self._projected_tangent),
            projection=None,
            scale=averaged(self.scale),
            deviation=averaged(self.deviation),
            tangent_deviation=averaged(self.tangent_deviation),
            channels=num_positions * self.channels,
        )


def iid_inputs(
    positions: tuple[int, ...],
    channels: Array | float,
    num_samples: Array | float | None,
    statistics: str,
    all_positions: bool,
    dtype: jnp.dtype,
) -> Kernel[PairMatrix]:
    """The kernel of inputs with independent N(0, 1) features: covariance 1 with itself, else 0.

    Args:
        positions: (height, width), or () for vectors.
        channels: Number of features at each position.
        num_samples: n, or None for the limit n -> infinity.
        statistics: One of :data:`STATISTICS`.
        all_positions: Whether to keep pairs of distinct positions.
        dtype: Dtype of the arrays.

    Returns:
        The kernel before the first layer; its tangent is 0.
    """
    all_positions = all_positions and bool(positions)
    same = jnp.ones(positions, dtype)
    if all_positions:
        size = positions[0] * positions[1]
        same = jnp.eye(size, dtype=dtype).reshape(*positions, *positions)
    zero = jnp.zeros_like(same)
    inverse = 0.0 if num_samples is None else 1.0 / jnp.asarray(num_samples, dtype)
    covariance = PairMatrix(same, zero, jnp.asarray(inverse, dtype), all_positions)
    return _inputs(covariance, covariance.full(0.0), channels, statistics)


def batch_inputs(x: Float[Array, "n ..."], statistics: str, modulus: int) -> Kernel[GramMatrix]:
    """The kernel of a batch: second moments over the features (the channels of a position).

    Args:
        x: The batch, (n, features) or (n, height, width, channels).
        statistics: One of :data:`STATISTICS`.
        modulus: Modulus of the pairs of positions to keep, see :class:`Positions`.

    Returns:
        The kernel before the first layer; its tangent is 0.
    """
    pairs = None if x.ndim == 2 else Positions(x.shape[1:3], modulus)
    covariance = gram(x, pairs)
    zero = covariance.full(0.0)
    if pairs is None:
        deviation = gram(x - x.mean(0, keepdims=True), None)
    else:
        covariance, deviation = dataclasses.replace(covariance, images=x), None
    return _inputs(covariance, zero, x.shape[-1], statistics).replace(deviation=deviation)


def _inputs(covariance: M, zero: M, channels: Array | float, statistics: str) -> Kernel[M]:
    return Kernel(
        covariance=covariance,
        tangent=zero,
        scale=None,
        projection=None,
        mean=None,
        unit_mean=None,
        deviation=None,
        tangent_deviation=None,
        status=jnp.asarray(Status.CONVERGED, jnp.int32),
        fluctuation=jnp.ones((), covariance.dtype),
        channels=jnp.asarray(channels, covariance.dtype),
        statistics=statistics,
    )


def zero_if_none(value: Array | None, dtype: jnp.dtype) -> Array:
    """The value, or 0 as an array if it is None."""
    return jnp.zeros((), dtype) if value is None else value


def first_failure_of(status: Int[Array, ""], other: Int[Array, ""]) -> Int[Array, ""]:
    """The first of two statuses that is a failure, else CONVERGED."""
    return jnp.where(status == Status.CONVERGED, other, status).astype(status.dtype)
