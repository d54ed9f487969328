"""A model's run on traced inputs, in which every layer of Flax is one equation with its path."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.tree_util import tree_flatten_with_path

from meanfield_jax.conversion.modules import (
    KNOWN,
    REFUSED,
    Part,
    by_path,
    linen_part,
    nnx_part,
)
from meanfield_jax.empirical.linen import linen
from meanfield_jax.empirical.model import call_with, in_mode, path_name
from meanfield_jax.errors import SpecError, problem

MARK = "meanfield_jax/"
"""What the names of the functions that stand for layers start with."""


class Recording(NamedTuple):
    """What a run showed.

    Attributes:
        jaxpr: The run as a function of all parameters and the inputs, in this order.
        names: Paths of the parameters.
        parts: The layers of Flax, by path.
        params: The model's parameters, by path.
    """

    jaxpr: Any
    names: list[str]
    parts: dict[str, Part]
    params: dict[str, Array]


def record(model: Any, x: Any, call: Any) -> Recording:
    """Runs the model once on traced inputs.

    Args:
        model: An NNX module, a Linen module, or a pair of a Linen module and its variables.
        x: Inputs; only their shapes and dtypes count.
        call: As in ``fisher_operator`` for NNX, as in ``FisherOperator.from_linen`` for Linen.

    Returns:
        The recording.

    Raises:
        SpecError: if the model is none of these, or contains a layer that has no theory.
    """
    x = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), x)
    if isinstance(model, nnx.Module):
        return _record_nnx(model, x, call)
    module, variables = model if isinstance(model, tuple) and len(model) == 2 else (model, None)
    if isinstance(module, nn.Module):
        return _record_linen(module, variables, x, call or {})
    cause, remedy = "not a Flax model", "pass an NNX module, a Linen module, or (module, variables)"
    raise problem(SpecError, "model", type(model).__name__, cause, remedy)


def _record_nnx(model: nnx.Module, x: Any, call: Any) -> Recording:
    parts: dict[str, Part] = {}
    model = in_mode(model, "batch")
    own = {"/".join(map(str, path)): inner for path, inner in nnx.iter_modules(model)}
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)

    def run(state: Any, rest: Any, x: Any) -> Any:
        copy = nnx.merge(graphdef, state, rest, copy=True)
        paths = {id(inner): "/".join(map(str, path)) for path, inner in nnx.iter_modules(copy)}
        with _watched(paths, own, parts):
            return (call or call_with)(copy, x)

    return _traced(run, (state, rest), x, parts, state)


@contextlib.contextmanager
def _watched(paths: dict[int, str], own: dict[str, Any], parts: dict[str, Part]) -> Generator[None]:
    """Inside it, every call of an NNX layer is one equation; all is as before afterwards."""
    classes: list[Any] = [cls for cls in vars(nnx).values() if _is_layer(cls)]
    originals = {cls: cls.__call__ for cls in classes}
    depth = [0]

    def watching(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(self))
            if path is None or depth[0]:
                return original(self, *args, **kwargs)
            check_layer(path, kind)
            check_inputs(path, kind, args[0], [*args[1:], *kwargs.values()])
            depth[0] += 1
            try:
                out = original(self, *args, **kwargs)
            finally:
                depth[0] -= 1
            _add(parts, path, nnx_part(path, kind, own[path], args[0].ndim > 2))
            return _marked(path, args[0], out)

        return call

    try:
        for cls, original in originals.items():
            cls.__call__ = watching(cls.__name__, original)
        yield
    finally:
        for cls, original in originals.items():
            cls.__call__ = original


def _is_layer(cls: Any) -> bool:
    known = isinstance(cls, type) and cls.__name__ in KNOWN | REFUSED.keys()
    return known and "__call__" in vars(cls)


def _record_linen(module: nn.Module, variables: Any, x: Any, call: dict[str, Any]) -> Recording:
    parts: dict[str, Part] = {}
    if variables is None:
        named = linen(module, {"params": {}}, "batch", call)[0]
        options = dict(named.options) | named.arrays
        init = jax.jit(lambda x: module.init(jax.random.key(0), x, **options))
        variables = init(jax.tree.map(lambda leaf: jnp.zeros((1, *leaf.shape[1:]), leaf.dtype), x))
    function, params = linen(module, variables, "batch", call)
    depth = [0]

    def intercept(original: Any, args: tuple[Any, ...], kwargs: Any, context: Any) -> Any:
        inner, kind = context.module, type(context.module).__name__
        known = kind in KNOWN | REFUSED.keys() and type(inner).__module__.startswith("flax.")
        if context.method_name != "__call__" or not known or depth[0]:
            return original(*args, **kwargs)
        path = "/".join(inner.path)
        check_layer(path, kind)
        value, *others = *args, *kwargs.values()
        check_inputs(path, kind, value, others)
        depth[0] += 1
        try:
            out = value if kind == "Dropout" else original(*args, **kwargs)
        finally:
            depth[0] -= 1
        own = variables["params"]
        for name in inner.path:
            own = own.get(name, {})
        _add(parts, path, linen_part(path, inner, own, value.ndim > 2))
        return _marked(path, value, out)

    def run(params: Any, constants: Any, x: Any) -> Any:
        with nn.intercept_methods(intercept):
            return module.apply(
                {"params": params, **constants},
                x,
                **dict(function.options),
                **function.arrays,
                mutable=list(constants),
            )[0]

    return _traced(run, (params, function.constants), x, parts, params)


def check_layer(path: str, kind: str) -> None:
    """Raises SpecError if there is no theory of this class of Flax."""
    if kind in REFUSED:
        remedy = "measure the model with mf.fisher_operator(model, x)"
        raise problem(SpecError, path, kind, f"{REFUSED[kind]} has no theory", remedy)


def check_inputs(path: str, kind: str, x: Any, others: list[Any]) -> None:
    """Raises SpecError if a layer is given other arrays than its inputs, such as a mask."""
    given = [other for other in others if isinstance(other, Array) and other is not x]
    if given and kind != "Dropout":
        cause = "a layer of several arrays, such as a mask or keys of attention, has no theory"
        remedy = "measure the model with mf.fisher_operator(model, x)"
        raise problem(SpecError, path, kind, cause, remedy)


def _add(parts: dict[str, Part], path: str, part: Part) -> None:
    if path in parts:
        cause = "the layer is used twice, and weights that are shared have no theory"
        remedy = "measure the model with mf.fisher_operator(model, x)"
        raise problem(SpecError, path, part.kind, cause, remedy)
    parts[path] = part


def _marked(path: str, x: Array, out: Array) -> Array:
    """An array of the shape of ``out`` that depends on ``x`` through one named equation."""

    def stand_in(x: Array) -> Array:
        return jnp.zeros(out.shape, out.dtype) + jnp.sum(x).astype(out.dtype)

    stand_in.__name__ = MARK + path
    return jax.jit(stand_in)(x)


def _traced(
    run: Callable[..., Any], given: tuple[Any, Any], x: Any, parts: dict[str, Part], params: Any
) -> Recording:
    shapes = jax.eval_shape(lambda *trees: trees, *given)
    try:
        jaxpr = jax.make_jaxpr(run)(*shapes, x)
    except SpecError:
        raise
    except Exception as error:  # it is anyone's model
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        remedy = "pass inputs that the model takes; see call= for its other arguments"
        raise problem(SpecError, "model", "its call failed", cause, remedy) from error
    named, _ = tree_flatten_with_path(shapes)
    names = [path_name(path[1:]).removesuffix("/value") for path, _ in named]
    return Recording(jaxpr, names, parts, by_path(params))
