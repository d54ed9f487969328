"""Codes for how a computation ended: one list for the whole package."""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np


class Status(IntEnum):
    """How a computation ended; an integer array in results, because traced code cannot raise."""

    CONVERGED = 0
    """The computation succeeded; for a theory, all numbers are finite and within its domain."""
    MAX_STEPS = 1
    """The maximum number of steps was reached first."""
    NOT_FINITE = 2
    """A number is NaN or infinite, or overflowed."""
    MARGINAL = 3
    """The fixed point attracts more slowly than exponentially, or not at all: a slope is 1. Depth
    scales are infinite there, and derivatives in the block's numbers do not exist."""
    NO_FIXED_POINT = 4
    """There is no fixed point: q grows without bound."""
    STALLED = 5
    """No step reduces the objective."""
    DIVERGED = 6
    """In training, the loss is not finite or 1000 times its first value. In tuning, the objective
    has no minimum nearby."""
    INDEPENDENT = 7
    """The objective does not depend on what is tuned."""
    FEW_DIRECTIONS = 8
    """A batch that is normalized over varies in too few directions: the mean of 1/variance over
    random weights is infinite."""
    CANCELLATION = 9
    """The batch is so nearly constant that its variance is lost to rounding in this dtype."""
    NOT_RUN = 10
    """The run of a sweep has not been made, or its results are damaged."""

    @property
    def label(self) -> str:
        """The name in lower case, as results and tables show it."""
        return self.name.lower()


class Failure(NamedTuple):
    """The first run that failed.

    Attributes:
        status: How it failed.
        cell: Its index among the runs.
        where: The same in words, " in cell (2, 0)", or "" if there is only one run.
    """

    status: Status
    cell: tuple[int, ...]
    where: str


def first_failure(status: Any, *fine: Status) -> Failure | None:
    """The first status in an array that is not in ``fine`` (by default CONVERGED), or None."""
    status = np.asarray(status)
    failed = np.argwhere(~np.isin(status, fine or (Status.CONVERGED,)))
    if len(failed) == 0:
        return None
    cell = tuple(failed[0].tolist())
    return Failure(Status(int(status[cell])), cell, f" in cell {cell}" if cell else "")
