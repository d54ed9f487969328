"""AvgPool and MaxPool: the mean or the largest value under a moving window."""

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import Nonlinearity
from meanfield_jax.kernel.nonlinearities import rectifier
from meanfield_jax.kernel.windows import pad_width, windows
from meanfield_jax.layers.base import Kernel, Layer, Matrix, Shape, Signal, layer
from meanfield_jax.layers.conv import check_window, checked_padding, map_after
from meanfield_jax.pytree import static

MAGNITUDE: Nonlinearity = rectifier(-1.0)
"""|x|"""


class Pool(Layer):
    """What the two have in common: a square window without weights."""

    pools: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "each"

    kernel_size: int
    stride: int
    padding: str | int

    def __post_init__(self):
        super().__post_init__()
        padding = checked_padding(type(self).__name__, self.padding)
        if padding == "CIRCULAR":
            cause, remedy = "a pooling layer has none", "use 'VALID', 'SAME' or a number"
            raise problem(SpecError, f"{type(self).__name__}.padding", padding, cause, remedy)
        object.__setattr__(self, "padding", padding)

    def couples_positions(self, vary: bool) -> bool:
        return True

    def output(self, signal: Signal) -> Signal:
        name = type(self).__name__
        if len(signal.shape) != 3:
            cause = f"{name} needs inputs of shape (height, width, channels)"
            raise problem(SpecError, "input shape", signal.shape, cause, "leave it out for vectors")
        check_window(name, self.kernel_size, self.kernel_size, self.padding, signal.shape)
        height, width, channels = signal.shape
        after = map_after((height, width), self.kernel_size, self.stride, self.padding)
        return signal._replace(shape=(*after, channels))

    def pooling(self, function: Callable[..., Array], shape: Shape) -> "Pooling":
        """Flax's function with this layer's window."""
        pads = [pad_width(size, self.kernel_size, self.stride, self.padding) for size in shape[:2]]
        side, stride = self.kernel_size, self.stride
        return Pooling(function, (side, side), (stride, stride), tuple(pads))


@dataclasses.dataclass(frozen=True)
class Pooling:
    """One of Flax's pooling functions and its window; two of the same are equal."""

    function: Callable[..., Array]
    window: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], ...]

    def __call__(self, x: Array) -> Array:
        """Pools x of shape (samples, height, width, channels)."""
        return self.function(x, self.window, self.strides, self.padding)


@layer
class AvgPool(Pool):
    """The mean over a moving window; zeros around the map are counted, as in Flax.

    Rule: covariance and tangent are averaged over the positions of both members of a pair, for
    which all pairs of the map's positions are needed.

    Attributes:
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: ``"VALID"`` (none), ``"SAME"``, or the number of zeros on every side.
    """

    linear: ClassVar[bool] = True

    kernel_size: int = static(default=2, least=1)
    stride: int = static(default=2, least=1)
    padding: str | int = static(default="VALID")

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        def averaged(matrix: Matrix) -> Matrix:
            return matrix.over_positions(self._over_both)

        def kept(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else averaged(matrix)

        kernel = kernel.with_one_mean()
        tangent = averaged(kernel.effective_tangent)
        if self.padding not in ("VALID", 0):  # the mean then varies over positions
            return kernel.after(covariance=averaged(kernel.moment), tangent=tangent), None
        return kernel.after(
            covariance=averaged(kernel.covariance),
            tangent=tangent,
            mean=kernel.mean,
            unit_mean=kernel.unit_mean,
            deviation=kept(kernel.deviation),
            tangent_deviation=kept(kernel.tangent_deviation),
        ), None

    def _over_both(self, entries: Array) -> Array:
        for axis in range(4):
            parts = windows(entries, (axis,), self.kernel_size, self.stride, self.padding)
            entries = sum(parts[1:], parts[0]) / self.kernel_size
        return entries

    def build(self, shape: Shape, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        return self.pooling(nnx.avg_pool, shape)


@layer
class MaxPool(Pool):
    """The largest value under a moving window; put it before an increasing activation.

    There it gives the same network as after the activation, and the values are Gaussian. Rule: the
    largest of several values is taken two at a time, max(u, v) = (u + v) / 2 + |u - v| / 2, and
    the larger of two is treated as Gaussian with its own mean and covariance; see ``largest``.

    Attributes:
        kernel_size: Side of the window.
        stride: Step of the window.
        padding: ``"VALID"`` (none), ``"SAME"``, or the number of positions on every side, which
            are never the largest.

    Source:
        Clark 1961 (Operations Research 9, 145), for the largest of several values two at a time.

    Accuracy:
        Exact for two values of equal mean. On noise (4x4 maps, the least favorable case) the
        tangent kernel of a network is off by 4 % with a 2x2 window and by 9 % with a 3x3 window of
        stride 2 (tests/test_contract.py, tests/test_layer_options.py). A VGG with two such layers
        on images: lambda_max predicted / measured 1.01 +- 0.08 (benchmarks/your_model.py).
    """

    kernel_size: int = static(default=2, least=1)
    stride: int = static(default=2, least=1)
    padding: str | int = static(default="VALID")

    def output(self, signal: Signal) -> Signal:
        if not signal.gaussian:
            cause = "it needs Gaussian inputs"
            remedy = "put it before the activation, which is the same if that is increasing"
            raise problem(SpecError, "MaxPool", signal.shape, cause, remedy)
        return super().output(signal)

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        kernel = kernel.around_means().with_one_mean()
        means = jnp.zeros_like(kernel.covariance.diagonal())
        values = Values(kernel.covariance, kernel.effective_tangent, means)
        for axis, size in enumerate(kernel.positions):
            before, after = pad_width(size, self.kernel_size, self.stride, self.padding)
            # repeated, the values at the border change no maximum
            values = values.taken(axis, np.clip(np.arange(-before, size + after), 0, size - 1))
            values = largest(values, axis, self.kernel_size, self.stride)
        mean = values.means if kernel.mean is None else values.means + kernel.mean
        after = kernel.after(covariance=values.covariance, tangent=values.tangent, mean=mean)
        # i.i.d. inputs differ only at the borders of the map
        return after.with_one_mean() if values.covariance.iid else after, None

    def build(self, shape: Shape, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        return self.pooling(nnx.max_pool, shape)


class Values(NamedTuple):
    """Gaussian values: their covariance and tangent, and the mean of each."""

    covariance: Matrix
    tangent: Matrix
    means: Array

    def taken(self, axis: int, places: np.ndarray) -> "Values":
        """The values at these positions along one axis of the map."""
        size = self.covariance.positions[axis]
        if np.array_equal(places, np.arange(size)):
            return self
        covariance, tangent = (
            part.over_positions(lambda e: e.take(places, axis).take(places, axis + 2))
            for part in self[:2]
        )
        means = self.as_map().take(places, axis)
        return Values(covariance, tangent, means.reshape(covariance.diagonal().shape))

    def as_map(self) -> Array:
        """The means, (height, width, samples)."""
        return self.means.reshape(*self.covariance.positions, -1)


def largest(values: Values, axis: int, size: int, step: int) -> Values:
    """The largest of neighboring values along an axis, taken one after the other.

    Args:
        values: The values.
        axis: 0 or 1, the axis along which the window moves.
        size: Length of the window.
        step: Step of the window.

    Returns:
        The largest values, in order.
    """
    last = values.covariance.positions[axis] - size
    places = [np.arange(first, first + last + 1, step) for first in range(size)]

    def between(matrix: Matrix, i: int, j: int) -> Matrix:
        """The matrix of the window's i-th values with its j-th ones."""
        return matrix.over_positions(
            lambda entries: entries.take(places[i], axis).take(places[j], axis + 2)
        )

    both = values.covariance, values.tangent
    means = [values.as_map().take(at, axis) for at in places]
    top, mean = [between(matrix, 0, 0) for matrix in both], means[0]
    rows = {j: [between(matrix, 0, j) for matrix in both] for j in range(1, size)}
    columns = {j: [between(matrix, j, 0) for matrix in both] for j in range(1, size)}
    for j in range(1, size):
        others = [between(matrix, j, j) for matrix in both]
        pairs = list(zip(top, rows.pop(j), columns.pop(j), others, strict=True))
        top, mean, sign = larger_of_two(pairs[0], pairs[1], mean, means[j])
        a, b = top[0].of_members(sign)
        for i in rows:
            for kind, matrix in enumerate(both):
                row, column = between(matrix, j, i), between(matrix, i, j)
                rows[i][kind] = _mixed(rows[i][kind], row, a)
                columns[i][kind] = _mixed(columns[i][kind], column, b)
    return Values(top[0], top[1], mean.reshape(top[0].diagonal().shape))


def _mixed(first: Matrix, second: Matrix, sign: Array) -> Matrix:
    """The first matrix with weight (1 + sign) / 2, and the second with the rest."""
    return (first + second + (first - second) * sign) / 2


Pairs = tuple[Matrix, Matrix, Matrix, Matrix]
"""Matrices of u with u', u with v', v with u' and v with v'."""


def larger_of_two(
    covariance: Pairs, tangent: Pairs, mean_u: Array, mean_v: Array
) -> tuple[list[Matrix], Array, Array]:
    """The larger of two Gaussian values u and v.

    With S = u + v, D = u - v, s = sign D and e = E[s]: Cov(S, |D'|) = Cov(S, D') e' is exact.
    Cov(|D|, |D'|) and Cov(s, s') are exact where E[D] = 0; else they are interpolated,
    Cov(|D|, |D'|) = e e' Cov(D, D') + r r' (its value for E[D] = 0), r = sqrt(1 - e^2), and
    likewise for s, which is exact for the tangent of a value with itself.

    Args:
        covariance: Covariances of the two values, for all pairs of windows.
        tangent: Their tangents.
        mean_u: Means of u, (height, width, samples).
        mean_v: Means of v.

    Returns:
        Covariance Cov(S + |D|, S' + |D'|) / 4 and tangent E[(1 +- s)(1 +- s') T] / 4 of the larger
        value, its means, and e, by the diagonal's shape.

    Source:
        Clark 1961 (Operations Research 9, 145) for the mean and Cov(max, another Gaussian).
    """
    sums, rows, columns, differences = _combinations(*covariance)
    own = differences.diagonal()
    delta = (mean_u - mean_v).reshape(own.shape)
    std = safe.sqrt(own)
    size = safe.divide(delta, std)
    sign = jax.scipy.special.erf(size / math.sqrt(2))
    magnitude = math.sqrt(2 / math.pi) * std * jnp.exp(-(size**2) / 2) + delta * sign
    sign_a, sign_b = differences.of_members(sign)
    rest_a, rest_b = differences.of_members(safe.sqrt(1 - sign**2))
    std_a, std_b = differences.of_members(std)
    around = differences.expectations(MAGNITUDE, None, None)
    signs = around.derivative * (rest_a * rest_b) + sign_a * sign_b
    magnitudes = (around.product - 2 / math.pi * std_a * std_b) * (rest_a * rest_b)
    larger = sums + rows * sign_a + columns * sign_b + magnitudes + differences * (sign_a * sign_b)
    plain, by_row, by_column, by_both = _combinations(*tangent)
    after = plain + by_row * sign_a + by_column * sign_b + by_both * signs
    mean = (mean_u + mean_v + magnitude.reshape(mean_u.shape)) / 2
    return [larger / 4, after / 4], mean, sign


def _combinations(uu: Matrix, uv: Matrix, vu: Matrix, vv: Matrix) -> Pairs:
    """The matrices of S with S', D with S', S with D' and D with D'."""
    return uu + uv + vu + vv, uu + uv - vu - vv, uu - uv + vu - vv, uu - uv - vu + vv
