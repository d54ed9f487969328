"""The contract of a layer: what a new layer has to implement, in one file.

A layer is a frozen dataclass registered as a pytree by :func:`layer`. Structure (width, kernel,
axes) is static; numbers (weight_var, gamma) are leaves, so that a specification can be vmapped over
them and differentiated with respect to them. ``__post_init__`` also runs on tracers, so it checks
static fields only; numbers are checked on the host by :meth:`Layer.value_problems`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.checks import MOST_UNITS, check_choice, plain, truth, whole
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.kernel import Kernel, M
from meanfield_jax.kernel.matrix import Matrix
from meanfield_jax.kernel.mixture import Mixture
from meanfield_jax.pytree import pytree, static

PARTS = "/parts/"
"""Between a layer's path and the number of a part of the channels, in the rows of a theory."""

Shape = tuple[int, ...]
Problem = tuple[str, Any, str, str]
T = TypeVar("T", bound="Layer")


class Signal(NamedTuple):
    """Shape and distribution of the values between two layers, known before any numbers are.

    Attributes:
        shape: Shape of one sample, (features,) or (height, width, channels).
        gaussian: Whether units are Gaussian, as sums over many random weights are.
        random: Whether units are draws of one distribution, as they are after random weights.
        parts: After a :class:`Concat`, the numbers of channels that are draws of the same
            distribution, in order; () if all are.
    """

    shape: Shape
    gaussian: bool = False
    random: bool = False
    parts: tuple[int, ...] = ()


@pytree
class Injection:
    """What a layer's own parameters add to its output's tangent, by kind of parameter.

    Each is a matrix of the kernel, or None. ``scale`` is added to the kernel's ``scale``;
    ``deviation``, which equals ``weights`` up to a constant that centring removes, to its
    ``tangent_deviation``; ``shared``, the part of the others' sum that is equal in all channels, to
    its ``shared_tangent``; the others to its ``tangent``.
    """

    weights: Matrix | None = None
    biases: Matrix | None = None
    offset: Matrix | None = None
    scale: Matrix | None = None
    deviation: Matrix | None = None
    shared: Matrix | None = None


@pytree
class Perturbation:
    """Zeros added to a layer's output, with respect to which the theory is differentiated."""

    tangent: Matrix | None = None
    scale: Matrix | None = None
    deviation: Matrix | None = None
    shared: Matrix | None = None


@pytree
class Record:
    """What the forward pass recorded at a layer with parameters.

    Attributes:
        before: Kernel before the layer.
        after: Kernel after the layer, including the layer's injection.
        injection: What the layer's own parameters added.
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
        width: Number of units or channels of such a layer.
        is_norm: Whether it is a normalization, with scale, offset and statistics.
        over_batch: Whether its outputs depend on the batch in training, and on running statistics
            in evaluation.
        linear: Whether it acts on every unit by itself and linearly, but is no normalization.
        pools: Whether it needs all pairs of the positions before it, without exception.
        within_sample: Whether its statistics are taken over the positions of one sample, so that
            all pairs of positions are needed.
        stride: Factor by which it divides the sides of a map.
        kernel_size: Side of its window.
        on_parts: What it does with channels of several distributions, as after a
            :class:`Concat`: ``"each"``: it acts on every channel by itself; ``"mean"``: random
            weights see the mean over channels; ``"inside"``: the layers inside decide; None:
            there is no theory.
        norm_name: Name of a normalization layer in tables and on the command line.
        abbreviation: Short form of that name.
    """

    is_weights: ClassVar[bool] = False
    width: int
    is_norm: ClassVar[bool] = False
    over_batch: ClassVar[bool] = False
    linear: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    within_sample: ClassVar[bool] = False
    stride: int = 1
    kernel_size: int = 1
    on_parts: ClassVar[str | None] = None
    norm_name: ClassVar[str | None] = None
    abbreviation: ClassVar[str] = ""

    def __post_init__(self):
        """Checks the fields that are not numbers; raises SpecError if one cannot be used."""
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            given = getattr(self, field.name)
            found = _checked(f"{type(self).__name__}.{field.name}", given, field)
            if found is not given:
                object.__setattr__(self, field.name, found)

    @property
    def ends_in_weights(self) -> bool:
        """Whether its last operation, apart from a norm, is to apply random weights."""
        return self.is_weights

    @property
    def total_stride(self) -> int:
        """The factor by which it, and all layers inside it, divide the sides of a map."""
        return self.stride

    def couples_positions(self, vary: bool) -> bool:
        """Whether it needs pairs of distinct positions; ``vary``: whether positions differ."""
        return False

    def varies_positions(self, on_data: bool) -> bool:
        """Whether positions differ after it; ``on_data``: whether the inputs are data."""
        return False

    def normalizes(self, statistics: str) -> bool:
        """Whether the scale of its inputs does not matter; ``statistics`` as in ``analyze``."""
        return self.is_norm and (statistics == "batch" or not self.over_batch)

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType, reportType]

    def output(self, signal: Signal) -> Signal:
        """The signal after the layer; raises SpecError if the layer cannot take ``signal``."""
        return signal

    def signal_after(self, signal: Signal) -> Signal:
        """The same, with the parts of the channels."""
        after = self.output(signal)
        if not signal.parts or self.on_parts == "inside":
            return after
        if self.on_parts is None:
            cause = "after a Concat, whose branches have variances of their own, it has no theory"
            remedy = "put it into the branches, or use BatchNorm, Conv or Dense there"
            raise problem(SpecError, type(self).__name__, signal.parts, cause, remedy)
        # a flatten head turns positions into channels
        factor = after.shape[-1] // signal.shape[-1]
        kept = tuple(factor * count for count in signal.parts)
        return after._replace(parts=kept if self.on_parts == "each" else ())

    def num_parameters(self, shape: Shape) -> int:
        """The number of trainable parameters for inputs of this shape."""
        return 0

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        """The covariance and tangent rule: the kernel after the layer and its own injection."""
        raise NotImplementedError

    def rule_of_part(self, kernel: Kernel, whole: Kernel) -> tuple[Kernel, Injection | None]:
        """The rule for some of the channels; ``whole`` is the kernel of all, for statistics."""
        return self.rule(kernel)

    def propagate(self, kernel: Kernel[M], perturbations: Any = None) -> tuple[Kernel[M], Any]:
        """Applies the rule, then adds the injection and the perturbation.

        Args:
            kernel: The kernel before the layer, or a :class:`Mixture`.
            perturbations: A :class:`Perturbation`, or a tree of them; None for none.

        Returns:
            The kernel (or mixture) after the layer, and a tree of Records.
        """
        if isinstance(kernel, Mixture):
            return self._propagate_parts(kernel, perturbations)
        return self._injected(kernel, self.rule(kernel), perturbations)

    def _propagate_parts(self, kernel: Mixture[M], perturbations: Any) -> tuple[Any, Any]:
        whole = kernel.mean()
        if self.on_parts == "mean":
            return self.propagate(whole, perturbations)
        added = perturbations or (None,) * len(kernel.parts)
        found = [
            self._injected(part, self.rule_of_part(part, whole), own)
            for part, own in zip(kernel.parts, added, strict=True)
        ]
        parts, records = zip(*found, strict=True)
        return Mixture(parts), None if all(own is None for own in records) else records

    def _injected(
        self, kernel: Kernel[M], found: tuple[Kernel[M], Injection | None], perturbations: Any
    ) -> tuple[Kernel[M], Record | None]:
        after, injection = found
        if injection is None:
            return after, None
        own = [injection.weights, injection.biases, injection.offset]
        added = perturbations or Perturbation()
        after = after.replace(
            tangent=total(after.tangent, *own, added.tangent),
            scale=total(after.scale, injection.scale, added.scale),
            tangent_deviation=total(after.tangent_deviation, injection.deviation, added.deviation),
            shared_tangent=total(after.shared_tangent, injection.shared, added.shared),
        )
        return after, Record(kernel, after, injection)

    def normalized(self, records: Any, after: bool, statistics: str) -> tuple[Any, bool]:
        """Which of its parameters a normalization follows on every path to the outputs.

        Args:
            records: The records of :meth:`propagate`.
            after: Whether a normalization follows the layer.
            statistics: How BatchNorm is differentiated, as in ``analyze``.

        Returns:
            A tree like the records, with a number (1 if a normalization follows, else 0) in place
            of each, (times,) inside a :class:`Repeat`; and whether a normalization follows the
            layer's inputs.
        """
        return map_records(lambda record: float(after), records), after or self.normalizes(
            statistics
        )

    def widths_after(self, records: Any, after: Array) -> tuple[Any, Array]:
        """The sum of 1/width over the layers that follow, which sets how much one draw scatters.

        Args:
            records: The records of :meth:`propagate`.
            after: The sum over the layers that follow this one, ().

        Returns:
            A tree like the records, with the sum after it in place of each; and the sum that
            includes this layer.
        """
        own = map_records(lambda record: after, records)
        if isinstance(records, Record) and records.injection.weights is not None:
            return own, after + 1 / records.before.channels
        return own, after

    def check_theory(self, shape: Shape) -> None:
        """Raises SpecError if there is no theory of the layer for inputs of this shape."""

    def build(self, shape: Shape, rngs: nnx.Rngs) -> Callable[[Array], Array]:
        """The Flax module (or function) with parameters drawn from the declared distributions."""
        raise NotImplementedError

    def rows(self, records: Any, read: Callable[[Record], Rows]) -> Rows:
        """Turns each record into a dictionary of arrays and concatenates these, (layers,) each."""
        if isinstance(records, tuple):
            return joined([read(record) for record in records])
        return {} if records is None else read(records)

    def labels(self, records: Any, path: str) -> list[tuple[str, "Layer"]]:
        """Path and layer of each row of :meth:`rows`."""
        if isinstance(records, tuple):
            return [(f"{path}{PARTS}{index}", self) for index in range(len(records))]
        return [] if records is None else [(path, self)]

    def children(self) -> Mapping[str, "Layer"]:
        """The layers inside a combinator, by their path relative to it."""
        return {}

    def changed(self, change: "Callable[[Layer], Layer]") -> Any:
        """The layer with ``change`` applied; a combinator applies it to the layers inside."""
        return change(self)

    def around(self, weights: "Layer | None", activation: "Layer | None") -> "tuple[Layer, ...]":
        """The weights, this layer as their norm, and the activation, arranged as in the presets.

        Args:
            weights: Dense or Conv; None if no weights come directly before.
            activation: The activation that follows; None if there is none.

        Returns:
            The layers in the order in which they are applied.
        """
        return tuple(part for part in (weights, self, activation) if part is not None)

    def opened(self, norm: "Layer | None") -> "tuple[Layer | None, ...]":
        """The parts of the layer, with the norms inside them replaced.

        Args:
            norm: The norm to put in; None for no norm.

        Returns:
            The parts; None marks the place of the layer's own norm.
        """
        return (self,)

    @classmethod
    def fitting(cls, widths: Sequence[int]) -> "Layer":
        """For a norm: an instance that fits a network with these numbers of channels."""
        return cls()

    def value_problems(self) -> Iterator[Problem]:
        """Yields (field, value, cause, remedy) for each number that is not valid."""
        yield from ()

    def __repr__(self) -> str:
        """The class with its numbers and those static fields that differ from their defaults."""
        parts = []
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            known = isinstance(value, (int, float, str, bool, tuple))
            silent = field.metadata.get("static") or field.metadata.get("silent")
            if not (silent and known and value == field.default):
                parts.append(f"{field.name}={getattr(value, '__name__', None) or repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


def map_records(function: Callable[..., Any], records: Any, *rest: Any) -> Any:
    """Applies a function to every record in a tree of them."""
    return jax.tree.map(function, records, *rest, is_leaf=lambda node: isinstance(node, Record))


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of several layers, concatenated."""
    parts = [part for part in parts if part]
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts) if parts else {}


def total(*parts: Any) -> Any:
    """The sum of the parts that are not None; None if all are."""
    present = [part for part in parts if part is not None]
    return functools.reduce(operator.add, present) if present else None


LAYERS: dict[str, type[Layer]] = {}
"""Every layer, by the name of its class."""


def norm_layers() -> dict[str, type[Layer]]:
    """Every normalization layer, by its ``norm_name``."""
    return {cls.norm_name: cls for cls in LAYERS.values() if cls.norm_name is not None}


def abbreviation(norm: str) -> str:
    """The abbreviation of a normalization layer's name; any other name is returned unchanged."""
    cls = norm_layers().get(norm)
    return norm if cls is None else cls.abbreviation


def tunable_fields() -> dict[str, bool]:
    """The numbers of all layers that ``tune`` may change, and whether each must be positive."""
    found = {
        field.name: field.metadata["positive"]
        for cls in LAYERS.values()
        for field in dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
        if "positive" in field.metadata
    }
    return dict(sorted(found.items(), key=lambda item: not item[1]))


def as_layer(argument: str, value: Any) -> Layer:
    """The value as a layer; a class stands for the layer with its defaults.

    Args:
        argument: The argument, for messages.
        value: A layer, or the class of one.

    Returns:
        The layer.

    Raises:
        SpecError: if it is neither.
    """
    if isinstance(value, type) and issubclass(value, Layer):
        try:
            return value()
        except TypeError:
            remedy = f"pass a layer, such as {value.__name__}(...)"
            cause = "a class that needs arguments"
            raise problem(SpecError, argument, value.__name__, cause, remedy) from None
    if isinstance(value, Layer):
        return value
    raise problem(SpecError, argument, value, "not a layer", f"use one of {', '.join(LAYERS)}")


def is_layer(node: Any) -> bool:
    """Whether a node of a pytree is a layer, which may stand for any number of leaves."""
    return isinstance(node, Layer)


def as_layers(path: str, value: Any) -> tuple[Layer, ...]:
    """A sequence of layers as a tuple of them; raises SpecError for anything else."""
    if not isinstance(value, (tuple, list)):
        remedy = "pass a tuple of layers"
        raise problem(SpecError, path, value, "not a sequence of layers", remedy)
    return tuple(as_layer(f"{path}/{index}", inner) for index, inner in enumerate(value))


def _checked(name: str, value: Any, field: dataclasses.Field) -> Any:
    """A field's value in the form of its type; raises SpecError if it cannot be used."""
    kind, options = field.type, field.metadata
    if "choices" in options:
        check_choice(name, value, options["choices"])
        return value
    if kind in (int, "int"):
        return whole(name, value, options.get("least"), MOST_UNITS)
    if kind in (bool, "bool"):
        return truth(name, value)
    if kind == tuple[Layer, ...]:
        return as_layers(name, value)
    if isinstance(kind, type) and issubclass(kind, Layer):
        return as_layer(name, value)
    return value if options.get("static") else plain(value)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def layer(cls: type[T]) -> type[T]:
    """Makes a Layer subclass a frozen dataclass and a pytree, and registers its name for JSON."""
    cls = pytree(cls, repr=False)
    LAYERS[cls.__name__] = cls
    return cls


def tunable(default: float, *, positive: bool) -> Any:
    """A number that ``tune`` may change; positive ones are tuned on a logarithmic scale."""
    return dataclasses.field(default=default, metadata=dict(positive=positive))


def silent(default: float) -> Any:
    """A number that is not tuned, and is printed only where it differs from its default."""
    return dataclasses.field(default=default, metadata=dict(silent=True))


def variance_problems(layer: Any, *fields: str) -> Iterator[Problem]:
    """Yields a problem for each of the fields that is not a finite number of at least 0."""
    for field in fields:
        value = getattr(layer, field)
        if not np.all(np.isfinite(value) & (np.asarray(value) >= 0)):
            yield field, value, "must be finite and not negative", "pass a number of at least 0"
