"""Sequential, Residual and Repeat: layers made of layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import (
    Kernel,
    Layer,
    Record,
    Rows,
    Shape,
    Signal,
    check_positive_int,
    layer,
    static,
)
from meanfield_jax.layers.conv import Conv
from meanfield_jax.layers.dense import Dense
from meanfield_jax.layers.norm import Norm


@layer
class Sequential(Layer):
    """One layer after the other.

    Attributes:
        layers: The layers, first to last.
    """

    layers: tuple[Layer, ...] = ()

    def output(self, signal: Signal) -> Signal:
        return self.signals(signal)[-1]

    def signals(self, signal: Signal) -> list[Signal]:
        """The signal before each layer, and the last one's output; errors name the layer."""
        signals = [signal]
        for index, inner in enumerate(self.layers):
            signals.append(located(f"layers/{index}", inner, signals[-1]))
        return signals

    def num_parameters(self, shape: Shape) -> int:
        shapes = self._shapes(shape)
        return sum(la.num_parameters(s) for la, s in zip(self.layers, shapes, strict=True))

    def propagate(self, kernel: Kernel, taps: Any) -> tuple[Kernel, Any]:
        records = []
        for index, inner in enumerate(self.layers):
            kernel, record = inner.propagate(kernel, None if taps is None else taps[index])
            records.append(record)
        return kernel, tuple(records)

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

    def changed(self, change) -> "Sequential":
        parts = (inner.changed(change) for inner in self.layers)
        return Sequential(tuple(part for part in parts if part is not None))

    def _shapes(self, shape: Shape) -> list[Shape]:
        # whether units are Gaussian was checked before; shapes do not depend on it
        return [signal.shape for signal in self.signals(Signal(shape, gaussian=True))[:-1]]


@layer
class Residual(Layer):
    """x + branch(x), the branch ending in random weights (Dense or Conv, a norm behind or not).

    Rule: covariances and tangents of x and branch(x) add up, since the branch's last weights are
    independent of x and have mean zero.

    Attributes:
        branch: A layer that keeps the shape; a :class:`Sequential` for several.
    """

    branch: Layer = Sequential()

    def output(self, signal: Signal) -> Signal:
        behind = located("branch", self.branch, signal)
        if behind.shape != signal.shape:
            remedy = f"end the branch with shape {signal.shape}"
            cause = f"its branch leaves shape {behind.shape}"
            raise problem(SpecError, "Residual input shape", signal.shape, cause, remedy)
        if not ends_in_weights(self.branch):
            cause, remedy = "does not end in random weights", "end it with Dense or Conv"
            raise problem(SpecError, "Residual.branch", type(self.branch).__name__, cause, remedy)
        return Signal(signal.shape, signal.gaussian and behind.gaussian)

    def num_parameters(self, shape: Shape) -> int:
        return self.branch.num_parameters(shape)

    def propagate(self, kernel: Kernel, taps: Any) -> tuple[Kernel, Any]:
        branch, records = self.branch.propagate(kernel, taps)
        deviations = jax.tree.map(jnp.add, kernel.deviations, branch.deviations)
        return kernel.behind(
            cov=jax.tree.map(jnp.add, kernel.cov, branch.cov),
            tangent=jax.tree.map(jnp.add, kernel.settled_tangent, branch.settled_tangent),
            mean=_sum(kernel.mean, branch.mean),
            **dict(zip(("deviation", "tangent_deviation"), deviations, strict=True)),
            status=branch.status,
            **branch.scattered,
        ), records

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return ResidualModule(self.branch.build(shape, rngs))

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        return self.branch.rows(records, read)

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        return self.branch.labels(records, f"{path}/branch")

    def children(self) -> Mapping[str, Layer]:
        return {"branch": self.branch}

    def changed(self, change) -> Layer:
        return Residual(self.branch.changed(change) or Sequential())


@layer
class Repeat(Layer):
    """The same specification several times over, each time with its own random parameters.

    Theory and network run it as a scan: a thousand layers compile as fast as one.

    Attributes:
        block: A layer that keeps the shape; a :class:`Sequential` for several.
        times: How often.
    """

    block: Layer = Sequential()
    times: int = static(1)

    def __post_init__(self):
        check_positive_int("Repeat.times", self.times)

    def output(self, signal: Signal) -> Signal:
        behind = located("block", self.block, signal)
        if behind.shape != signal.shape:
            remedy = f"end the block with shape {signal.shape}"
            cause = f"its block leaves shape {behind.shape}"
            raise problem(SpecError, "Repeat input shape", signal.shape, cause, remedy)
        return located("block", self.block, behind) if self.times > 1 else behind

    def num_parameters(self, shape: Shape) -> int:
        return self.times * self.block.num_parameters(shape)

    def propagate(self, kernel: Kernel, taps: Any) -> tuple[Kernel, Any]:
        behind, _ = jax.eval_shape(lambda k: self.block.propagate(k, None), kernel)
        if jax.tree.structure(kernel) == jax.tree.structure(behind):
            return jax.lax.scan(self.block.propagate, kernel, taps, length=self.times)

        def step(carry, tap):
            # a known zero and a number do not fit one carry: make both a number
            behind, record = self.block.propagate(carry, tap)
            return behind.filled(), record

        return jax.lax.scan(step, kernel.filled(), taps, length=self.times)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return RepeatModule(self.block, self.times, shape, rngs)

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        stacked = jax.vmap(lambda record: self.block.rows(record, read))(records)
        return jax.tree.map(jnp.ravel, stacked)

    def labels(self, records: Any, path: str) -> list[tuple[str, Layer]]:
        names = [f"{path}/block[{index}]" for index in range(self.times)]
        return [label for name in names for label in self.block.labels(records, name)]

    def children(self) -> Mapping[str, Layer]:
        return {"block": self.block}

    def changed(self, change) -> Layer:
        return Repeat(self.block.changed(change) or Sequential(), self.times)


class ResidualModule(nnx.Module):
    """x + branch(x)."""

    def __init__(self, branch):
        self.branch = branch

    def __call__(self, x: Array) -> Array:
        """The sum, of x's shape."""
        return x + self.branch(x)


class RepeatModule(nnx.Module):
    """A block applied ``times`` times; its variables carry a leading axis over the repetitions."""

    def __init__(self, block: Layer, times: int, shape: Shape, rngs: nnx.Rngs):
        create = nnx.vmap(lambda rngs: block.build(shape, rngs), axis_size=times)
        self.block = create(rngs.split(times))

    def __call__(self, x: Array) -> Array:
        """The value behind the last repetition, of x's shape."""

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def repeat(x, block):
            return block(x)

        return repeat(x, self.block)


def located(path: str, inner: Layer, signal: Signal) -> Signal:
    """The layer's output; an error gains the layer's place in front."""
    try:
        return inner.output(signal)
    except SpecError as error:
        raise SpecError(f"{path}/{error}") from None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several layers one after the other."""
    parts = [part for part in parts if part]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if parts else {}


def _sum(first: Array | None, second: Array | None) -> Array | None:
    if first is None or second is None:
        return second if first is None else first
    return first + second


def ends_in_weights(inner: Layer) -> bool:
    """Whether the last thing it does, a norm aside, is to apply random weights."""
    if isinstance(inner, Sequential) and inner.layers:
        last = inner.layers[-1]
        if isinstance(last, Norm):
            return ends_in_weights(Sequential(inner.layers[:-1]))
        return ends_in_weights(last)
    if isinstance(inner, Repeat):
        return ends_in_weights(inner.block)
    return isinstance(inner, (Dense, Conv))
