"""The outputs of all modules of a Flax NNX model, by path."""

import functools
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import array
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.combine import RepeatModule

ROOT = "/"
"""The path of the model itself, for an output that no module inside it produced."""


@checked(x=array)
def activations(model: nnx.Module, x: Array) -> dict[str, Array]:
    """The output of every module, by path, in the order of computation.

    A copy of the model is called in the model's current mode; the model's running statistics and
    random streams do not change. Functions in an ``nnx.Sequential`` or ``nnx.List`` count as
    modules, functions called by name inside a ``__call__`` do not. A module that only passes on
    what another one returned (a ``Sequential``) is not listed again. A module that is called
    several times is listed as ``path``, ``path#1``, ...; repetitions are numbered as in a theory,
    ``layers/2/block[0]/layers/1``. Outputs that are not a single array are left out.

    Args:
        model: Any Flax NNX module, from :func:`meanfield_jax.build` or your own.
        x: A batch of inputs.

    Returns:
        A dictionary from paths such as ``"layers/0"`` to outputs (samples, *positions, channels);
        ``"/"`` is the output of the model where its own ``__call__`` produced it.

    Raises:
        SpecError: if there is nothing to capture.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> found = mf.diagnostics.activations(model, x)
        >>> {path: value.shape for path, value in found.items()}
        {'layers/0': (100, 64), 'layers/1': (100, 64), 'layers/2': (100, 3)}
    """
    check_module(model)
    copy, log = nnx.clone(model), _Log()
    for _, module in list(nnx.iter_modules(copy)):
        if isinstance(module, nnx.List):
            _wrap_functions(module)
    for path, module in list(nnx.iter_modules(copy)):
        if callable(module):
            _listen(module, "/".join(map(str, path)) or ROOT, log)
    copy(x)  # pyright: ignore[reportCallIssue]
    log.last = None
    outputs = {}
    for path, module in nnx.iter_modules(copy):
        name = "/".join(map(str, path)) or ROOT
        for count, value in enumerate(_captured(module)):
            outputs[f"{name}#{count}" if count else name] = value, value.ndim - log.ranks[name]
    if not outputs:
        cause = "neither the model nor a module inside it returns an array"
        raise problem(SpecError, "model", type(model).__name__, cause, "return one array from each")
    order = {path: position for position, path in enumerate(log.ranks)}
    ordered = dict(sorted(outputs.items(), key=lambda item: order[item[0].partition("#")[0]]))
    return unrolled(ordered, repeated_paths(model))


def check_module(model: Any) -> None:
    """Raises SpecError unless the model is a Flax NNX module that can be called."""
    if not isinstance(model, nnx.Module):
        remedy = "pass one, such as mf.build(network, rngs=nnx.Rngs(0))"
        raise problem(SpecError, "model", type(model).__name__, "not a Flax NNX module", remedy)
    if not callable(model):
        cause = "the module has no __call__"
        raise problem(SpecError, "model", type(model).__name__, cause, "define one that maps x")


def repeated_paths(model: nnx.Module) -> list[str]:
    """The paths of blocks whose variables have a leading axis over their repetitions."""
    modules = nnx.iter_modules(model)
    paths = ["/".join(map(str, path)) for path, one in modules if isinstance(one, RepeatModule)]
    return sorted(f"{path}/block".lstrip("/") for path in paths)


def blocks_around(path: str, repeated: list[str]) -> list[str]:
    """The repeated blocks that contain a path, the outermost first."""
    return [block for block in repeated if f"{path}/".startswith(f"{block}/")]


def unrolled(values: dict[str, tuple[Array, int]], repeated: list[str]) -> dict[str, Array]:
    """Splits the leading axes that repetitions have added to some arrays.

    Args:
        values: By path, the array and the number of such axes.
        repeated: Paths of the repeated blocks. The number of a repetition is appended to the
            block's path, or to the whole path where the blocks do not account for all axes.

    Returns:
        One array for each repetition, with all modules of one repetition listed together.
    """
    first: dict[str, int] = {}
    rows: list[tuple[Any, str, Array]] = []
    for position, (path, (value, extra)) in enumerate(values.items()):
        blocks = blocks_around(path, repeated)
        start = first.setdefault(blocks[0], position) if blocks and extra else position
        for index in np.ndindex(value.shape[:extra]):
            numbers = "".join(f"[{number}]" for number in index)
            name = _numbered(path, blocks, index) if len(blocks) == extra else path + numbers
            rows.append(((start, index, position), name, value[index]))
    return {name: value for _, name, value in sorted(rows, key=lambda row: row[0])}


def _numbered(path: str, blocks: list[str], index: tuple[int, ...]) -> str:
    """The path with the number of the repetition after each block, the innermost first."""
    for block, number in reversed(list(zip(blocks, index, strict=True))):
        path = f"{block}[{number}]{path.removeprefix(block)}"
    return path


CAPTURED = "_captured_outputs"


class _Captured(nnx.Variable):
    """What a module returned, a tuple over its calls; as a Variable it also survives a scan."""


class _Function(nnx.Module):
    """A function wrapped as a module, so that its output has a path."""

    def __init__(self, function):
        self.function = function

    def __call__(self, *args, **options):
        return self.function(*args, **options)


class _Log:
    """What Python saw while the model was called.

    Attributes:
        ranks: Number of axes of each output as its module returned it, in order of computation.
        last: The output that was returned last.
    """

    def __init__(self):
        self.ranks: dict[str, int] = {}
        self.last: Any = None


def _captured(module: nnx.Module) -> tuple[Array, ...]:
    """What the module has returned so far."""
    return getattr(module, CAPTURED).get_value() if hasattr(module, CAPTURED) else ()


def _wrap_functions(modules: nnx.List) -> None:
    for index, inner in enumerate(modules):
        if callable(inner) and not isinstance(inner, nnx.Module):
            modules[index] = nnx.data(_Function(inner))


def _listen(module: Any, path: str, log: _Log) -> None:
    """Makes this module, but not its class, record what it returns."""
    module.__class__ = _listening(type(module))
    module._log_of_outputs, module._path_in_model = log, path


@functools.cache
def _listening(cls: type) -> type:
    """A subclass whose calls are recorded."""

    def call(self, *args, **options):
        output = cls.__call__(self, *args, **options)
        log = self._log_of_outputs
        if isinstance(output, jax.Array) and output is not log.last:
            log.ranks.setdefault(self._path_in_model, output.ndim)
            log.last = output
            # a repeated block returns what its last repetition returned
            if not issubclass(cls, RepeatModule):
                setattr(self, CAPTURED, _Captured((*_captured(self), output)))
        return output

    return type(cls.__name__, (cls,), {"__call__": call})
