"""A network as data: an input shape and a tuple of layers; checks, counts, and JSON."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from meanfield_jax.checks import MOST_UNITS, is_number, plain, sequence, whole
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import (
    LAYERS,
    Layer,
    Sequential,
)
from meanfield_jax.layers.base import Signal, as_layers
from meanfield_jax.limits import check_structure
from meanfield_jax.pytree import pytree, static

FORMAT = "meanfield_jax.Network/1"


@pytree(repr=False)
class Network:
    """The specification of a network, from which theory, Flax network and JSON are made.

    It is a pytree whose leaves are the numbers of the layers (weight_var, bias_var, gamma, beta),
    so that specifications can be built inside ``jax.vmap`` and ``jax.grad``.

    Args:
        input_shape: Shape of one sample, (features,) or (height, width, channels).
        layers: The layers, first to last.

    Raises:
        SpecError: if a layer does not fit the one before it; the message gives the layer's path.

    Example:
        >>> import meanfield_jax as mf
        >>> mf.Network((784,), (mf.Dense(100), mf.Activation("tanh"), mf.Dense(10)))
        Network: (784,) -> (10,), 79,510 parameters
          layers/0  Dense(width=100, weight_var=2.0, bias_var=0.5)  (100,)  78,500
          layers/1  Activation(function='tanh')                     (100,)       0
          layers/2  Dense(width=10, weight_var=2.0, bias_var=0.5)   (10,)    1,010
    """

    input_shape: tuple[int, ...] = static()
    layers: tuple[Layer, ...]

    def __post_init__(self):
        shape = plain(self.input_shape)
        shape = (shape,) if isinstance(shape, int) else sequence("input_shape", shape)
        sizes = tuple(whole("input_shape", size, 1, MOST_UNITS) for size in shape)
        object.__setattr__(self, "input_shape", sizes)
        object.__setattr__(self, "layers", as_layers("layers", self.layers))
        if len(self.input_shape) not in (1, 3):
            remedy = "use (features,) or (height, width, channels)"
            cause = "must have one or three entries"
            raise problem(SpecError, "input_shape", self.input_shape, cause, remedy)
        if not self.layers:
            raise problem(SpecError, "layers", self.layers, "empty", "pass at least one layer")
        check_structure(self.layers)
        self.body.output(Signal(self.input_shape))

    @property
    def body(self) -> Sequential:
        """All layers as a single layer."""
        return Sequential(self.layers)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of one sample after the last layer."""
        return self.body.output(Signal(self.input_shape)).shape

    @property
    def num_outputs(self) -> int:
        """C, the number of outputs; raises SpecError if the last layer returns a map."""
        shape = self.output_shape
        if len(shape) != 1:
            remedy = "end with Flatten() or GlobalMeanPool() and Dense(outputs)"
            raise problem(SpecError, "output shape", shape, "not a vector", remedy)
        return shape[0]

    @property
    def num_parameters(self) -> int:
        """The number of trainable parameters."""
        return self.body.num_parameters(self.input_shape)

    def validate(self) -> None:
        """Checks every number that is known (not traced) and reports all that are not valid.

        Raises:
            SpecError: in one line, the path, value, cause and remedy of each problem.
        """
        check_numbers(self.body)

    def to_json(self, indent: int | None = 2) -> str:
        """The specification as JSON text; :meth:`from_json` reads it back."""
        self.validate()
        spec = dict(format=FORMAT, input_shape=self.input_shape, layers=_encode(self.layers))
        return json.dumps(spec, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> "Network":
        """Reads what :meth:`to_json` wrote; raises SpecError for any other text."""
        remedy = "write the specification with to_json"
        if not isinstance(text, (str, bytes, bytearray)):
            raise problem(SpecError, "specification", text, "not a text", remedy)
        try:
            spec = json.loads(text, object_pairs_hook=_without_repeats)
            if not isinstance(spec, dict) or spec.get("format") != FORMAT:
                cause = f"its format is not {FORMAT!r}"
                raise problem(SpecError, "specification", spec, cause, remedy)
            for name in ("input_shape", "layers"):
                if not isinstance(spec.get(name), list):
                    raise problem(SpecError, name, spec.get(name), "must be a list", remedy)
            if unknown := sorted(set(spec) - {"format", "input_shape", "layers"}):
                raise problem(SpecError, "specification", unknown, "unknown keys", remedy)
            network = cls(spec["input_shape"], tuple(map(_decode, spec["layers"])))
        except SpecError:
            raise
        except RecursionError:
            raise problem(SpecError, "specification", text, "nested too deeply", remedy) from None
        except ValueError as error:  # of the text's encoding or structure
            cause = f"not JSON ({' '.join(str(error).split())})"
            raise problem(SpecError, "specification", text, cause, remedy) from None
        network.validate()
        return network

    def __repr__(self) -> str:
        rows, signal = [], Signal(self.input_shape)
        for index, inner in enumerate(self.layers):
            after = inner.output(signal)
            count = f"{inner.num_parameters(signal.shape):,}"
            own, *inside = walk(inner, f"layers/{index}")
            rows.append((own[0], _without_children(inner), str(after.shape), count))
            rows += [(path, _without_children(part), "", "") for path, part in inside]
            signal = after
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        head = f"Network: {self.input_shape} -> {signal.shape}, {self.num_parameters:,} parameters"
        return "\n  ".join([head, *map(str.rstrip, lines)])


def _without_children(layer: Layer) -> str:
    """The line of the layer itself; a combinator's does not show the layers inside."""
    if not layer.children():
        return repr(layer)
    own = {f.name: getattr(layer, f.name) for f in dataclasses.fields(layer)}  # pyright: ignore[reportArgumentType]
    fields = (f"{k}={v!r}" for k, v in own.items() if not isinstance(v, (Layer, tuple)))
    return f"{type(layer).__name__}({', '.join(fields)})"


def check_numbers(layer: Layer) -> None:
    """Raises SpecError with every known number inside the layer that is not valid."""
    problems = [
        str(problem(SpecError, f"{path}/{type(inner).__name__}.{field}".lstrip("/"), *rest))
        for path, inner in walk(layer)
        for field, *rest in _number_problems(inner)
    ]
    if problems:
        raise SpecError(" | ".join(problems))


def walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yields every layer with its path, combinators before the layers inside them."""
    yield path, layer
    for name, inner in layer.children().items():
        yield from walk(inner, f"{path}/{name}" if path else name)


def normalizes_over_batch(layer: Layer) -> bool:
    """Whether any layer inside normalizes with statistics of the batch."""
    return any(inner.over_batch for _, inner in walk(layer))


def _number_problems(inner: Layer) -> Iterator[tuple[str, Any, str, str]]:
    """The problems with the layer's values, once they are known to be numbers."""
    known = True
    # the layers inside have numbers of their own
    held = {path.partition("/")[0] for path in inner.children()} | {"layers"}
    for field in dataclasses.fields(inner):  # pyright: ignore[reportArgumentType]
        value = getattr(inner, field.name)
        if field.metadata.get("static") or field.name in held:
            continue
        if isinstance(value, Tracer):
            known = False
        elif not is_number(value):
            yield field.name, value, "must be a number", "pass a float"
            known = False
        elif isinstance(value, int) and abs(value) > MOST_UNITS:
            yield field.name, value, "too large", "pass a float"
            known = False
        elif jnp.result_type(value) in (jnp.float16, jnp.bfloat16):
            cause = "half precision is too coarse for the theory"
            yield field.name, value, cause, "use float32 or float64"
            known = False
    if known:
        yield from inner.value_problems()


def _encode(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    if isinstance(value, Layer):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}  # pyright: ignore[reportArgumentType]
        return dict(type=type(value).__name__, **fields)
    if callable(value):
        cause = "a function cannot be written as JSON"
        remedy = "use a named activation in networks to be saved"
        raise problem(SpecError, "Activation.function", value, cause, remedy)
    known = isinstance(value, (np.ndarray, np.generic, jax.Array))
    return np.asarray(value, np.float64).tolist() if known else value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object, each of whose keys may occur once."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise problem(SpecError, "specification", repeated, "keys repeat", "pass each key once")
    return found


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    fields = {name: _decode(item) for name, item in value.items() if name != "type"}
    name = value.get("type")
    if not isinstance(name, str) or name not in LAYERS:
        raise problem(SpecError, "type", name, "not a layer", f"use one of {', '.join(LAYERS)}")
    try:
        return LAYERS[name](**fields)
    except TypeError as error:
        remedy = "write the specification with to_json"
        raise problem(SpecError, name, fields, str(error)[:200], remedy) from None
