"""Matrices over pairs of values, in which covariances and tangents are stored.

A unit has one value for every sample and every position of a map. Layer rules act on the matrix
over all pairs of these values through the algebra below, whatever its storage: :class:`PairMatrix`
(pair_matrix.py) keeps the two different entries of a matrix over exchangeable (i.i.d.) samples,
:class:`GramMatrix` (gram_matrix.py) keeps one entry for every pair of samples of a batch.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
from jax import Array

from meanfield_jax.kernel.gaussian import Moments, Nonlinearity
from meanfield_jax.kernel.sphere import SphereAverages

Number = Array | float


class Window(NamedTuple):
    """The moving window of a convolution.

    Attributes:
        side: Side of the square window.
        stride: Step of the window.
        padding: ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, or the number of zeros on every side.
        positions: Shape of the map after the convolution.
        dilation: Step between neighbors within the window.
    """

    side: int
    stride: int
    padding: str | int
    positions: tuple[int, ...]
    dilation: int = 1


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
    def over_positions(self, function: Callable[[Array], Array]) -> Self:
        """Applies a function to the entries as an array over both members' positions.

        Args:
            function: From (height, width, height, width, ...), the first member's position before
                the second one's, to an array of the same kind.

        Returns:
            The matrix over the new map; all pairs of positions must be kept.
        """

    @abstractmethod
    def blocks(self) -> Array:
        """The entries of all samples (of two, if they are i.i.d.), if all pairs are kept.

        Returns:
            (samples, samples, positions, positions).
        """

    @abstractmethod
    def from_blocks(self, blocks: Array) -> Self:
        """The matrix of the same map with these entries, see :meth:`blocks`."""

    @abstractmethod
    def spread(self, positions: tuple[int, ...]) -> Self:
        """The average over equal positions, at all equal positions of another map; elsewhere 0."""

    @abstractmethod
    def at_equal_positions(self, value: Number) -> Self:
        """The matrix with this number for pairs of equal positions, 0 for others."""

    @abstractmethod
    def flattened(self) -> Self:
        """The average over equal positions."""

    @abstractmethod
    def pooled(self) -> Self:
        """The average over all pairs of positions."""
