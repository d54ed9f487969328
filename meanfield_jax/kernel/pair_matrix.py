"""Matrices over exchangeable (i.i.d.) samples, with an entry for one sample and one for two."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from meanfield_jax.kernel.gaussian import Moments, Nonlinearity, expectations
from meanfield_jax.kernel.matrix import Matrix, Number, Window
from meanfield_jax.kernel.sphere import SphereAverages
from meanfield_jax.kernel.windows import windows
from meanfield_jax.precise import einsum
from meanfield_jax.pytree import pytree, static


@pytree
class PairMatrix(Matrix):
    """A matrix over exchangeable samples: its diagonal and its off-diagonal entry.

    In convolutional maps every entry is an array over positions. A flatten head gives distinct
    positions independent weights, so that only equal positions are coupled and the axes are
    (height, width). Where distinct positions are coupled (a mean over positions), the axes are
    (height, width, height, width).

    The two entries are separate arrays rather than one array with an axis of length two, which is
    an order of magnitude faster when thousands of networks are vmapped.

    Attributes:
        same: Entry of one sample with itself.
        other: Entry of two samples.
        inverse_samples: 1/n for the n samples over which BatchNorm averages; 0 is the limit.
        all_positions: Whether pairs of distinct positions are kept.
    """

    iid = True

    same: Float[Array, "*map"]
    other: Float[Array, "*map"]
    inverse_samples: Float[Array, "..."]
    all_positions: bool = static()

    def map(self, function: Callable[..., Array], *others: Any) -> Self:
        pairs = [(o.same, o.other) if isinstance(o, PairMatrix) else (o, o) for o in others]
        same = function(self.same, *(pair[0] for pair in pairs))
        return self.replaced(same, function(self.other, *(pair[1] for pair in pairs)))

    def replaced(self, same: Any, other: Any, all_positions: bool | None = None) -> Self:
        """The matrix with these entries."""
        kept = self.all_positions if all_positions is None else all_positions
        return dataclasses.replace(self, same=same, other=other, all_positions=kept)

    @property
    def positions(self) -> tuple[int, ...]:
        shape = self.same.shape
        return shape[: len(shape) // 2] if self.all_positions else shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.same.dtype

    @property
    def T(self) -> Self:
        if not self.all_positions:
            return self
        return self.map(lambda entry: jnp.moveaxis(entry, (0, 1), (2, 3)))

    @property
    def keeps_deviations(self) -> bool:
        return True

    def _at_equal_positions(self, entry: Float[Array, "*map"]) -> Float[Array, "*positions"]:
        if not self.all_positions:
            return entry
        height, width = self.positions
        square = entry.reshape(height * width, height * width)
        return jnp.diagonal(square).reshape(height, width)

    def diagonal(self) -> Float[Array, "*positions"]:
        """The entries of a value with itself, one number per position."""
        return self._at_equal_positions(self.same)

    def of_members(self, values: Array) -> tuple[Array, Array]:
        if not self.all_positions:
            return values, values
        return values[..., None, None], values[None, None]

    def batch_mean(
        self, values: Float[Array, "*positions"], over_positions: bool
    ) -> Float[Array, "*positions"]:
        return self.sample_mean(values) if over_positions else values

    def sample_mean(self, values: Float[Array, "*positions"]) -> Float[Array, "*positions"]:
        return jnp.broadcast_to(values.mean(), values.shape)

    def sum(self) -> Float[Array, ""]:
        return self.same.sum() + self.other.sum()

    def totals(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        return self.diagonal().sum(), self._at_equal_positions(self.other).sum()

    def averages(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        same, other = self.totals()
        size = self.diagonal().size
        return same / size, other / size

    def _batch_average(
        self, same: Float[Array, "*map"], other: Float[Array, "*map"], num_positions: int = 1
    ) -> Float[Array, "*map"]:
        fraction = self.inverse_samples / num_positions
        return fraction * same + (1 - fraction) * other

    def centred(self, over_positions: bool) -> Self:
        """See :meth:`Matrix.centred`.

        Returns:
            The centred matrix.

        Accuracy:
            Exact, with one exception: where only equal positions are kept, a mean over positions
            takes the entries of unequal positions to be those of two samples.
        """
        if not (over_positions and self.positions):
            return self - self._batch_average(self.same, self.other)
        if self.all_positions:
            pooled = self._batch_average(self.same, self.other)
            row = pooled.mean((-2, -1), keepdims=True)
            column = pooled.mean((-4, -3), keepdims=True)
            return self - (row + column - pooled.mean())
        return self - self._batch_average(self.same.mean(), self.other.mean(), self.same.size)

    def alike(self, over_positions: bool) -> Number:
        if over_positions or not self.all_positions:
            return 1.0
        size = self.positions[0] * self.positions[1]
        return jnp.eye(size, dtype=self.dtype).reshape(self.same.shape)

    def on_sphere(self, over_positions: bool) -> SphereAverages[Self]:
        """See :meth:`Matrix.on_sphere`: a variance is chi^2 with m - 1 degrees of freedom.

        Returns:
            The matrix itself twice, and (1 - 1/m) / (1 - 3/m), where m is the number of values in
            a variance.
        """
        fraction = self.inverse_samples
        if over_positions and self.positions:
            fraction = fraction / (self.positions[0] * self.positions[1])
        return SphereAverages(self, (1 - fraction) / (1 - 3 * fraction), self)

    def has_products(self, over_positions: bool) -> bool:
        return not (self.positions and (over_positions or self.all_positions))

    def product(self, other: Any, over_positions: bool) -> Self:
        fraction, a, b = self.inverse_samples, self, other
        both = a.other * b.other
        crossed = a.same * b.other + a.other * b.same
        same = fraction * a.same * b.same + (1 - fraction) * both
        return self.replaced(same, fraction * crossed + (1 - 2 * fraction) * both)

    def means(self, over_positions: bool) -> tuple[Array, Array]:
        average = self._batch_average(self.same, self.other)
        return average, average

    def position_means(self) -> tuple[Self, Self, Self]:
        if not self.all_positions:
            return self, self, self

        def averaged(*axes: int) -> Self:
            return self.map(
                lambda entry: jnp.broadcast_to(entry.mean(axes, keepdims=True), entry.shape)
            )

        return averaged(2, 3), averaged(0, 1), averaged(0, 1, 2, 3)

    def own_product(self, other: Any) -> Self:
        if not self.all_positions:
            return other * self.same
        size = self.positions[0] * self.positions[1]
        return other.map(lambda entry: einsum("ijkl,klmn->ijmn", self.same, entry) / size)

    def expectations(
        self, phi: Nonlinearity, mean: Array | None, factor: Matrix | None
    ) -> Moments[Self]:
        variances = self.variances()
        divided = self if factor is None else self / factor
        same, other = (
            expectations(phi, *variances, entry, mean) for entry in (divided.same, divided.other)
        )
        return Moments(*map(self.replaced, same, other))

    def windows(self, window: Window) -> Self:
        axes = ((-4, -2), (-3, -1)) if self.all_positions else ((-2,), (-1,))

        def average(entry: Array) -> Array:
            for shifted_together in axes:
                options = window.side, window.stride, window.padding, window.dilation
                entry = functools.reduce(jnp.add, windows(entry, shifted_together, *options))
            return entry / window.side**2

        return self.map(average)

    def over_positions(self, function: Callable[[Array], Array]) -> Self:
        assert self.all_positions
        return self.map(function)

    def blocks(self) -> Float[Array, "2 2 size size"]:
        assert self.all_positions
        size = math.prod(self.positions)
        same, other = (entry.reshape(size, size) for entry in (self.same, self.other))
        return jnp.stack([jnp.stack([same, other]), jnp.stack([other, same])])

    def from_blocks(self, blocks: Float[Array, "2 2 size size"]) -> Self:
        same, other = blocks[0, 0] + blocks[1, 1], blocks[0, 1] + blocks[1, 0]
        shape = self.positions * 2
        return self.replaced(same.reshape(shape) / 2, other.reshape(shape) / 2)

    def spread(self, positions: tuple[int, ...]) -> Self:
        size = math.prod(positions)
        # a matrix of ones at equal positions
        ones = jnp.eye(size).reshape(*positions, *positions)
        ones = (ones if self.all_positions else jnp.ones(positions)).astype(self.dtype)
        mean = self.flattened()
        return self.replaced(mean.same * ones, mean.other * ones)

    def at_equal_positions(self, value: Number) -> Self:
        number = jnp.asarray(value, self.dtype) * self.alike(over_positions=False)
        return self.map(lambda entry: jnp.broadcast_to(number, entry.shape))

    def flattened(self) -> Self:
        same, other = (self._at_equal_positions(e).mean() for e in (self.same, self.other))
        return self.replaced(same, other, all_positions=False)

    def pooled(self) -> Self:
        return self.replaced(self.same.mean(), self.other.mean(), all_positions=False)
