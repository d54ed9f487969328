"""How a computation ended: one list of codes for the whole package."""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np


class Status(IntEnum):
    """How a computation ended; results carry it as an integer array, since tracing cannot raise."""

    CONVERGED = 0
    """As asked for; of a theory: all numbers are finite and inside its domain."""
    MAX_STEPS = 1
    """The limit of steps came first."""
    NOT_FINITE = 2
    """NaN, inf or overflow."""
    MARGINAL = 3
    """A fixed point that attracts more slowly than exponentially or not at all: a slope is 1. Depth
    scales are infinite there and derivatives in the block's numbers do not exist."""
    NO_FIXED_POINT = 4
    """q grows without bound."""
    STALLED = 5
    """No step makes the objective smaller."""
    DIVERGED = 6
    """Training: the loss is not finite or 1000 times the first one. Tuning: the objective has no
    minimum nearby."""
    INDEPENDENT = 7
    """The objective does not depend on what is tuned."""
    FEW_DIRECTIONS = 8
    """A normalization over a batch that varies in too few directions: the mean over random weights
    of 1/variance is infinite."""
    CANCELLATION = 9
    """A batch so nearly constant that its variance is lost to rounding in this dtype."""
    NOT_RUN = 10
    """A run of a sweep that has not been made, or whose results are damaged."""

    @property
    def label(self) -> str:
        """In small letters, as results and tables show it."""
        return self.name.lower()


class Failure(NamedTuple):
    """The first run that failed.

    Attributes:
        status: How.
        cell: Its place among the runs.
        where: The same in words: " in cell (2, 0)", or nothing where there is but one run.
    """

    status: Status
    cell: tuple[int, ...]
    where: str


def first_failure(status: Any, *fine: Status) -> Failure | None:
    """The first of an array of statuses that is not among ``fine`` (CONVERGED), or None."""
    status = np.asarray(status)
    failed = np.argwhere(~np.isin(status, fine or (Status.CONVERGED,)))
    if len(failed) == 0:
        return None
    cell = tuple(failed[0].tolist())
    return Failure(Status(int(status[cell])), cell, f" in cell {cell}" if cell else "")
