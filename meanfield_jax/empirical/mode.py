"""Whether a model is measured in the mode that was requested: training or evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
from jax.core import Tracer

from meanfield_jax.empirical.generic import couples_samples, differ
from meanfield_jax.empirical.model import never_calibrated
from meanfield_jax.errors import DataError, SpecError, problem

if TYPE_CHECKING:
    from meanfield_jax.empirical.fisher import FisherOperator

MODES = ("batch", "frozen")


def check_mode(
    op: FisherOperator, statistics: str, running: Any, moved: Callable[[], Any], remedy: str
) -> None:
    """Refuses a model that would be measured in a mode other than the one requested.

    Args:
        op: The operator of the model.
        statistics: The requested mode.
        running: The model's running statistics, any pytree.
        moved: Returns the function of the model with different running statistics.
        remedy: What the error recommends if the mode cannot be set.
    """
    leaves = jax.tree.leaves(running)
    if statistics == "batch":
        if leaves and op.num_samples < 2:
            cause = "BatchNorm has no variance on a single sample"
            raise problem(DataError, "x.shape", (1,), cause, "pass at least 2 samples")
        if leaves and couples_samples(op) is False:
            traced = any(isinstance(leaf, Tracer) for leaf in leaves)
            if traced or differ(op, op.replace(apply=moved())):
                cause = "the model uses running statistics whatever its mode"
                raise problem(SpecError, "statistics", statistics, cause, remedy)
        return
    if leaves and never_calibrated(running):
        cause = "the running statistics were never set"
        remedy = "call mf.calibrate(model, x) or train first, or use statistics='batch'"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
    if couples_samples(op):
        cause = "the model uses batch statistics whatever its mode"
        raise problem(SpecError, "statistics", statistics, cause, remedy)
