"""Bounds on the work that one call may ask for, checked before anything is allocated."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.memory import memory_of

if TYPE_CHECKING:
    from meanfield_jax.layers.base import Layer

LIMITS = dict(
    OPERATIONS=(1e5, "layers written out and positions of convolution windows"),
    DEPTH=(1e6, "layers one after the other"),
    STEPS=(1e9, "steps one after the other"),
    MEMORY=(None, "bytes"),
)
"""By kind, the largest amount (None: the memory of the devices) and its unit.

The environment variable ``MEANFIELD_JAX_MAX_<kind>`` replaces a limit.
"""

LITTLE = 1e6
"""Bytes that are always there, for which no device is asked: asking would start JAX's backend."""

MAX_NESTING = 24
"""Levels of layers inside layers; Python allows a thousand calls inside each other."""

SCAN = 3
"""Levels that a Repeat counts for, since the scan in which it runs takes more calls."""


def within(
    kind: str,
    argument: str,
    value: object,
    needed: float,
    error: type[ValueError] = SpecError,
) -> None:
    """Raises an error if a call would need more than the limit of this kind.

    Args:
        kind: A key of ``LIMITS``.
        argument: The argument that asks for the work.
        value: Its value.
        needed: The estimated amount.
        error: The class of the error.
    """
    default, unit = LIMITS[kind]
    limit = limit_set(kind)
    limit = default if limit is None else limit
    if limit is None and needed < LITTLE:
        return
    limit = memory_of(jax.local_devices()) if limit is None else limit
    if needed > limit:
        cause = f"takes {_amount(needed)} {unit}, above the limit of {_amount(limit)}"
        raise problem(error, argument, value, cause, f"ask for less, or {how_to_raise(kind)}")


def limit_set(kind: str) -> float | None:
    """The limit of this kind that the environment sets; raises SpecError if it is not a number."""
    variable = f"MEANFIELD_JAX_MAX_{kind}"
    given = os.environ.get(variable)
    try:
        return float(given) if given else None
    except ValueError:
        raise problem(SpecError, variable, given, "not a number", "set it, e.g., to 1e9") from None


def how_to_raise(kind: str) -> str:
    """The end of a message about a limit."""
    return f"set the environment variable MEANFIELD_JAX_MAX_{kind} to raise it"


def _amount(number: float) -> str:
    # integers of Python may be too large for a float
    return f"{number:.3g}" if number < 1e300 else "over 1e300"


class Size(NamedTuple):
    """The size of some layers.

    Attributes:
        operations: Layers written out and positions of convolution windows.
        depth: Layers one after the other, with all their repetitions.
        nesting: Levels of layers inside layers.
    """

    operations: int
    depth: int
    nesting: int


def check_structure(layers: Iterable["Layer"]) -> None:
    """Raises SpecError if layers are too many or too deeply nested to be worked with.

    A layer that occurs in several places is looked at once, and nothing here calls itself: layers
    may be nested a thousand times, or be a few objects that stand for 2^40.
    """
    given = tuple(layers)
    known: dict[int, Size] = {}
    waiting: list[Any] = list(given)
    while waiting:
        layer = waiting[-1]
        inside = layer.children().values()
        missing = [inner for inner in inside if id(inner) not in known]
        if missing and id(layer) not in known:
            waiting += missing
            continue
        waiting.pop()
        known[id(layer)] = _size(layer, [known[id(inner)] for inner in inside])
    total = _total([known[id(layer)] for layer in given])
    within("OPERATIONS", "layers", len(given), total.operations)
    within("DEPTH", "layers", len(given), total.depth)
    if total.nesting > MAX_NESTING:
        cause = f"layers are nested more than {MAX_NESTING} deep (Repeat counts {SCAN})"
        raise problem(SpecError, "layers", total.nesting, cause, "write them side by side")


def _total(sizes: list[Size]) -> Size:
    return Size(
        sum(size.operations for size in sizes),
        sum(size.depth for size in sizes),
        max((size.nesting for size in sizes), default=0),
    )


def _size(layer: "Layer", inside: list[Size]) -> Size:
    total, times = _total(inside), getattr(layer, "times", 1)
    return Size(
        layer.kernel_size**2 + total.operations,
        max(1, total.depth) * times,
        total.nesting + (SCAN if hasattr(layer, "times") else 1),
    )
