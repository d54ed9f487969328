"""The contract of a layer: what to implement to add one, in one file.

A layer is a frozen dataclass registered as a pytree by :func:`layer`. Structure (width, kernel,
axes) is static; numbers (weight_var, gamma) are leaves, so that a specification can be vmapped over
them and differentiated in them. ``__post_init__`` also runs on tracers: check static fields only
there. Values are checked on the host by :meth:`Layer.value_problems`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem

Kernel = Any
"""EnsembleKernel (state.py) or GramKernel (gram.py): the same methods on other matrices."""
Matrix = Any
"""A matrix over the samples as its kernel stores it, a Pair or an Array."""

Shape = tuple[int, ...]
Problem = tuple[str, Any, str, str]
T = TypeVar("T", bound="Layer")


class Signal(NamedTuple):
    """What is known of the values between two layers before any number is: shape and law.

    Attributes:
        shape: One sample's shape, (features,) or (height, width, channels).
        gaussian: Whether units are Gaussian: sums over many random weights.
    """

    shape: Shape
    gaussian: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Injection:
    """What a layer's own parameters add to its output's tangent, by kind of parameter.

    Matrices of the kernel, or None. ``scale`` adds to the kernel's ``scale``, the others to its
    ``tangent``; ``deviation``, which is ``weights`` up to a constant that centring removes, to its
    ``tangent_deviation``.
    """

    weights: Matrix | None = None
    biases: Matrix | None = None
    offset: Matrix | None = None
    scale: Matrix | None = None
    deviation: Matrix | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tap:
    """Zeros added to a layer's output, to differentiate the theory with respect to it there."""

    tangent: Matrix
    scale: Matrix | None
    deviation: Matrix | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What the pass saw at a layer with parameters.

    Attributes:
        before: Kernel entering.
        after: Kernel leaving, the layer's injection included.
        injection: What the layer injected.
        back: Derivatives of the network's tangent with respect to this layer's; None in the pass.
    """

    before: Kernel
    after: Kernel
    injection: Injection
    back: Tap | None = None


Rows = dict[str, Array]


class Layer:
    """Base class of all layers; dense.py is a short example."""

    def output(self, signal: Signal) -> Signal:
        """What leaves the layer when ``signal`` enters; raises SpecError where it cannot."""
        return signal

    def num_parameters(self, shape: Shape) -> int:
        """The number of trainable parameters on inputs of this shape."""
        return 0

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        """The covariance and tangent rule: the kernel behind the layer and its own injection."""
        raise NotImplementedError

    def propagate(self, kernel: Kernel, taps: Any) -> tuple[Kernel, Any]:
        """Applies the rule, adds injection and tap; returns the kernel and a tree of Records."""
        behind, injection = self.rule(kernel)
        if injection is None:
            return behind, None
        own = [injection.weights, injection.biases, injection.offset]
        tap = Tap(None, None) if taps is None else taps
        behind = behind.replace(
            tangent=_total(behind.tangent, *own, tap.tangent),
            scale=_total(behind.scale, injection.scale, tap.scale),
            tangent_deviation=_total(behind.tangent_deviation, injection.deviation, tap.deviation),
        )
        return behind, Record(kernel, behind, injection)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """The Flax module (or function) with parameters drawn from the declared distributions."""
        raise NotImplementedError

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        """Reads each record to a dictionary of arrays and lines them up, (layers,) each."""
        return {} if records is None else read(records)

    def labels(self, records: Any, path: str) -> list[tuple[str, "Layer"]]:
        """Path and layer of each of the rows."""
        return [] if records is None else [(path, self)]

    def children(self) -> Mapping[str, "Layer"]:
        """The layers inside a combinator, by path below this one."""
        return {}

    def changed(self, change: "Callable[[Layer], Layer | None]") -> Any:
        """With ``change`` applied; a combinator applies it to the layers inside; None drops one."""
        return change(self)

    def around(self, weights: "Layer | None", activation: "Layer") -> "tuple[Layer, ...]":
        """Weights, this layer as their normalization, and the activation, as presets use them.

        Args:
            weights: Dense or Conv; None where none come right before.
            activation: What follows.

        Returns:
            The layers in the order in which they are applied.
        """
        return (self, activation) if weights is None else (weights, self, activation)

    def value_problems(self) -> Iterator[Problem]:
        """Yields (field, value, cause, remedy) for each number that makes no sense."""
        yield from ()

    def __repr__(self) -> str:
        """The class with its numbers and what differs from the static defaults."""
        parts = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            if not field.metadata.get("static") or value != field.default:
                parts.append(f"{field.name}={getattr(value, '__name__', None) or repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _total(*parts: Matrix | None) -> Matrix | None:
    present = [part for part in parts if part is not None]
    if not present:
        return None
    return jax.tree.map(lambda *entries: functools.reduce(jnp.add, entries), *present)


LAYERS: dict[str, type[Layer]] = {}
"""Every layer by the name of its class."""


@dataclass_transform(frozen_default=True)
def layer(cls: type[T]) -> type[T]:
    """Makes a Layer subclass a frozen dataclass and a pytree, known to JSON by its name."""
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    jax.tree_util.register_dataclass(cls)
    LAYERS[cls.__name__] = cls
    return cls


def static(default: Any = dataclasses.MISSING) -> Any:
    """A field that describes structure: part of the pytree's definition, not one of its leaves."""
    return dataclasses.field(default=default, metadata=dict(static=True))


def check_positive_int(argument: str, value: object) -> None:
    """Raises SpecError unless value is an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise problem(SpecError, argument, value, "not a whole number >= 1", "give one")


def variance_problems(layer: Any, *fields: str) -> Iterator[Problem]:
    """The fields that are not finite numbers of at least 0."""
    for field in fields:
        value = getattr(layer, field)
        if not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
            yield field, value, "a variance is finite and not negative", "give a number >= 0"
