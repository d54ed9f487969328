"""Checks of single values, and the form in which the package works with them.

What can only mean one thing is accepted: a NumPy number or an array without axes where a number is
wanted. Values that are being traced are not known and pass.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.limits import within

MOST_UNITS = 2**63 - 1
"""The largest width, or other integer of a layer."""

LARGEST = 2**31 - 1
"""The largest integer of JAX's default type; sizes that are computed in Python may be larger."""

BYTES_OF_ITEM = 1000.0
"""Memory of an item of a sequence, with what is made of it."""

MOST_LEVELS = 100
"""The most containers inside each other in a pytree; Python allows a thousand calls."""

MOST_LABELS = 5
"""Labels outside the outputs that a message shows."""


def plain(value: Any) -> Any:
    """NumPy numbers, and arrays without axes, as numbers of Python; others as :func:`native`."""
    if not isinstance(value, (np.generic, np.ndarray)):
        return value
    if value.ndim:
        return native(np.asanyarray(value))
    if isinstance(value, np.ma.MaskedArray):
        return value.filled(np.nan).item() if value.dtype.kind == "f" else value
    # half precision stays as it is, because the theory refuses it
    if value.dtype.kind == "f" and value.itemsize > 2:
        return float(value)
    return value.item() if value.dtype.kind in "biu" else value


def whole(argument: str, value: Any, least: int | None = None, most: int = LARGEST) -> Any:
    """An integer in this range, or a traced one; raises SpecError for anything else."""
    if isinstance(value, Tracer):
        return value
    if isinstance(value, Array) and value.ndim == 0 and is_number(value):
        found: Any = value.item()
        found = int(found) if np.isfinite(found) and found % 1 == 0 else found
    else:
        found = plain(value)
    bound = "" if least is None else f" of at least {least}"
    if isinstance(found, bool) or not isinstance(found, int) or (bound and found < (least or 0)):
        kind = "a positive integer" if least == 1 else f"an integer{bound}"
        raise problem(SpecError, argument, value, f"must be an integer{bound}", f"pass {kind}")
    if abs(found) > most:
        raise problem(SpecError, argument, value, "too large", f"pass at most {most}")
    return found


def number(argument: str, value: Any) -> Any:
    """A real number, an array of them, or a traced one; raises SpecError for anything else."""
    if isinstance(value, Tracer):
        return value
    found = plain(value)
    if not is_number(found):
        raise problem(SpecError, argument, value, "must be a number", "pass a float")
    if isinstance(found, int) and abs(found) > MOST_UNITS:
        raise problem(SpecError, argument, value, "too large", "pass a float")
    # JAX's integers have 32 bits, and overflow silently
    if isinstance(found, (int, np.ndarray)) and np.asarray(found).dtype.kind in "iu":
        return found if np.all(np.abs(found) <= LARGEST) else found * 1.0
    return found


def is_number(value: Any) -> bool:
    """Whether a value is a real number or an array of them."""
    if isinstance(value, (np.ndarray, np.generic, Array)):
        known, kinds = jax_dtype(value.dtype), (jnp.integer, jnp.floating)
        return known is not None and any(jnp.issubdtype(known, kind) for kind in kinds)
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def jax_dtype(dtype: Any) -> Any:
    """The dtype of JAX for the numbers of an array: other orders of bytes and long doubles change.

    Files in formats such as FITS and IDX give arrays in the other order.

    Returns:
        None for dtypes that JAX does not have or does not compute with: objects, texts, dates,
        records, keys, integers of four bits.
    """
    if not isinstance(dtype, np.dtype) or dtype.kind == "T":  # keys, texts
        return None
    if dtype.kind in "iufc":
        for longest in (np.dtype(float), np.dtype(complex)):
            if dtype.kind == longest.kind and dtype.itemsize > longest.itemsize:
                dtype = longest
        dtype = dtype.newbyteorder("=")
    try:
        jnp.promote_types(dtype, jnp.float32)
    except (TypeError, ValueError):
        return None
    return dtype


def native(values: np.ndarray) -> np.ndarray:
    """The same numbers in a dtype of JAX; what has none stays as it is."""
    found = jax_dtype(values.dtype)
    return values if found is None else values.astype(found, copy=False)


def scalar(argument: str, value: Any) -> Any:
    """A single real number, or a traced one."""
    found = number(argument, value)
    if np.ndim(found):
        raise problem(SpecError, argument, np.shape(found), "must be one number", "pass a float")
    return found


def numbers(argument: str, value: Any) -> Any:
    """A number, or a sequence of numbers as an array."""
    if isinstance(value, (list, tuple, range)):
        items = enumerate(sequence(argument, value))
        return np.array([scalar(f"{argument}[{i}]", item) for i, item in items], float)
    return number(argument, value)


def truth(argument: str, value: Any) -> bool:
    """True or False; raises SpecError for anything else."""
    found = plain(value)
    if not isinstance(found, bool):
        raise problem(SpecError, argument, value, "must be a boolean", "pass True or False")
    return found


def path(argument: str, value: Any) -> Any:
    """A path as text or as an object of pathlib."""
    if not isinstance(value, (str, os.PathLike)) or "\0" in os.fspath(value):
        raise problem(SpecError, argument, value, "must be a path", "pass a str or a pathlib.Path")
    return value


def function(argument: str, value: Any) -> Any:
    """Anything that can be called."""
    if not callable(value):
        raise problem(SpecError, argument, value, "cannot be called", "pass a function")
    return value


def sequence(argument: str, value: Any) -> Any:
    """A sequence or a one-dimensional array."""
    flat = isinstance(value, (np.ndarray, Array)) and value.ndim == 1
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if not (flat or listed):
        raise problem(SpecError, argument, value, "must be a sequence", "pass a list or a tuple")
    try:
        length = len(value)
    except OverflowError:  # of a range
        length = math.inf
    within("MEMORY", argument, value, BYTES_OF_ITEM * length)
    return value


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raises SpecError unless value is one of the choices."""
    if not isinstance(value, str) or value not in choices:
        raise problem(SpecError, argument, value, "unknown", f"use one of {', '.join(choices)}")


def check_data(x: Any, name: str = "x") -> Array:
    """The inputs as a floating-point array; raises DataError if they cannot be used."""
    x = array(name, x)
    if x.ndim < 2 or x.shape[0] == 0:
        remedy = "pass (samples, features) or (samples, height, width, channels)"
        raise problem(DataError, f"{name}.shape", x.shape, "not a batch", remedy)
    if x.dtype not in (jnp.float32, jnp.float64):
        remedy = f"convert it with {name}.astype('float32')"
        raise problem(
            DataError, f"{name}.dtype", str(x.dtype), "must be float32 or float64", remedy
        )
    check_finite(name, x)
    return x


def array(name: str, value: Any) -> Array:
    """The value as a JAX array of real numbers; raises DataError for anything else."""
    found = value if isinstance(value, Array) else _from_numpy(name, value)
    if found is None or jax_dtype(found.dtype) is None:
        remedy = "pass one"
        raise problem(DataError, name, type(value).__name__, "not an array of numbers", remedy)
    if jnp.issubdtype(found.dtype, jnp.complexfloating):
        remedy = "pass real numbers"
        raise problem(DataError, f"{name}.dtype", str(found.dtype), "complex", remedy)
    return found


def _from_numpy(name: str, value: Any) -> Array | None:
    """What NumPy can read as a JAX array; None if there are no numbers."""
    _check_length(name, value)
    if value is None or isinstance(value, np.ma.MaskedArray):
        return None
    try:
        given = np.asarray(value)
        if jax_dtype(given.dtype) is None:
            return None
        # a constant stays one under jit, so that its values can be checked
        with jax.ensure_compile_time_eval():
            return jnp.asarray(native(given))
    except (TypeError, ValueError, OverflowError):
        return None


def check_tree(argument: str, tree: Any, is_leaf: Callable[[Any], bool]) -> None:
    """Raises DataError for a pytree that is too deep, too large, or has keys that JAX cannot sort.

    Args:
        argument: The argument, for messages.
        tree: Any value.
        is_leaf: Tells which nodes are not looked into.
    """
    level, count, depth, given = [tree], 1, 0, type(tree).__name__
    remedy = "pass a dictionary of arrays"
    while level:
        try:
            parts = [
                jax.tree_util.default_registry.flatten_one_level(node)
                for node in level
                if not is_leaf(node)
            ]
        except (TypeError, ValueError) as error:  # keys that cannot be sorted
            cause = f"JAX cannot take it apart ({' '.join(str(error).split())[:200]})"
            raise problem(DataError, argument, given, cause, remedy) from None
        level = [child for part in parts if part is not None for child in part[0]]
        count, depth = count + len(level), depth + 1
        within("MEMORY", argument, given, BYTES_OF_ITEM * count)
        if depth > MOST_LEVELS:
            cause = f"containers are nested more than {MOST_LEVELS} deep"
            raise problem(DataError, argument, given, cause, remedy)


def _check_length(name: str, value: Any) -> None:
    """Raises SpecError if sequences in sequences would make too long an array."""
    waiting, items = [value], 0
    while waiting:
        given = waiting.pop()
        if isinstance(given, (list, tuple, range)):
            items += len(sequence(name, given))
            within("MEMORY", name, value, BYTES_OF_ITEM * items)
            waiting += [] if isinstance(given, range) else given


def check_finite(name: str, values: Array) -> None:
    """Raises DataError if known values are not finite."""
    if isinstance(values, Tracer):
        return
    # NumPy computes at once even where everything else is being traced
    if count := int((~np.isfinite(np.asarray(values))).sum()):
        remedy = "remove or replace these values"
        raise problem(DataError, name, f"{count} values", "NaN or infinite", remedy)


def targets(name: str, y: Any, num_samples: int, num_outputs: int, dtype: Any) -> Array:
    """Labels or targets as targets.

    Args:
        name: The argument, for messages.
        y: Integer labels (n,), or targets (n, C).
        num_samples: n.
        num_outputs: C.
        dtype: The dtype of the inputs.

    Returns:
        The targets (n, C): those given, or 1 at the label and 0 elsewhere.

    Raises:
        DataError: if the shape does not fit, or for labels outside 0 to C - 1.
    """
    y = array(name, y)
    if y.shape == (num_samples, num_outputs):
        check_finite(name, y)
        return y.astype(dtype)
    if y.shape != (num_samples,):
        remedy = f"pass integer labels ({num_samples},) or targets ({num_samples}, {num_outputs})"
        raise problem(
            DataError, f"{name}.shape", y.shape, "fits neither labels nor targets", remedy
        )
    check_finite(name, y)
    if not (isinstance(y, Tracer) or np.all(np.asarray(y) % 1 == 0)):
        remedy = f"pass integer labels, or targets ({num_samples}, {num_outputs})"
        raise problem(DataError, name, str(y.dtype), "labels must be integers", remedy)
    check_labels(name, y, num_outputs)
    return jax.nn.one_hot(y.astype(int), num_outputs, dtype=dtype)


def check_labels(name: str, labels: Array, num_outputs: int) -> None:
    """Raises DataError if known labels are outside 0 to C - 1."""
    if isinstance(labels, Tracer) or labels.size == 0:
        return
    values = np.asarray(labels)
    outside = np.unique(values[(values < 0) | (values >= num_outputs)])
    if outside.size == 0:
        return
    listed = ", ".join(f"{label:g}" for label in outside[:MOST_LABELS])
    cause = f"labels {listed}{', ...' * (outside.size > MOST_LABELS)} are outside 0 to "
    cause += f"{num_outputs - 1}, the range of {num_outputs} outputs"
    from_one = values.min() == 1 and values.max() == num_outputs
    remedy = "subtract 1" if from_one else "correct them, or use a network with more outputs"
    ends = f"{values.min():g} to {values.max():g}"
    raise DataError(f"{name}={ends}: {cause}; {remedy}")


def pair(argument: str, value: Any) -> Any:
    """Inputs and labels, a tuple or list of two."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value
    remedy = "pass (inputs, labels)"
    raise problem(DataError, argument, type(value).__name__, "must be a pair", remedy)


def mapping(argument: str, value: Any) -> Any:
    """A mapping whose keys are text."""
    if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise problem(SpecError, argument, value, "must be a mapping from names", "pass a dict")
    return value


def names(argument: str, value: Any) -> Any:
    """A text, or a list or tuple of texts."""
    texts = [value] if isinstance(value, str) else value
    if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)):
        raise problem(SpecError, argument, value, "must be names", "pass a str or a list of str")
    return value
