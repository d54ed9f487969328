"""Errors caused by a user's input; they name the argument, its value, the cause and the remedy."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer


class SpecError(ValueError):
    """A network specification, or an option of an analysis, cannot be used as given."""


class DataError(ValueError):
    """A data set is missing, damaged, or of the wrong shape or type."""


def problem(error: type[ValueError], argument: str, value: object, cause: str, remedy: str):
    """Builds an error whose single line names the argument, its value, the cause and the remedy."""
    return error(f"{argument}={value!r}: {cause}; {remedy}")


def check_data(x: Any) -> Array:
    """The inputs as a floating-point array; raises DataError if they cannot be used."""
    given, x = x, jnp.asarray(x)
    if x.ndim < 2 or x.shape[0] == 0:
        remedy = "pass (samples, features) or (samples, height, width, channels)"
        raise problem(DataError, "x.shape", x.shape, "not a batch", remedy)
    if x.dtype not in (jnp.float32, jnp.float64):
        remedy = "convert it with x.astype('float32')"
        raise problem(DataError, "x.dtype", str(x.dtype), "must be float32 or float64", remedy)
    # NumPy computes at once even where everything else is being traced
    known = not isinstance(given, Tracer)
    if known and (count := int((~np.isfinite(np.asarray(given))).sum())):
        remedy = "remove or replace these values"
        raise problem(DataError, "x", f"{count} values", "NaN or infinite", remedy)
    return x


def check_choice(argument: str, value: Any, choices: Sequence[str]) -> None:
    """Raises SpecError unless value is one of the choices."""
    if value not in choices:
        raise problem(SpecError, argument, value, "unknown", f"use one of {', '.join(choices)}")
