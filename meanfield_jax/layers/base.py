"""The contract of a layer: what to implement to add one, in one file.

A layer is a frozen dataclass registered as a pytree by :func:`layer`. Structure (width, kernel,
axes) is static; numbers (weight_var, gamma) are leaves, so that a specification can be vmapped over
them and differentiated in them. ``__post_init__`` also runs on tracers: check static fields only
there. Values are checked on the host by :meth:`Layer.value_problems`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import Kernel, M
from meanfield_jax.kernel.matrix import Matrix

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
class Perturbation:
    """Zeros added to a layer's output, to differentiate the theory with respect to it there."""

    tangent: Matrix | None = None
    scale: Matrix | None = None
    deviation: Matrix | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Record:
    """What the forward pass saw at a layer with parameters.

    Attributes:
        before: Kernel entering.
        after: Kernel leaving, the layer's injection included.
        injection: What the layer injected.
        back: Derivatives of the network's tangent with respect to this layer's; None in the
            forward pass.
    """

    before: Kernel
    after: Kernel
    injection: Injection
    back: Perturbation | None = None


Rows = dict[str, Array]


class Layer:
    """Base class of all layers; dense.py is a short example.

    Attributes:
        is_weights: Whether it is a layer of random weights and biases.
        width: Of such a layer, its units or channels.
        is_norm: Whether it is a normalization: scale, offset and statistics.
        over_batch: Whether its outputs depend on the batch in training, and on running statistics
            in evaluation.
        within_sample: Whether its statistics are over the positions of one sample, so that all
            pairs of positions count.
        stride: By what it divides the sides of a map.
        kernel_size: Side of its window.
        norm_name: Of a layer that normalizes, in tables and on the command line.
        abbreviation: Of that name.
    """

    is_weights: ClassVar[bool] = False
    width: int
    is_norm: ClassVar[bool] = False
    over_batch: ClassVar[bool] = False
    within_sample: ClassVar[bool] = False
    stride: int = 1
    kernel_size: int = 1
    norm_name: ClassVar[str | None] = None
    abbreviation: ClassVar[str] = ""

    @property
    def ends_in_weights(self) -> bool:
        """Whether the last thing it does, a norm aside, is to apply random weights."""
        return self.is_weights

    def couples_positions(self, vary: bool) -> bool:
        """Whether pairs of distinct positions count; ``vary``: whether positions differ."""
        return False

    def varies_positions(self, on_data: bool) -> bool:
        """Whether it makes positions differ, or on data finds them different."""
        return False

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportType]

    def output(self, signal: Signal) -> Signal:
        """What leaves the layer when ``signal`` enters; raises SpecError where it cannot."""
        return signal

    def num_parameters(self, shape: Shape) -> int:
        """The number of trainable parameters on inputs of this shape."""
        return 0

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        """The covariance and tangent rule: the kernel after the layer and its own injection."""
        raise NotImplementedError

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        """Applies the rule, adds injection and perturbation.

        Args:
            kernel: Before the layer.
            perturbations: A :class:`Perturbation`, or a tree of them; None for none.

        Returns:
            The kernel after the layer, and a tree of Records.
        """
        after, injection = self.rule(kernel)
        if injection is None:
            return after, None
        own = [injection.weights, injection.biases, injection.offset]
        added = perturbations or Perturbation()
        after = after.replace(
            tangent=total(after.tangent, *own, added.tangent),
            scale=total(after.scale, injection.scale, added.scale),
            tangent_deviation=total(after.tangent_deviation, injection.deviation, added.deviation),
        )
        return after, Record(kernel, after, injection)

    def check_theory(self, shape: Shape) -> None:
        """Raises SpecError where there is no theory of the layer on inputs of this shape."""

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

    def changed(self, change: "Callable[[Layer], Layer]") -> Any:
        """With ``change`` applied; a combinator applies it to the layers inside."""
        return change(self)

    def around(self, weights: "Layer | None", activation: "Layer | None") -> "tuple[Layer, ...]":
        """Weights, this layer as their normalization, and the activation, as presets use them.

        Args:
            weights: Dense or Conv; None where none come right before.
            activation: What follows; None where none does.

        Returns:
            The layers in the order in which they are applied.
        """
        return tuple(part for part in (weights, self, activation) if part is not None)

    def opened(self, norm: "Layer | None") -> "tuple[Layer | None, ...]":
        """The layer with the norms inside it exchanged, as the parts that it consists of.

        Args:
            norm: The norm to put in; None for none.

        Returns:
            The parts, with None in the place of a norm that is the layer's own.
        """
        return (self,)

    @classmethod
    def fitting(cls, widths: Sequence[int]) -> "Layer":
        """As a norm: an instance for a network of these numbers of channels."""
        return cls()

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


def map_records(function: Callable[..., Any], records: Any, *rest: Any) -> Any:
    """A function of every record in a tree of them."""
    return jax.tree.map(function, records, *rest, is_leaf=lambda node: isinstance(node, Record))


def total(*parts: Any) -> Any:
    """The sum of those that are not None; None if all are."""
    present = [part for part in parts if part is not None]
    return functools.reduce(operator.add, present) if present else None


LAYERS: dict[str, type[Layer]] = {}
"""Every layer by the name of its class."""


def norm_layers() -> dict[str, type[Layer]]:
    """Every normalization layer by its ``norm_name``."""
    return {cls.norm_name: cls for cls in LAYERS.values() if cls.norm_name is not None}


def abbreviation(norm: str) -> str:
    """Of a normalization layer's name; any other name as it is."""
    cls = norm_layers().get(norm)
    return norm if cls is None else cls.abbreviation


def tunable_fields() -> dict[str, bool]:
    """The numbers that ``tune`` may change, and whether they are positive, over all layers."""
    found = {
        field.name: field.metadata["positive"]
        for cls in LAYERS.values()
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if "positive" in field.metadata
    }
    return dict(sorted(found.items(), key=lambda item: not item[1]))


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


def tunable(default: float, *, positive: bool) -> Any:
    """A number that ``tune`` may change; a positive one moves on a logarithmic scale."""
    return dataclasses.field(default=default, metadata=dict(positive=positive))


def check_positive_int(argument: str, value: object) -> None:
    """Raises SpecError unless value is an int of at least 1, or a width that is traced."""
    if isinstance(value, Array):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise problem(SpecError, argument, value, "not a whole number >= 1", "give one")


def variance_problems(layer: Any, *fields: str) -> Iterator[Problem]:
    """The fields that are not finite numbers of at least 0."""
    for field in fields:
        value = getattr(layer, field)
        if not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
            yield field, value, "a variance is finite and not negative", "give a number >= 0"
