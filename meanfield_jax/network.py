"""A network as data: an input shape and a tuple of layers; checks, counts, and JSON."""

import dataclasses
import html
import json
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from meanfield_jax.checks import MOST_UNITS, check_choice, is_number, plain, sequence, whole
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
        origin: Where each layer comes from, if from a Flax model: its path here, its path in the
            model, and the variances of weights and biases that it had there; see :meth:`from_flax`.

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
    origin: tuple[tuple[str, str, float, float], ...] = static(default=())

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
        object.__setattr__(self, "origin", _checked_origin(self.origin))
        check_structure(self.layers)
        self.body.output(Signal(self.input_shape))

    @classmethod
    def from_flax(
        cls, model: Any, x: Any, *, variances: str = "initial", call: Any = None
    ) -> "Network":
        """The specification of a Flax model, read from one run on traced inputs.

        Layers of Flax, sums of branches, means, pooling and elementwise functions are recognized;
        dropout is kept, and BatchNorm in training mode. What has no theory is refused in one line
        that names its path.

        Args:
            model: An NNX module, a Linen module, or a pair of a Linen module and its variables.
            x: Inputs, (n, *input_shape); only their shape counts.
            variances: Where the variances of weights and biases come from. ``"initial"``: the
                distribution (LeCun, He, Glorot, PyTorch's) that the weights can have been drawn
                from, else their mean square. ``"measured"``: their mean square, as for a trained
                model, whose theory is then that of a network drawn with these variances.
            call: As in :func:`fisher_operator` for NNX, ``FisherOperator.from_linen`` for Linen.

        Returns:
            The network, whose ``paths`` lead back to the model.

        Raises:
            SpecError: if a part of the model has no theory.

        Accuracy:
            That of the specification; a measured variance has the relative error sqrt(2 / weights).

        Example:
            >>> import jax.numpy as jnp, meanfield_jax as mf
            >>> from flax import nnx
            >>> layers = [nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.relu]
            >>> model = nnx.Sequential(*layers, nnx.Linear(64, 3, rngs=nnx.Rngs(1)))
            >>> mf.Network.from_flax(model, jnp.ones((1, 8)))
            Network: (8,) -> (3,), 771 parameters
              layers/0  Dense(width=64, weight_var=1.0, bias_var=0.0)  (64,)  576
              layers/1  Activation(function='relu')                    (64,)    0
              layers/2  Dense(width=3, weight_var=1.0, bias_var=0.0)   (3,)   195
        """
        from meanfield_jax.conversion.from_flax import VARIANCES, layers_of

        check_choice("variances", variances, VARIANCES)
        shape, layers, named = layers_of(model, x, variances, call)

        def variance(layer: Layer, kind: str) -> float:
            return float(getattr(layer, f"{kind}_var", 0.0))

        origin = tuple(
            (path, named[id(la)], variance(la, "weight"), variance(la, "bias"))
            for path, la in walk(Sequential(layers))
            if id(la) in named
        )
        return cls(shape, layers, origin)

    @property
    def paths(self) -> dict[str, str]:
        """By path of a layer, its path in the Flax model that was read; empty without one."""
        return {place: path for place, path, *_ in self.origin}

    def apply_to(self, model: Any) -> Any:
        """A copy of the Flax model that this network is of, with the network's numbers.

        Scales and offsets of norms and factors are set. Weights and biases are multiplied by the
        root of the factor by which their variance has changed since :meth:`from_flax`.

        Args:
            model: The model given to :meth:`from_flax`; a pair (module, variables) for Linen.

        Returns:
            An NNX model, or for Linen the variables; the model itself is not changed.

        Raises:
            SpecError: if the network was not made by :meth:`from_flax`, or of another model.
        """
        from meanfield_jax.conversion.from_flax import applied

        if not self.origin:
            cause = "it does not know the paths of a model"
            raise problem(SpecError, "network", "a specification", cause, "use Network.from_flax")
        return applied(self, model)

    def in_parametrization(self, kind: str, base: "Network | None" = None) -> "Network":
        """The network with weights that are a multiple of their parameters.

        Args:
            kind: ``"ntk"``: parameters of variance 1 (Jacot et al. 2018). ``"mup"``: the maximal
                update parametrization for SGD (Yang & Hu 2021, arXiv:2011.14522; biases and norms
                have a share of order 1/width in the Fisher matrix and are left as they are). With
                r_in and r_out the fan-in and the width relative to those of ``base``, the
                multiplier is sqrt(r_out / r_in), and the variance of a layer whose width does not
                grow, the readout, is divided by r_in. The largest stable learning rate of
                wide networks then does not depend on the width.
            base: For ``"mup"``, the network of the same structure and usually smaller width at
                which nothing changes.

        Returns:
            The network.

        Raises:
            SpecError: if the kind is unknown, or the structures differ.

        Example:
            >>> import meanfield_jax as mf
            >>> base = mf.mlp([64] * 3, inputs=16, outputs=4)
            >>> for width in (64, 4096):
            ...     wide = mf.mlp([width] * 3, inputs=16, outputs=4)
            ...     wide = wide.in_parametrization("mup", base)
            ...     print(f"{mf.analyze(wide, num_samples=100).fisher.outlier:.0f}")
            147
            146
        """
        from meanfield_jax.parametrization import parametrized

        return parametrized(self, kind, base)

    def replace(self, layers: tuple[Layer, ...]) -> "Network":
        """The network with other numbers or widths in layers of the same kinds and places."""
        return dataclasses.replace(self, layers=layers)

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
        spec: dict[str, Any] = dict(
            format=FORMAT, input_shape=self.input_shape, layers=_encode(self.layers)
        )
        if self.origin:
            spec["origin"] = self.origin
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
            if unknown := sorted(set(spec) - {"format", "input_shape", "layers", "origin"}):
                raise problem(SpecError, "specification", unknown, "unknown keys", remedy)
            layers = tuple(map(_decode, spec["layers"]))
            network = cls(spec["input_shape"], layers, spec.get("origin", ()))
        except SpecError:
            raise
        except RecursionError:
            raise problem(SpecError, "specification", text, "nested too deeply", remedy) from None
        except ValueError as error:  # of the text's encoding or structure
            cause = f"not JSON ({' '.join(str(error).split())})"
            raise problem(SpecError, "specification", text, cause, remedy) from None
        network.validate()
        return network

    def _rows(self) -> list[tuple[str, str, str, int | None]]:
        """Path, text, output shape and parameters by layer; the latter not for layers inside."""
        rows: list[tuple[str, str, str, int | None]] = []
        signal = Signal(self.input_shape)
        for index, inner in enumerate(self.layers):
            after = inner.signal_after(signal)
            own, *inside = walk(inner, f"layers/{index}")
            count = inner.num_parameters(signal.shape)
            rows.append((own[0], _without_children(inner), str(after.shape), count))
            rows += [(path, _without_children(part), "", None) for path, part in inside]
            signal = after
        return rows

    def _head(self) -> str:
        """The line above the layers."""
        return f"{self.input_shape} -> {self.output_shape}, {self.num_parameters:,} parameters"

    def __repr__(self) -> str:
        rows = [(*row[:3], "" if row[3] is None else f"{row[3]:,}") for row in self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            "  ".join(
                cell.rjust(width) if column == 3 else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n  ".join([f"Network: {self._head()}", *map(str.rstrip, lines)])

    def _repr_html_(self) -> str:
        total = max(self.num_parameters, 1)
        lines = [
            (*row[:3], *(("", "") if row[3] is None else (f"{row[3]:,}", f"{row[3] / total:.1%}")))
            for row in self._rows()
        ]
        head = "".join(f"<th>{name}</th>" for name in ("", "layer", "shape", "parameters", ""))
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
            for line in lines
        )
        return f"<b>Network {html.escape(self._head())}</b><table><tr>{head}</tr>{body}</table>"


def _checked_origin(origin: Any) -> tuple[tuple[str, str, float, float], ...]:
    """The rows as tuples; raises SpecError if they are not what from_flax writes."""
    try:
        rows = tuple((place, path, float(w), float(b)) for place, path, w, b in origin)
    except (TypeError, ValueError):
        rows = None
    if rows is None or not all(isinstance(text, str) for row in rows for text in row[:2]):
        cause = "not rows of two paths and two variances"
        raise problem(SpecError, "origin", origin, cause, "use Network.from_flax")
    return rows


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
    held = {path.partition("/")[0] for path in inner.children()} | {"layers", "shortcut"}
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
