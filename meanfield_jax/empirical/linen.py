"""Flax Linen modules as pure functions of their parameters."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from meanfield_jax.empirical.model import spread_over
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.pytree import pytree, static


@pytree(eq=False)
class Linen:
    """A Linen module as a pure function ``apply(params, x)``.

    Attributes:
        constants: Collections of variables that are not parameters, such as ``batch_stats``.
        arrays: Keyword arguments of the call that are arrays.
        module: The module.
        options: The other keyword arguments of the call.
    """

    constants: dict[str, Any]
    arrays: dict[str, Any]
    module: nn.Module = static()
    options: tuple[tuple[str, Any], ...] = static()

    def __call__(self, params: Any, x: Any) -> Any:
        """The module's outputs; dropout is off, and updates of its variables are discarded."""
        named = dict(self.options) | self.arrays
        arguments, keywords = spread_over(inspect.signature(self.module.__call__), x)
        with nn.intercept_methods(_without_dropout):
            outputs, _ = self.module.apply(
                {"params": params, **self.constants},
                *arguments,
                **keywords,
                **named,
                mutable=list(self.constants),
            )
        return outputs

    @property
    def running(self) -> Any:
        """The running statistics of BatchNorm layers."""
        return self.constants.get("batch_stats", {})

    def moved(self) -> "Linen":
        """The same function with different running statistics."""
        others = jax.tree.map(lambda leaf: 2 * leaf + 1, self.running)
        return dataclasses.replace(self, constants=self.constants | {"batch_stats": others})


def linen(module: Any, variables: Any, statistics: str, call: dict[str, Any]) -> tuple[Linen, Any]:
    """The module as a function in the requested mode.

    Returns:
        The function, and the parameters.

    Raises:
        SpecError: if it is not a Linen module, or the variables lack ``params``.
    """
    if not isinstance(module, nn.Module):
        cause, remedy = "not a Flax Linen module", "use fisher_operator for an NNX model"
        raise problem(SpecError, "module", type(module).__name__, cause, remedy)
    if not isinstance(variables, Mapping) or "params" not in variables:
        remedy = "pass what module.init or training returned: {'params': ..., ...}"
        given = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise problem(SpecError, "variables", given, "'params' is missing", remedy)
    constants = {name: tree for name, tree in variables.items() if name != "params"}
    training = statistics == "batch"
    modes = dict.fromkeys(("train", "training", "is_training"), training)
    modes |= dict(eval=not training, use_running_average=not training)
    modes |= dict(deterministic=True)
    known = inspect.signature(module.__call__).parameters
    named = {name: value for name, value in modes.items() if name in known} | call
    arrays = {name: value for name, value in named.items() if _has_arrays(value)}
    options = tuple((name, value) for name, value in named.items() if name not in arrays)
    return Linen(constants, arrays, module, options), variables["params"]


def _has_arrays(value: Any) -> bool:
    return any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(value))


def _without_dropout(
    function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], context: Any
) -> Any:
    if isinstance(context.module, nn.Dropout) and context.method_name == "__call__":
        return arguments[0] if arguments else keywords["inputs"]
    return function(*arguments, **keywords)
