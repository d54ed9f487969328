"""The heat map of a sweep in a terminal, drawn while it fills."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.segment import Segment
from rich.style import Style

from meanfield_jax.experiments.diagram import axes_of, color_range, last_of, results_of, text_of
from meanfield_jax.experiments.store import Region, SweepStore

if TYPE_CHECKING:
    import xarray as xr

LEVELS = 64
"""Steps of the colour scale; the codes of what has no value follow."""
DIVERGED, MISSING, ODD, BLANK = range(LEVELS, LEVELS + 4)

OTHERS = {DIVERGED: "#ffffff", MISSING: "#6c6c6c", ODD: "#d7afff"}
MARK = "#8a8a8a"
"""The colour of the letters on cells that diverged."""
LETTERS = {DIVERGED: "x", MISSING: ".", ODD: "?", BLANK: " "}
"""Where there are no colours; steps of the scale are digits."""
SAID = {DIVERGED: "diverged", MISSING: "not computed yet", ODD: "not finite"}

WIDEST, HIGHEST = 3, 2
"""The most letters, and halves of lines, that a cell takes."""
FREE = 6
"""Lines for what is around the cells, and for the bar below."""


def picture_of(store: SweepStore) -> Picture | None:
    """The picture of a sweep, or, where stderr is not a terminal, a line that says so, and None."""
    if Console(stderr=True).is_terminal:
        return Picture(store.dataset())
    print("the heat map is not drawn, because stderr is not a terminal", file=sys.stderr)


class Picture:
    """A sweep over the axes of :func:`plot_sweep`; Rich prints it.

    Two cells are one letter, a block of half a line's height, if the terminal has 256 colours or
    more; else a cell is a digit from 0 (lowest) to 9.

    Args:
        dataset: The results that are known; those of further chunks are added in place.
    """

    def __init__(self, dataset: xr.Dataset):
        self._dataset = dataset
        self._across, self._upwards, self._others = axes_of(dataset)
        self._at = dict.fromkeys(self._others, 0)
        self._key: tuple[int, int, str | None] | None = None
        self._segments: list[Segment] = []

    def add(self, region: Region, results: Mapping[str, np.ndarray]) -> None:
        """Adds a chunk; of axes that are not drawn, its first values are shown from now on."""
        for name, values in results.items():
            self._dataset[name].values[region] = values
        axes = list(self._dataset.diverged_at.dims)
        self._at = {name: region[axes.index(name)].start for name in self._others}
        self._key = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines, which are drawn anew only after a chunk or in another size."""
        system = None if options.ascii_only else console.color_system
        key = (options.max_width, console.size.height, system)
        if key != self._key:
            # first, because a chunk may come in another thread while it is drawn
            self._key = key
            self._segments = list(Segment.simplify(self._drawn(*key)))
        yield from self._segments

    def _drawn(self, width: int, height: int, colors: str | None) -> list[Segment]:
        """The title, the cells with their values at the left, the horizontal axis, the legend."""
        colored = colors in ("256", "truecolor")
        dataset = self._dataset.isel(self._at).sortby(self._across)
        codes, ends = self._codes(dataset)
        labels = [""] if self._upwards is None else [f"{v:.3g}" for v in self._heights(dataset)]
        margin = max(map(len, labels)) + 1
        columns = _places(codes.shape[1], max(1, width - margin - 1), WIDEST)
        room = max(1, height - FREE)
        rows = _places(len(codes), room * (1 + colored), HIGHEST if colored else 1)
        cells = codes[::-1][rows][:, columns]
        labels = [labels[::-1][row] for row in rows]
        if colored:
            # a line of two rows; where one cell has several lines, the first has its value
            if len(cells) % 2:
                cells = np.concatenate([cells, np.full_like(cells[:1], BLANK)])
            pairs, labels, rows = zip(cells[::2], cells[1::2], strict=True), labels[::2], rows[::2]
            half = functools.cache(_half)  # not for longer: a style keeps the codes of a console
            lines = [[half(a, b) for a, b in zip(*pair, strict=True)] for pair in pairs]
        else:
            lines = [[Segment("".join(map(_letter, row)))] for row in cells]
        value = results_of(dataset)[0]
        name = dataset[value].attrs.get("long_name", value)
        where = text_of({axis: float(dataset[axis]) for axis in self._others})
        axes = " and ".join(filter(None, (self._across, self._upwards)))
        title = f"{name} after {dataset.sizes['epoch']} epochs over {axes}"
        found = [Segment(", ".join(filter(None, (title, where)))), Segment.line()]
        for index, line in enumerate(lines):
            first = index == 0 or rows[index] != rows[index - 1]
            found += [Segment(f"{labels[index] if first else '':>{margin - 1}} "), *line]
            found.append(Segment.line())
        return [
            *found,
            *self._below(dataset, margin, len(columns)),
            *_legend(cells, ends, colored),
        ]

    def _codes(self, dataset: xr.Dataset) -> tuple[np.ndarray, tuple[float, float] | None]:
        """The step of the scale or the code of each cell, bottom row first; the scale's ends."""
        if self._upwards is not None:
            dataset = dataset.sortby(self._upwards)
        shown = last_of(dataset)
        runs = dataset.diverged_at
        seeds = [name for name in runs.dims if name not in shown.dims]
        dims = [name for name in (self._upwards, self._across) if name is not None]
        values, bad, missing = (
            np.atleast_2d(array.transpose(*dims).values)
            for array in (shown, (runs >= 0).any(seeds), (runs == -2).any(seeds))
        )
        codes, ends = np.full(values.shape, ODD), color_range(values)
        fine = np.isfinite(values)
        if ends is not None:
            low, high = np.log(ends)
            level = (np.log(np.maximum(values[fine], ends[0])) - low) / ((high - low) or 1)
            codes[fine] = np.clip(level * (LEVELS - 1), 0, LEVELS - 1).round()
        else:
            codes[fine] = 0
        codes[missing] = MISSING
        codes[bad] = DIVERGED
        return codes, ends

    def _heights(self, dataset: xr.Dataset) -> np.ndarray:
        return np.sort(dataset[self._upwards].values)

    def _below(self, dataset: xr.Dataset, margin: int, count: int) -> list[Segment]:
        """The ends of the horizontal axis, below the first and the last cell."""
        low, high = (f"{value:.3g}" for value in dataset[self._across].values[[0, -1]])
        text = f"{low}{high:>{max(count - len(low), len(high) + 1)}}"
        return [Segment(" " * margin + text), Segment.line()]


def _legend(cells: np.ndarray, ends: tuple[float, float] | None, colored: bool) -> list[Segment]:
    """What the colours or letters mean that are there."""
    found = []
    if ends is not None:
        scale = np.linspace(0, LEVELS - 1, 10).astype(int)
        low, high = (f"{end:.3g}" for end in ends)
        bar = [_half(code, code) for code in scale] if colored else [Segment("0 to 9")]
        found += [Segment(f"{low} "), *bar, Segment(f" {high} or more   ")]
    for code, said in SAID.items():
        if (cells == code).any():
            mark = _half(code, code) if colored else Segment(LETTERS[code])
            found += [mark, Segment(f" {said}   ")]
    return [*found, Segment.line()]


def _places(count: int, room: int, most: int) -> np.ndarray:
    """The cell at each place of a row that has room for so many letters."""
    if count > room:
        return np.arange(room) * count // room
    return np.repeat(np.arange(count), min(most, room // count))


def _letter(code: int) -> str:
    return LETTERS.get(code) or str(math.floor(10 * code / LEVELS))


@functools.cache
def _color(code: int) -> Color | None:
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if code < LEVELS:
        return Color.parse(to_hex(colormaps["viridis"](code / (LEVELS - 1))))
    return Color.parse(OTHERS[code]) if code in OTHERS else None


def _half(above: int, below: int) -> Segment:
    """Two cells in one letter."""
    if above == below:
        mark = LETTERS[DIVERGED] if above == DIVERGED else " "
        return Segment(mark, Style(color=MARK, bgcolor=_color(above)))
    return Segment("▀", Style(color=_color(above), bgcolor=_color(below)))
