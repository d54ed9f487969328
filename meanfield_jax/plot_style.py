"""How pictures look, in one place: figures, colours, symbols, letters of panels, curves."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from meanfield_jax.layers.base import norm_layers

if TYPE_CHECKING:
    import xarray as xr
    from matplotlib.figure import Figure

# the colours of Okabe & Ito, which colour-blind readers can distinguish
COLOR = {"batch": "#0072B2", "frozen": "#D55E00", "wei2019": "#009E73", "vanilla": "#555555"}
LABEL = {
    "batch": "theory, training mode",
    "frozen": "theory, evaluation mode",
    "wei2019": "as published (Wei et al. 2019)",
}
LINE = {"batch": "-", "frozen": "-", "wei2019": "--"}
# the same colours with black and grey, for the networks without a norm and with each of nine
NORM_COLORS = (
    "#777777",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#000000",
    "#E69F00",
    "#8F7A00",
    "#882255",
)
MARKERS = "os^Dv<>pXh"

POINT = dict(mfc="white", ms=6)
"""A measured value."""
ETA_MAX, LAMBDA_MAX, GAMMA = r"$\eta_{\max}$", r"$\lambda_{\max}$", r"$\gamma$"


def picture(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, which a notebook shows without pyplot."""
    return _picture_class()(figsize=(width, height), layout="constrained")


@functools.cache
def _picture_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class Picture(Figure):
        """A figure that is its own picture."""

        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png", dpi=110)
            return file.getvalue()

    return Picture


def letters(panels: Iterable[Any]) -> None:
    """Writes a, b, c ... at the top left corners of several panels."""
    panels = list(panels)
    for axes, letter in zip(panels, "abcdefghij", strict=False):
        if len(panels) > 1:
            at = dict(xycoords="axes fraction", xytext=(-26, 7), textcoords="offset points")
            axes.annotate(letter, (0, 1), weight="bold", annotation_clip=False, **at)


def cased(width: float) -> dict[str, Any]:
    """Options of a line that stays visible on any colour: it has a white border."""
    from matplotlib.patheffects import Normal, Stroke

    return dict(lw=width, path_effects=[Stroke(linewidth=width + 1.8, foreground="w"), Normal()])


def styles_of_norms(names: Sequence[str]) -> list[dict[str, Any]]:
    """Colour and marker of each of these norms: the same for a norm in every picture.

    Args:
        names: Names of norms as :func:`meanfield_jax.compare` uses them; a name of another kind
            gets what is left.

    Returns:
        Options of matplotlib's lines, in the order of the names.
    """
    fixed = {name: index for index, name in enumerate(("none", *norm_layers()))}
    used = {fixed.get(str(name)) for name in names}
    free = itertools.cycle([i for i in range(len(NORM_COLORS)) if i not in used] or [0])
    indices = [fixed[name] if name in fixed else next(free) for name in map(str, names)]
    return [dict(color=NORM_COLORS[i % 10], marker=MARKERS[i % 10]) for i in indices]


def smooth(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A smooth curve through the points, for logarithmic axes.

    Args:
        x: Positive numbers, all different.
        y: Positive numbers, or NaN, where there is no curve.

    Returns:
        Points of the monotone cubic interpolation of log y over log x; fewer than three points, or
        points that are not positive, as they are.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    known = np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 3 or min(x.min(), y.min()) <= 0:
        return x, y
    from scipy.interpolate import PchipInterpolator

    order = np.argsort(x)
    log_x, log_y = np.log(x[order]), np.log(y[order])
    between = np.unique(np.concatenate([log_x, np.linspace(log_x[0], log_x[-1], 200)]))
    return np.exp(between), np.exp(PchipInterpolator(log_x, log_y)(between))


def scale_of(*values: xr.DataArray) -> str:
    """A logarithmic axis, if it can show any of these values."""
    return "log" if any(bool((array > 0).any()) for array in values) else "linear"
