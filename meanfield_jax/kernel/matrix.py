"""Matrices over pairs of values, in which covariances and tangents are stored.

A unit has one value for every sample and every position of a map. Layer rules act on the matrix
over all pairs of these values through the algebra below, whatever its storage: :class:`PairMatrix`
keeps the two different entries of a matrix over exchangeable (i.i.d.) samples, :class:`GramMatrix`
(gram_matrix.py) keeps one entry for every pair of samples of a batch.
"""

import dataclasses
import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from meanfield_jax.kernel.gaussian import Moments, Nonlinearity, expectations
from meanfield_jax.kernel.sphere import SphereAverages
from meanfield_jax.kernel.windows import windows
from meanfield_jax.precise import einsum
from meanfield_jax.pytree import pytree, static

Number = Array | float


class Window(NamedTuple):
    """The moving window of a convolution.

    Attributes:
        side: Side of the square window.
        stride: Step of the window.
        padding: ``"SAME"``, ``"VALID"`` or ``"CIRCULAR"``.
        positions: Shape of the map after the convolution.
    """

    side: int
    stride: int
    padding: str
    positions: tuple[int, ...]


class Matrix(ABC):
    """A matrix over all pairs (a, b) of values; operators act entry by entry.

    "One number per value" means an array of the shape of :meth:`diagonal`.
    """

    iid: ClassVar[bool]
    """Whether samples are exchangeable, with all positions equivalent except at borders."""

    # NumPy scalars then leave products with a matrix to the matrix
    __array_ufunc__ = None

    @abstractmethod
    def map(self, function: Callable[..., Array], *others: Any) -> Self:
        """Applies a function to the entries and to others: matrices, or arrays that broadcast."""

    def __add__(self, other: "Matrix | Number") -> Self:
        return self.map(operator.add, other)

    def __sub__(self, other: "Matrix | Number") -> Self:
        return self.map(operator.sub, other)

    def __mul__(self, other: "Matrix | Number") -> Self:
        return self.map(operator.mul, other)

    def __truediv__(self, other: "Matrix | Number") -> Self:
        return self.map(operator.truediv, other)

    __radd__, __rmul__ = __add__, __mul__

    @property
    def of_inputs(self) -> bool:
        """Whether windows are taken from the inputs themselves."""
        return False

    def full(self, value: float) -> Self:
        """The matrix in which all entries are this number."""
        return self.map(lambda entry: jnp.full_like(entry, value))

    def variances(self) -> tuple[Array, Array]:
        """The entries (a, a) and (b, b) that belong to every entry (a, b)."""
        return self.of_members(self.diagonal())

    @property
    @abstractmethod
    def positions(self) -> tuple[int, ...]:
        """The map's shape, () for a vector."""

    @property
    @abstractmethod
    def dtype(self) -> jnp.dtype:
        """Dtype of the entries."""

    @property
    @abstractmethod
    def T(self) -> Self:
        """The matrix with the two members of every pair exchanged."""

    @property
    @abstractmethod
    def keeps_deviations(self) -> bool:
        """Whether to spend memory on the matrices that make subtracting a mean exact."""

    @abstractmethod
    def diagonal(self) -> Array:
        """The entries of a value with itself."""

    @abstractmethod
    def of_members(self, values: Array) -> tuple[Array, Array]:
        """One number per value, arranged by the first and by the second member of every pair.

        Returns:
            Two arrays that broadcast to the entries.
        """

    @abstractmethod
    def batch_mean(self, values: Array, over_positions: bool) -> Array:
        """One number per value, averaged over samples (and positions); the same shape."""

    @abstractmethod
    def sample_mean(self, values: Array) -> Array:
        """One number per value, averaged over the positions of a sample; the same shape."""

    @abstractmethod
    def sum(self) -> Array:
        """The sum of all entries."""

    @abstractmethod
    def totals(self) -> tuple[Array, Array]:
        """Sums over entries at equal positions: of one sample with itself, and of two samples."""

    @abstractmethod
    def averages(self) -> tuple[Array, Array]:
        """Averages of entries at equal positions: of one sample with itself, and of two samples."""

    @abstractmethod
    def centred(self, over_positions: bool) -> Self:
        """H M H, H = 1 - 11^T/n: the matrix of the values after their batch mean is subtracted.

        Args:
            over_positions: Whether the mean runs over samples and positions, or over samples only.

        Returns:
            The centred matrix.
        """

    @abstractmethod
    def alike(self, over_positions: bool) -> Number:
        """1 for pairs of values that BatchNorm normalizes by the same statistics, else 0."""

    @abstractmethod
    def on_sphere(self, over_positions: bool) -> SphereAverages[Self]:
        """Averages over Gaussian values with this covariance, divided by their sample deviation.

        Args:
            over_positions: Whether the deviation is over samples and positions, or samples only.

        Returns:
            Two matrices and the factor between them, with the derivatives of this matrix itself.
        """

    @abstractmethod
    def has_products(self, over_positions: bool) -> bool:
        """Whether :meth:`product` and :meth:`means` are available."""

    @abstractmethod
    def product(self, other: Any, over_positions: bool) -> Self:
        """The product with another matrix over the m values with the same statistics, over m."""

    @abstractmethod
    def means(self, over_positions: bool) -> tuple[Array, Array]:
        """Means over a pair's first member, and over both, among values with the same statistics.

        Returns:
            Two arrays that broadcast to the entries.
        """

    @abstractmethod
    def position_means(self) -> tuple[Self, Self, Self]:
        """Means of every entry over the positions of its second member, of its first, of both."""

    @abstractmethod
    def own_product(self, other: Any) -> Self:
        """The mean over positions r of self[(a, p), (a, r)] other[(a, r), (b, q)]."""

    @abstractmethod
    def expectations(
        self, phi: Nonlinearity, mean: Array | None, factor: "Matrix | None"
    ) -> Moments[Self]:
        """Gaussian expectations with this covariance; see gaussian.py.

        Args:
            phi: The function.
            mean: Mean of all values, (); None where it is 0.
            factor: A matrix by which covariances of different values are divided; None for 1.

        Returns:
            Four matrices.
        """

    @abstractmethod
    def windows(self, window: Window) -> Self:
        """The matrix of the vectors under a moving window, averaged over their components."""

    @abstractmethod
    def flattened(self) -> Self:
        """The average over equal positions."""

    @abstractmethod
    def pooled(self) -> Self:
        """The average over all pairs of positions."""


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
        self, phi: Nonlinearity, mean: Array | None, factor: "Matrix | None"
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
                options = window.side, window.stride, window.padding
                entry = functools.reduce(jnp.add, windows(entry, shifted_together, *options))
            return entry / window.side**2

        return self.map(average)

    def flattened(self) -> Self:
        same, other = (self._at_equal_positions(e).mean() for e in (self.same, self.other))
        return self.replaced(same, other, all_positions=False)

    def pooled(self) -> Self:
        return self.replaced(self.same.mean(), self.other.mean(), all_positions=False)
