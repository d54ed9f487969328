"""Checks, while tests run, that arrays have the shapes and dtypes that annotations declare.

Imported before the package, which itself knows nothing of the checks.
"""

from collections.abc import Callable
from typing import Any, get_args

from beartype import BeartypeConf, beartype
from jaxtyping import AbstractArray, install_import_hook

PACKAGES = ("meanfield_jax.kernel", "meanfield_jax.theory", "meanfield_jax.empirical")

# an int is a float, as for pyright
CHECK = beartype(conf=BeartypeConf(is_pep484_tower=True))


def start() -> None:
    """Checks every function and dataclass of these packages that is imported from now on."""
    install_import_hook(PACKAGES, "shape_checks.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with checks of the arrays among its arguments and results.

    All other types are left to pyright. So are functions inside functions, for which the checks
    would be compiled again in every call.
    """
    hints = function.__annotations__
    declared = {name: hint for name, hint in hints.items() if declares_shape(hint)}
    if not declared or "<locals>" in function.__qualname__:
        return function
    function.__annotations__ = declared
    return CHECK(function)


def declares_shape(hint: Any) -> bool:
    """Whether a type contains an array with a shape."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return True
    return any(map(declares_shape, get_args(hint)))
