"""Matrices over the samples of a batch, with one entry for every pair of samples."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float, Int

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.gaussian import (
    Moments,
    Nonlinearity,
    batch_expectations,
    variance_expectations,
)
from meanfield_jax.kernel.matrix import Matrix, Number, Window
from meanfield_jax.kernel.positions import Positions
from meanfield_jax.kernel.sphere import SphereAverages, on_sphere
from meanfield_jax.kernel.windows import pad_width, windows
from meanfield_jax.precise import einsum, matmul, tensordot
from meanfield_jax.pytree import pytree, static

Shape = tuple[int, ...]


@pytree
class GramMatrix(Matrix):
    """A matrix over the samples of one batch.

    Attributes:
        entries: (n, n) for vectors, (pairs of positions, n, n) for maps.
        pairs: The pairs of positions that are kept; None for vectors.
        images: The images before the first layer, else None. Windows are then taken from the
            images, and their own ``entries`` are never computed.
    """

    iid = False

    entries: Float[Array, "*pairs n n"]
    pairs: Positions | None = static()
    images: Float[Array, "n height width channels"] | None = None

    def map(self, function: Callable[..., Array], *others: Any) -> Self:
        arrays = (other.entries if isinstance(other, GramMatrix) else other for other in others)
        return self.replaced(function(self.entries, *arrays))

    def replaced(self, entries: Array, **changes: Any) -> Self:
        """The matrix with these entries."""
        return dataclasses.replace(self, entries=entries, images=None, **changes)

    @property
    def of_inputs(self) -> bool:
        """Whether windows are taken from images."""
        return self.images is not None

    @property
    def positions(self) -> Shape:
        return () if self.pairs is None else self.pairs.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.entries.dtype

    @property
    def T(self) -> Self:
        turned = jnp.swapaxes(self.entries, -1, -2)
        return self.replaced(turned if self.pairs is None else turned[self.pairs.swapped])

    @property
    def keeps_deviations(self) -> bool:
        return self.pairs is None  # for maps they would double the memory

    def diagonal(self) -> Float[Array, "*positions n"]:
        """The entries of a value with itself."""
        own = self.entries if self.pairs is None else self.entries[self.pairs.equal]
        return jnp.diagonal(own, axis1=-2, axis2=-1)

    def of_members(
        self, values: Float[Array, "*positions n"]
    ) -> tuple[Float[Array, "*pairs n 1"], Float[Array, "*pairs 1 n"]]:
        if self.pairs is None:
            return values[:, None], values[None, :]
        return values[self.pairs.first][:, :, None], values[self.pairs.second][:, None, :]

    def batch_mean(
        self, values: Float[Array, "*positions n"], over_positions: bool
    ) -> Float[Array, "*positions n"]:
        average = values.mean() if over_positions else values.mean(-1, keepdims=True)
        return jnp.broadcast_to(average, values.shape)

    def sample_mean(self, values: Float[Array, "*positions n"]) -> Float[Array, "*positions n"]:
        return values if self.pairs is None else jnp.broadcast_to(values.mean(0), values.shape)

    def sum(self) -> Float[Array, ""]:
        return self.entries.sum()

    def totals(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        own = self.entries if self.pairs is None else self.entries[self.pairs.equal]
        same = jnp.trace(own, axis1=-2, axis2=-1).sum()
        return same, own.sum() - same

    def averages(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        num_samples, size = self.entries.shape[-1], math.prod(self.positions)
        if self.images is None:
            same, total = self.totals()
        else:
            images = self.images / math.sqrt(self.images.shape[-1])
            same = jnp.sum(images**2)
            total = jnp.sum(images.sum(0) ** 2) - same
        two = max(num_samples * (num_samples - 1), 1)
        return same / (size * num_samples), total / (size * two)

    def centred(self, over_positions: bool) -> Self:
        """See :meth:`Matrix.centred`.

        Returns:
            The centred matrix.

        Accuracy:
            Exact if all pairs of positions are kept; otherwise the mean of a position runs over the
            positions with which it is kept.
        """
        matrix = self.entries
        if self.pairs is None or not over_positions:
            rows, columns = matrix.mean(-1, keepdims=True), matrix.mean(-2, keepdims=True)
            return self.replaced(matrix - rows - columns + rows.mean(-2, keepdims=True))
        fraction = jnp.asarray(1 / self.pairs.partners, matrix.dtype)
        rows = fraction[:, None] * matrix.mean(-1)
        rows = jax.ops.segment_sum(rows, self.pairs.first, self.pairs.size)
        a, b = self.of_members(rows)
        means = [rows[members].mean() for members in self.pairs.classes]
        total = jnp.concatenate(
            [jnp.full(at.size, mean) for at, mean in zip(self.pairs.places, means, strict=True)]
        )
        return self.replaced(matrix - a - b + total[:, None, None])

    def alike(self, over_positions: bool) -> Number:
        if over_positions or self.pairs is None:
            return 1.0
        own = self.pairs.first == self.pairs.second
        return jnp.asarray(own, self.dtype)[:, None, None]

    def on_sphere(self, over_positions: bool) -> SphereAverages[Self]:
        """See :meth:`Matrix.on_sphere`.

        Returns:
            Two matrices, and a factor that broadcasts to their entries.

        Accuracy:
            Exact where statistics are over samples; to second order in 1/participation ratio where
            they are also over positions.
        """
        fixed = lax.stop_gradient(self.entries)
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
        change = self.entries - fixed
        first, second = (self.replaced(matrix + change) for matrix in (first, second))
        return SphereAverages(first, lax.stop_gradient(factor), second)

    def has_products(self, over_positions: bool) -> bool:
        return True

    def product(self, other: Any, over_positions: bool) -> Self:
        matrix, times, pairs = self.entries, other.entries, self.pairs
        if pairs is None or not over_positions:
            own = matrix if pairs is None else matrix[pairs.equal][pairs.first]
            return self.replaced(matmul(own, times) / matrix.shape[-1])
        result = times
        for places in pairs.groups:
            a, b = _square(matrix, places), _square(times, places)
            result = result.at[places].set(_pieces(matmul(a, b) / a.shape[-1], places))
        return self.replaced(result)

    def means(self, over_positions: bool) -> tuple[Float[Array, "*pairs 1 n"], Float[Array, "..."]]:
        """See :meth:`Matrix.means`.

        Returns:
            Two arrays; where positions are averaged, the second is a single number, the mean over
            the classes of positions that are kept with each other.
        """
        matrix, pairs = self.entries, self.pairs
        if pairs is None or not over_positions:
            return matrix.mean(-2, keepdims=True), matrix.mean((-2, -1), keepdims=True)
        first, totals = matrix[:, :1], list[Array]()
        for places in pairs.groups:
            square = _square(matrix, places)
            row = jnp.broadcast_to(jnp.mean(square, -2, keepdims=True), square.shape)
            first = first.at[places].set(_pieces(row, places)[..., :1, :])
            totals.append(jnp.mean(square, (-2, -1)))
        return first, jnp.concatenate(totals).mean()

    def position_means(self) -> tuple[Self, Self, Self]:
        """See :meth:`Matrix.position_means`; the pairs kept represent those left out.

        Returns:
            The three means.
        """
        if self.pairs is None:
            return self, self, self
        pairs, size = self.pairs, self.pairs.size
        weighted = jnp.asarray(size * pairs.weights, self.dtype)[:, None, None] * self.entries
        rows, columns = (
            jax.ops.segment_sum(weighted, numbers, size)[numbers]
            for numbers in (pairs.first, pairs.second)
        )
        both = jnp.broadcast_to(weighted.sum(0) / size, self.entries.shape)
        return self.replaced(rows), self.replaced(columns), self.replaced(both)

    def own_product(self, other: Any) -> Self:
        own = jnp.diagonal(self.entries, axis1=-2, axis2=-1)
        if self.pairs is None:
            return other * own[:, None]
        result = other.entries
        for places in self.pairs.groups:
            part = einsum("cpra,crqab->cpqab", own[places], other.entries[places])
            result = result.at[places].set(part / places.shape[1])
        return self.replaced(result)

    def expectations(
        self, phi: Nonlinearity, mean: Array | None, factor: Matrix | None
    ) -> Moments[Self]:
        divided = self if factor is None else self / factor
        moments = batch_expectations(phi, self.diagonal(), divided.entries, mean, self.of_members)
        if phi.closed_form is None or mean is not None:
            own = variance_expectations(phi, self.diagonal(), mean)
            same = jnp.eye(self.entries.shape[-1])
            if self.pairs is not None:
                same = self.alike(over_positions=False) * same[None]
            moments = jax.tree.map(
                lambda entry, value: jnp.where(same > 0, self.of_members(value)[0], entry),
                moments,
                own,
            )
        return Moments(*map(self.replaced, moments))

    def windows(self, window: Window) -> Self:
        """See :meth:`Matrix.windows`.

        Returns:
            The matrix at the new positions.

        Raises:
            SpecError: if pairs of positions are needed that were left out.
        """
        assert self.pairs is not None
        side, stride, padding, positions, dilation = window
        pairs = self.pairs.after(positions, stride)
        if self.images is not None:
            options = side, stride, padding, dilation
            rows = windows(self.images, (1,), *options)
            patches = [part for row in rows for part in windows(row, (2,), *options)]
            entries = _products(jnp.concatenate(patches, -1), pairs)
            return self.replaced(entries, pairs=pairs)
        places = [
            self.pairs.find(first, second)
            for first, second in zip(
                *(
                    _under_window(numbers, self.pairs.shape, window)
                    for numbers in (pairs.first, pairs.second)
                ),
                strict=True,
            )
        ]
        left_out = len(self.pairs.first)
        if padding == "CIRCULAR" and any((at == left_out).any() for at in places):
            cause = "windows that wrap around need pairs of positions that are not kept"
            remedy = "use 'SAME', or maps with sides that are multiples of the strides"
            raise problem(SpecError, "Conv.padding", padding, cause, remedy)
        parts = [jnp.take(self.entries, at, 0, mode="fill", fill_value=0) for at in places]
        return self.replaced(functools.reduce(jnp.add, parts) / side**2, pairs=pairs)

    def over_positions(self, function: Callable[[Array], Array]) -> Self:
        assert self.pairs is not None
        assert self.pairs.modulus == 1
        num_samples = self.entries.shape[-1]
        found = function(self.entries.reshape(*self.positions * 2, num_samples, num_samples))
        pairs = Positions(found.shape[:2], 1)
        return self.replaced(found.reshape(-1, num_samples, num_samples), pairs=pairs)

    def blocks(self) -> Float[Array, "n n size size"]:
        assert self.pairs is not None
        assert self.pairs.modulus == 1
        size, num_samples = self.pairs.size, self.entries.shape[-1]
        square = self.entries.reshape(size, size, num_samples, num_samples)
        return square.transpose(2, 3, 0, 1)

    def from_blocks(self, blocks: Float[Array, "n n size size"]) -> Self:
        return self.replaced(blocks.transpose(2, 3, 0, 1).reshape(self.entries.shape))

    def spread(self, positions: tuple[int, ...]) -> Self:
        assert self.pairs is not None
        pairs = Positions(positions, self.pairs.modulus)
        equal = jnp.asarray(pairs.first == pairs.second, self.dtype)[:, None, None]
        return self.replaced(self.flattened().entries[None] * equal, pairs=pairs)

    def at_equal_positions(self, value: Number) -> Self:
        number = jnp.asarray(value, self.dtype) * self.alike(over_positions=False)
        return self.map(lambda entry: jnp.broadcast_to(number, entry.shape))

    def flattened(self) -> Self:
        assert self.pairs is not None
        return self.replaced(self.entries[self.pairs.equal].mean(0), pairs=None)

    def pooled(self) -> Self:
        assert self.pairs is not None
        weights = jnp.asarray(self.pairs.weights, self.dtype)
        return self.replaced(tensordot(weights, self.entries, 1), pairs=None)


def gram(x: Float[Array, "n ..."], pairs: Positions | None) -> GramMatrix:
    """Mean products x_a x_b over features, for all pairs of samples (and of positions)."""
    return GramMatrix(_products(x, pairs), pairs)


def _products(x: Float[Array, "n ..."], pairs: Positions | None) -> Float[Array, "*pairs n n"]:
    if pairs is None:
        return matmul(x, x.T) / x.shape[-1]
    by_position = x.reshape(x.shape[0], pairs.size, x.shape[-1]).transpose(1, 0, 2)
    turned = jnp.swapaxes(by_position, -1, -2)
    return matmul(by_position[pairs.first], turned[pairs.second]) / x.shape[-1]


def _under_window(
    numbers: Int[np.ndarray, " pairs"], shape: Shape, window: Window
) -> list[Int[np.ndarray, "2 pairs"]]:
    """For each place in the window at these positions, the position (y, x) under it."""
    side, stride, padding, positions, dilation = window
    length = (side - 1) * dilation + 1
    corners = [
        stride * index - pad_width(size, length, stride, padding)[0]
        for index, size in zip(np.unravel_index(numbers, positions), shape, strict=True)
    ]
    offsets = np.ndindex(side, side)
    places = (
        np.stack([corners[0] + dilation * row, corners[1] + dilation * column])
        for row, column in offsets
    )
    if padding == "CIRCULAR":
        return [place % np.array(shape)[:, None] for place in places]
    return list(places)


def _square(
    matrix: Float[Array, "pairs n n"], places: Int[np.ndarray, "classes members members"]
) -> Float[Array, "classes members*n members*n"]:
    """The matrices over all samples and positions of each class."""
    classes, members, _ = places.shape
    size = members * matrix.shape[-1]
    return matrix[places].transpose(0, 1, 3, 2, 4).reshape(classes, size, size)


def _pieces(
    squares: Float[Array, "classes size size"], places: Int[np.ndarray, "classes members members"]
) -> Float[Array, "classes members members n n"]:
    """The inverse of ``_square``: the pairs of positions of each class."""
    classes, members, _ = places.shape
    blocks = squares.reshape(classes, members, -1, members, squares.shape[-1] // members)
    return blocks.transpose(0, 1, 3, 2, 4)
