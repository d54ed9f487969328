"""Progress of long work on stderr: a bar on a terminal, occasional lines in a log."""

import itertools
import math
import sys
import time
from collections.abc import Iterable

import jax
from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

from meanfield_jax.experiments.watch import Picture
from meanfield_jax.layers.base import Signal
from meanfield_jax.network import Network

EVERY = 20.0
"""Seconds between two lines in a log."""


COMPILING, SPEED, STEP = 3.0, 2e10, 1e-3
"""Seconds of compiling a program, multiplications per second, seconds of a step: rough numbers of
a CPU, from which only the shares of a bar follow."""

PRODUCTS = 40
"""Passes through a network in a search for its largest eigenvalues."""


def seconds_of(network: Network, num_samples: int, passes: float, programs: float = 0) -> float:
    """A rough estimate of the time of passes over a batch, with the programs to be compiled."""
    signals = itertools.pairwise(network.body.signals(Signal(network.input_shape)))
    multiplications = sum(
        layer.num_parameters(before.shape) * math.prod(after.shape[:-1])
        for layer, (before, after) in zip(network.layers, signals, strict=True)
    )
    return COMPILING * programs + passes * num_samples * multiplications / SPEED


class Stages:
    """A bar over stages that take different times, each with an estimate of its own.

    Args:
        text: What is being done.
        seconds: The estimates, in the order of the stages.
        shown: Whether to show anything.
    """

    def __init__(self, text: str, seconds: Iterable[float], shown: bool):
        given = list(seconds)
        self._left = iter(given)
        columns = (SpinnerColumn(), TextColumn(text), BarColumn())
        self._bar = Bar(
            *columns,
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not shown,
            transient=True,
        )
        self._task = self._bar.add_task("", total=sum(given))

    def __enter__(self) -> "Stages":
        try:
            self._bar.start()
        except BaseException:  # Ctrl-C while the bar appears
            self._bar.stop()
            raise
        return self

    def __exit__(self, *problem) -> None:
        self._bar.stop()

    def finished(self) -> None:
        """Reports that the next stage is done."""
        self._bar.advance(self._task, next(self._left))


class Progress:
    """Shows how many runs are done, the rate per second, and the remaining time.

    Args:
        todo: Number of runs for this process to do now.
        total: Number of runs in the whole grid.
        shown: Whether to show how many.
        picture: What to show above; it stays on the terminal at the end.
    """

    def __init__(self, todo: int, total: int, shown: bool, picture: Picture | None = None):
        self._todo, self._total, self._done = todo, total, 0
        self._start = self._last = time.monotonic()
        self._shown = shown
        self._bar: Bar | None = None
        self._picture, console = picture, Console(stderr=True)
        if shown and console.is_terminal:
            columns = (MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
            self._bar = Bar(
                TextColumn("Training"),
                BarColumn(),
                *columns,
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=todo, rate="")
        parts = [part for part in (picture, self._bar) if part is not None]
        self._live = Live(Group(*parts), console=console, transient=True) if parts else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        if self._shown and self._todo < self._total:
            who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            self._say(f"{who}{self._todo} of {self._total} runs to be done here")
        return self

    def __exit__(self, *problem) -> None:
        if self._live is not None:
            self._live.stop()
            if self._picture is not None:
                self._live.console.print(self._picture)

    def advance(self, count: int) -> None:
        """Reports that this number of further runs is done."""
        self._done += count
        now = time.monotonic()
        rate = self._done / (now - self._start)
        if self._bar is not None:
            self._bar.update(self._task, advance=count, rate=f"{rate:.2g} runs/s")
        elif self._shown and (now - self._last > EVERY or self._done == self._todo):
            self._last = now
            left = (self._todo - self._done) / rate
            self._say(f"{self._done}/{self._todo} runs, {rate:.2g} runs/s, {left:.0f} s left")

    def _say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)
