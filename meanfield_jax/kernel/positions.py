"""The pairs of positions of a map that are kept, and where each of them is stored."""

import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int


@dataclasses.dataclass(frozen=True)
class Positions:
    """The pairs (p, q) of positions of a map that are kept: those equal modulo ``modulus``.

    A modulus of 1 keeps all pairs, a modulus of at least the map's size only the equal ones. A
    convolution of stride s maps pairs equal modulo s M to pairs equal modulo M, so that the pairs
    that a network's output needs are closed under its layers. Positions are numbered row by row.

    Attributes:
        shape: (height, width).
        modulus: The two positions of a pair differ by multiples of it in both directions.
    """

    shape: tuple[int, ...]
    modulus: int

    @property
    def size(self) -> int:
        """Number of positions."""
        return math.prod(self.shape)

    @functools.cached_property
    def classes(self) -> list[Int[np.ndarray, " members"]]:
        """The positions of each class; both positions of a pair are in the same class."""
        height, width = self.shape
        numbers = np.arange(self.size).reshape(self.shape)
        step = self.modulus
        corners = np.ndindex(min(step, height), min(step, width))
        return [numbers[row::step, column::step].ravel() for row, column in corners]

    @functools.cached_property
    def first(self) -> Int[np.ndarray, " pairs"]:
        """The first position of each pair."""
        return np.concatenate([np.repeat(members, len(members)) for members in self.classes])

    @functools.cached_property
    def second(self) -> Int[np.ndarray, " pairs"]:
        """The second position of each pair."""
        return np.concatenate([np.tile(members, len(members)) for members in self.classes])

    @functools.cached_property
    def places(self) -> list[Int[np.ndarray, "members members"]]:
        """For each class, the places of its pairs in the list of pairs."""
        ends = np.cumsum([len(members) ** 2 for members in self.classes])
        return [
            np.arange(end - len(members) ** 2, end).reshape(len(members), len(members))
            for members, end in zip(self.classes, ends, strict=True)
        ]

    @functools.cached_property
    def groups(self) -> list[Int[np.ndarray, "classes members members"]]:
        """``places`` grouped by size of the class."""
        sizes = sorted({len(square) for square in self.places})
        return [np.stack([sq for sq in self.places if len(sq) == size]) for size in sizes]

    @functools.cached_property
    def equal(self) -> Int[np.ndarray, " positions"]:
        """The place of each pair (p, p)."""
        places = np.flatnonzero(self.first == self.second)
        return places[np.argsort(self.first[places])]

    @functools.cached_property
    def swapped(self) -> Int[np.ndarray, " pairs"]:
        """The place of (q, p) for each pair (p, q)."""
        return np.concatenate([square.T.ravel() for square in self.places])

    @functools.cached_property
    def partners(self) -> Int[np.ndarray, " pairs"]:
        """The number of positions with which the first one of each pair is kept."""
        return np.concatenate([np.full(at.size, len(at)) for at in self.places])

    @functools.cached_property
    def weights(self) -> Float[np.ndarray, " pairs"]:
        """The weight of each pair in the mean over all pairs; they sum to 1.

        The pairs (p, p) represent only themselves; the remaining weight is divided equally among
        the others.
        """
        own = np.where(self.partners > 1, 1 / self.size, 1.0)
        others = (1 - own) / np.maximum(self.partners - 1, 1)
        return np.where(self.first == self.second, own, others) / self.size

    def find(
        self, rows: Int[np.ndarray, "2 pairs"], columns: Int[np.ndarray, "2 pairs"]
    ) -> Int[np.ndarray, " pairs"]:
        """Places of pairs of positions (y, x); len(first) if not kept."""
        table = self._table
        return table[_number(rows, self.shape), _number(columns, self.shape)]

    @functools.cached_property
    def _table(self) -> Int[np.ndarray, "size_and_1 size_and_1"]:
        # one extra row and column for positions outside the map
        table = np.full((self.size + 1,) * 2, len(self.first), np.int32)
        table[self.first, self.second] = np.arange(len(self.first), dtype=np.int32)
        return table

    def after(self, shape: tuple[int, ...], stride: int) -> "Positions":
        """The pairs after a convolution."""
        return Positions(shape, max(1, self.modulus // stride))


def _number(
    position: Int[np.ndarray, "2 pairs"], shape: tuple[int, ...]
) -> Int[np.ndarray, " pairs"]:
    y, x = position
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    return np.where(inside, y * shape[1] + x, math.prod(shape))
