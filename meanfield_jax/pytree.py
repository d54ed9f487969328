"""Frozen dataclasses as pytrees: the one way in which this package makes its classes."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, dataclass_transform, overload

import jax
from jax.tree_util import GetAttrKey

T = TypeVar("T")


def static(
    *,
    default: Any = dataclasses.MISSING,
    least: int | None = None,
    choices: Sequence[str] | None = None,
    keyword: bool = False,
) -> Any:
    """A field that describes structure: part of the pytree's definition, not one of its leaves.

    Args:
        default: Its default value.
        least: The smallest value of an integer.
        choices: The values of a text.
        keyword: Whether it is given by keyword only.

    Returns:
        The field.
    """
    allowed = dict(least=least) if choices is None else dict(choices=choices)
    metadata = dict(static=True) | allowed
    return dataclasses.field(default=default, metadata=metadata, kw_only=keyword)


@overload
def pytree(cls: type[T], /, *, eq: bool = True, repr: bool = True) -> type[T]: ...
@overload
def pytree(*, eq: bool = True, repr: bool = True) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(static, dataclasses.field))
def pytree(cls: Any = None, /, *, eq: bool = True, repr: bool = True) -> Any:
    """Makes a class a frozen dataclass and a pytree, whose leaves are all but its static fields.

    A rebuilt object does not pass through ``__post_init__``, so that checks run once, on what a
    user passes, and never on tracers. ``jax.tree_util.register_dataclass`` is not used because
    jaxlib 0.10 takes the structures of two such classes to be equal whenever they have as many
    fields, so that jit could run the program of one for the other.

    Args:
        cls: The class; None to give options.
        eq: Whether objects are compared by their fields.
        repr: Whether they are printed by their fields.

    Returns:
        The class.
    """
    if cls is None:
        return functools.partial(pytree, eq=eq, repr=repr)
    cls = dataclasses.dataclass(frozen=True, eq=eq, repr=repr)(cls)
    fields = dataclasses.fields(cls)
    meta = [field.name for field in fields if field.metadata.get("static")]
    data = [field.name for field in fields if field.name not in meta]
    keys = [GetAttrKey(name) for name in data]

    def flatten(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(value, name) for name in data], tuple(getattr(value, n) for n in meta)

    def flatten_with_keys(value: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children, structure = flatten(value)
        return list(zip(keys, children, strict=True)), structure

    def unflatten(structure: tuple[Any, ...], children: Any) -> Any:
        value = object.__new__(cls)
        for name, part in zip([*meta, *data], [*structure, *children], strict=True):
            object.__setattr__(value, name, part)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls
