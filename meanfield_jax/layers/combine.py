"""Sequential, Residual and Repeat: layers made of layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import first_failure_of
from meanfield_jax.kernel.mixture import by_part
from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import (
    Kernel,
    Layer,
    M,
    Record,
    Rows,
    Shape,
    Signal,
    joined,
    layer,
    total,
)
from meanfield_jax.pytree import static


@layer
class Sequential(Layer):
    """Layers applied one after the other.

    Attributes:
        layers: The layers, first to last.
    """

    on_parts: ClassVar[str | None] = "inside"

    layers: tuple[Layer, ...] = ()

    @property
    def total_stride(self) -> int:
        return math.prod(inner.total_stride for inner in self.layers)

    @property
    def ends_in_weights(self) -> bool:
        others = (la for la in reversed(self.layers) if not (la.is_norm or la.linear))
        last = next(others, self)
        return last is not self and last.ends_in_weights

    def output(self, signal: Signal) -> Signal:
        return self.signals(signal)[-1]

    def signals(self, signal: Signal) -> list[Signal]:
        """The signal before each layer and after the last one; errors name the layer."""
        signals = [signal]
        for index, inner in enumerate(self.layers):
            signals.append(located(f"layers/{index}", inner, signals[-1]))
        return signals

    def num_parameters(self, shape: Shape) -> int:
        shapes = self._shapes(shape)
        return sum(la.num_parameters(s) for la, s in zip(self.layers, shapes, strict=True))

    def check_theory(self, shape: Shape) -> None:
        for inner, before in zip(self.layers, self._shapes(shape), strict=True):
            inner.check_theory(before)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        records = []
        for inner, added in zip(
            self.layers, perturbations or (None,) * len(self.layers), strict=True
        ):
            kernel, record = inner.propagate(kernel, added)
            records.append(record)
        return kernel, tuple(records)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        found = []
        for inner, record in zip(reversed(self.layers), reversed(records), strict=True):
            own, after = inner.normalized(record, after, statistics)
            found.append(own)
        return tuple(reversed(found)), after

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        found = []
        for inner, record in zip(reversed(self.layers), reversed(records), strict=True):
            own, after = inner.widths_after(record, after)
            found.append(own)
        return tuple(reversed(found)), after

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Sequential(*self.modules(shape, rngs))

    def modules(self, shape: Shape, rngs: nnx.Rngs) -> list[Callable[[Array], Array]]:
        """The module (or function) of each layer."""
        return [la.build(s, rngs) for la, s in zip(self.layers, self._shapes(shape), strict=True)]

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        return joined([la.rows(r, read) for la, r in zip(self.layers, records, strict=True)])

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        names = [f"{path}/layers/{index}".lstrip("/") for index in range(len(self.layers))]
        parts = zip(self.layers, records, names, strict=True)
        return [label for la, record, name in parts for label in la.labels(record, name)]

    def children(self) -> Mapping[str, Layer]:
        return {f"layers/{index}": inner for index, inner in enumerate(self.layers)}

    def changed(self, change: Callable[[Layer], Layer]) -> "Sequential":
        return Sequential(tuple(inner.changed(change) for inner in self.layers))

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (exchanged(self, norm),)

    def _shapes(self, shape: Shape) -> list[Shape]:
        # whether units are Gaussian was checked before; shapes do not depend on it
        return [signal.shape for signal in self.signals(Signal(shape, gaussian=True))[:-1]]


@layer
class Residual(Layer):
    """shortcut(x) + branch(x), whose branch ends in random weights (Dense or Conv, maybe a norm).

    Rule: the covariances and tangents of the two add up, because the last weights of the branch are
    independent of everything else and have mean zero.

    Attributes:
        branch: A layer; a :class:`Sequential` for several layers.
        shortcut: What x passes on its way around the branch, such as a convolution of side 1 where
            the shape changes; nothing as a default.
    """

    on_parts: ClassVar[str | None] = "inside"

    branch: Layer = Sequential()
    shortcut: Layer = Sequential()

    @property
    def total_stride(self) -> int:
        return self.branch.total_stride

    def output(self, signal: Signal) -> Signal:
        after, beside = (located(name, la, signal) for name, la in self._both)
        if after.shape != beside.shape:
            remedy = f"make the branch return shape {beside.shape}"
            cause = f"its branch returns shape {after.shape}"
            raise problem(SpecError, "Residual input shape", signal.shape, cause, remedy)
        if not self.branch.ends_in_weights:
            cause, remedy = "it does not end in random weights", "end it with Dense or Conv"
            raise problem(SpecError, "Residual.branch", type(self.branch).__name__, cause, remedy)
        if after.parts and beside.parts and after.parts != beside.parts:
            cause = f"its branch has parts {after.parts}, which are not those of the shortcut"
            remedy = "end the branch with Dense or Conv"
            raise problem(SpecError, "Residual input parts", beside.parts, cause, remedy)
        gaussian = after.gaussian and beside.random
        parts = after.parts or beside.parts
        return after._replace(gaussian=gaussian, random=beside.random, parts=parts)

    def num_parameters(self, shape: Shape) -> int:
        return self.branch.num_parameters(shape) + self.shortcut.num_parameters(shape)

    def check_theory(self, shape: Shape) -> None:
        self.branch.check_theory(shape)
        self.shortcut.check_theory(shape)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        added = perturbations or (None, None)
        branch, records = self.branch.propagate(kernel, added[0])
        beside, others = self.shortcut.propagate(kernel, added[1])
        return by_part(_sum, branch, beside), (records, others)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        # the norms of the one are not passed by the other
        branch, before_branch = self.branch.normalized(records[0], after, statistics)
        beside, before_shortcut = self.shortcut.normalized(records[1], after, statistics)
        return (branch, beside), before_branch and before_shortcut

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        # each of the two scatters by itself, and only its share of the sum
        share = self._share(records)
        branch, before_branch = self.branch.widths_after(records[0], after)
        beside, before_shortcut = self.shortcut.widths_after(records[1], after)
        own = share**2 * (before_branch - after) + (1 - share) ** 2 * (before_shortcut - after)
        return (branch, beside), after + own

    def _share(self, records: Any) -> Array:
        """The branch's fraction of the power of the sum, by its last and first layers' records."""
        inside, around = (_flat(part) for part in records)
        power = inside[-1].after.moment.averages()[0]
        other = (around[-1].after if around else inside[0].before).moment.averages()[0]
        return power / (power + other)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        branch = self.branch.build(shape, rngs)
        plain = self.shortcut == Sequential()
        return ResidualModule(branch, None if plain else self.shortcut.build(shape, rngs))

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        both = zip(self._both, records, strict=True)
        return joined([inner.rows(record, read) for (_, inner), record in both])

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        both = zip(self._both, records, strict=True)
        return [label for (name, la), own in both for label in la.labels(own, f"{path}/{name}")]

    def children(self) -> Mapping[str, Layer]:
        plain = self.shortcut == Sequential()
        return dict(self._both[:1] if plain else self._both)

    @property
    def _both(self) -> tuple[tuple[str, Layer], ...]:
        return ("branch", self.branch), ("shortcut", self.shortcut)

    def changed(self, change: Callable[[Layer], Layer]) -> Layer:
        return Residual(self.branch.changed(change), self.shortcut.changed(change))

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (Residual(exchanged(self.branch, norm), exchanged(self.shortcut, norm)),)


@layer
class Repeat(Layer):
    """The same block several times in a row, each time with its own random parameters.

    Theory and network run it as a scan, so that a thousand layers compile as fast as one.

    Attributes:
        block: A layer that keeps the shape; a :class:`Sequential` for several layers.
        times: Number of repetitions.
    """

    on_parts: ClassVar[str | None] = "inside"

    block: Layer = Sequential()
    times: int = static(default=1, least=1)

    @property
    def ends_in_weights(self) -> bool:
        return self.block.ends_in_weights

    def output(self, signal: Signal) -> Signal:
        after = located("block", self.block, signal)
        if after.shape != signal.shape:
            remedy = f"make the block return shape {signal.shape}"
            cause = f"its block returns shape {after.shape}"
            raise problem(SpecError, "Repeat input shape", signal.shape, cause, remedy)
        if after.parts != signal.parts:
            cause = f"its block returns channels of several variances, in parts {after.parts}"
            remedy = "end the block with Dense or Conv"
            raise problem(SpecError, "Repeat input parts", signal.parts, cause, remedy)
        return located("block", self.block, after) if self.times > 1 else after

    def num_parameters(self, shape: Shape) -> int:
        return self.times * self.block.num_parameters(shape)

    def check_theory(self, shape: Shape) -> None:
        self.block.check_theory(shape)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        after, _ = jax.eval_shape(self.block.propagate, kernel)
        if jax.tree.structure(kernel) == jax.tree.structure(after):
            return jax.lax.scan(self.block.propagate, kernel, perturbations, length=self.times)

        def step(carry, added):
            # the carry of a scan keeps its structure: known zeros (None) become numbers
            after, record = self.block.propagate(carry, added)
            return after.with_numbers(), record

        return jax.lax.scan(step, kernel.with_numbers(), perturbations, length=self.times)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        last, before = self.block.normalized(records, after, statistics)
        others, _ = self.block.normalized(records, before, statistics)

        def stacked(last: Any, other: Any) -> np.ndarray:
            return np.stack([other] * (self.times - 1) + [last])

        return jax.tree.map(stacked, last, others), before

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        def block(record: Any) -> tuple[Any, Array]:
            return self.block.widths_after(record, jnp.zeros_like(after))

        inside, own = jax.vmap(block, axis_size=self.times)(records)
        later = after + jnp.cumsum(own[::-1])[::-1] - own

        def total(sums: Array) -> Array:
            return sums + later.reshape(-1, *(1,) * (sums.ndim - 1))

        return jax.tree.map(total, inside), after + own.sum()

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return RepeatModule(self.block, self.times, shape, rngs)

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        # the size of the axis, because a block without parameters has no records
        each = jax.vmap(lambda record: self.block.rows(record, read), axis_size=self.times)
        stacked = each(records)
        return jax.tree.map(jnp.ravel, stacked)

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        names = [f"{path}/block[{index}]" for index in range(self.times)]
        return [label for name in names for label in self.block.labels(records, name)]

    def children(self) -> Mapping[str, Layer]:
        return {"block": self.block}

    def changed(self, change: Callable[[Layer], Layer]) -> Layer:
        return Repeat(self.block.changed(change), self.times)

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (Repeat(exchanged(self.block, norm), self.times),)


def exchanged(layer: Layer, norm: Layer | None) -> Layer:
    """The layer with every norm inside it replaced by this one; None removes them."""
    if type(layer) is Sequential:
        return Sequential(placed(layer.layers, norm))
    layers = placed((layer,), norm)
    return layers[0] if len(layers) == 1 else Sequential(layers)


def placed(layers: Sequence[Layer], norm: Layer | None) -> tuple[Layer, ...]:
    """The layers with every norm replaced by this one; None removes them.

    The new norm stands between the weights before it and the activation after it, as in the
    presets; if no activation follows, it takes the place of the old norm.

    Returns:
        The layers, whose number may change.
    """
    rest = [part for inner in layers for part in inner.opened(norm)]
    found: list[Layer] = []
    while rest:
        part = rest.pop(0)
        if part is not None:
            found.append(part)
        elif norm is not None:
            weights = found.pop() if found and found[-1].is_weights else None
            follows = bool(rest) and isinstance(rest[0], Activation)
            found += norm.around(weights, rest.pop(0) if follows else None)
    return tuple(found)


class ResidualModule(nnx.Module):
    """shortcut(x) + branch(x); None for no shortcut."""

    def __init__(self, branch, shortcut):
        self.branch, self.shortcut = branch, shortcut

    def __call__(self, x: Array) -> Array:
        """The sum, of the branch's shape."""
        return (x if self.shortcut is None else self.shortcut(x)) + self.branch(x)


class RepeatModule(nnx.Module):
    """A block applied ``times`` times; its variables have a leading axis over the repetitions."""

    def __init__(self, block: Layer, times: int, shape: Shape, rngs: nnx.Rngs):
        create = nnx.vmap(lambda rngs: block.build(shape, rngs), axis_size=times)
        self.block = create(rngs.split(times))

    def __call__(self, x: Array) -> Array:
        """The value after the last repetition, of x's shape."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def repeat(x, block):
            return block(x)

        return repeat(x, self.block)


def located(path: str, inner: Layer, signal: Signal) -> Signal:
    """The signal after the layer; an error message is prefixed with the layer's path."""
    try:
        return inner.signal_after(signal)
    except SpecError as error:
        raise SpecError(f"{path}/{error}") from None


def _sum(branch: Kernel[M], beside: Kernel[M]) -> Kernel[M]:
    """The kernel of the sum of two independent values, one of which has mean zero."""
    deviation, tangent_deviation = map(total, beside.deviations, branch.deviations)
    status = first_failure_of(branch.status, beside.status)
    return branch.replace(status=status).after(
        covariance=beside.covariance + branch.covariance,
        tangent=beside.effective_tangent + branch.effective_tangent,
        mean=total(beside.mean, branch.mean),
        unit_mean=total(beside.unit_mean, branch.unit_mean),
        deviation=deviation,
        tangent_deviation=tangent_deviation,
        shared=total(beside.shared, branch.shared),
        shared_tangent=total(beside.shared_tangent, branch.shared_tangent),
    )


def _flat(records: Any) -> list[Record]:
    """All records of a tree, in their order."""
    return jax.tree.leaves(records, is_leaf=lambda node: isinstance(node, Record))
