"""What the tests of borders share: seeds, a limit on each try, and what counts as an answer."""

import contextlib
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import meanfield_jax as mf

SECONDS = float(os.environ.get("MEANFIELD_JAX_FUZZ_SECONDS", "3"))
FIRST = int(os.environ.get("MEANFIELD_JAX_FUZZ_SEED", "0"))
ONCE_FAILED: dict[str, tuple[int, ...]] = {}
"""By test, seeds that once failed."""

LONGEST = 60
"""The most seconds of a try, with all that it may have to compile."""

MOST_MEMORY = 2e9


class Reached(Exception):
    """Raised in place of a long computation: the arguments have passed all checks."""


class TooLong(BaseException):
    """Raised in a try that does not end; no handler of errors catches it."""


def draws(name: str) -> Iterator[tuple[int, random.Random]]:
    """Seeds in order, with random numbers from each, until the time is over; prints how many."""
    deadline, seed = time.monotonic() + SECONDS, FIRST
    for once in ONCE_FAILED.get(name, ()):
        yield once, random.Random(once)
    before = _memory()
    while time.monotonic() < deadline:
        yield seed, random.Random(seed)
        seed += 1
    count, most = seed - FIRST, _memory()
    print(f"{name}: {count} tried from seed {FIRST}, peak memory {most / 2**20:.0f} MiB", end="")
    print(f", {(most - before) / 2**20:.0f} of them here")
    assert most - before < MOST_MEMORY


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def answer(attempt: Callable[[], Any], what: str) -> Any:
    """What an attempt returns; None for an error of one line that the documentation names."""
    try:
        with time_limit():
            return attempt()
    except Reached:
        return Reached
    except (mf.SpecError, mf.DataError) as error:
        message = str(error)
        assert "\n" not in message, f"{what}: two lines: {message}"
        assert 10 < len(message) < 4000, f"{what}: {len(message)} characters: {message[:200]}"
        assert ": " in message, f"{what}: no cause: {message}"
        return None
    except BaseException as error:
        error.add_note(f"fuzz: {what}")
        raise


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Ends a try that does not end."""

    def end(*_):
        raise TooLong(f"it took more than {LONGEST} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
