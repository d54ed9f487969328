"""How far two numbers may be apart: one function, by the kind of error and the dtype."""

from typing import Any

import numpy as np

KINDS = {
    "rounding": "arithmetic of this dtype, a few hundred operations in sequence",
    "printed": "digits given in print: one unit of the last one",
    "difference": "a central first difference against a derivative",
    "second_difference": "a central second difference against a second derivative",
    "edge": "a derivative next to correlation 1, where square roots of rounding errors appear",
    "quadrature": "the documented accuracy of the Gaussian quadrature",
    "quadrature_edge": "the same with kinks and correlations up to .999",
    "monte_carlo": "a mean over draws against its expectation, of relative O(1/width)",
}
ROUNDING = 512.0
DIFFERENCE = 64.0
QUADRATURE, QUADRATURE_EDGE = 1e-10, 1e-5


def tolerance(
    kind: str,
    scale: Any = 1.0,
    *,
    dtype: Any = np.float64,
    printed: str | None = None,
    standard_error: Any = 0.0,
    width: float = np.inf,
) -> Any:
    """The largest difference that the kind of error explains, in the units of ``scale``.

    Args:
        kind: One of ``KINDS``.
        scale: Size of the numbers the result is made of, which cancellation may leave far above
            the result.
        dtype: In which the less exact side was computed.
        printed: For ``"printed"``: the number as text.
        standard_error: For ``"monte_carlo"``: of the mean; four of them are allowed.
        width: For ``"monte_carlo"``: the smallest width; finite size costs up to ``3 scale/width``.
    """
    scale = np.abs(np.asarray(scale, np.float64))
    eps = float(np.finfo(dtype).eps)
    match kind:
        case "rounding":
            return ROUNDING * eps * scale
        case "printed":
            assert printed is not None
            return 1.01 * unit_of_last_digit(printed)
        case "difference":
            return DIFFERENCE * eps ** (2 / 3) * scale
        case "second_difference" | "edge":
            return DIFFERENCE * eps ** (1 / 2) * scale
        case "quadrature_edge":
            return max(QUADRATURE_EDGE, ROUNDING * eps) * scale
        case "quadrature":
            return max(QUADRATURE, ROUNDING * eps) * scale
        case "monte_carlo":
            return 4 * np.asarray(standard_error) + 3 * scale / width
    raise ValueError(f"kind={kind!r}: unknown; use one of {', '.join(KINDS)}")


def unit_of_last_digit(text: str) -> float:
    """One unit in the last place of a printed number: 1e-3 of "2.345", 1e-6 of "2.345e-3"."""
    mantissa, _, exponent = text.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals)


def assert_close(actual: Any, expected: Any, kind: str, scale: Any = None, **options: Any) -> None:
    """Fails where ``actual`` and ``expected`` differ by more than :func:`tolerance` allows.

    Args:
        actual: An array; NaN and infinity fail.
        expected: Of a shape that broadcasts to it.
        kind: One of ``KINDS``.
        scale: As in :func:`tolerance`; None: the size of ``expected``, entry by entry.
        **options: As in :func:`tolerance`.
    """
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert np.shape(actual) == np.broadcast_shapes(np.shape(actual), np.shape(expected))
    allowed = tolerance(kind, expected if scale is None else scale, **options)
    allowed = np.broadcast_to(allowed, actual.shape)
    difference = np.abs(actual - expected)
    wrong = ~(difference <= allowed)
    if wrong.any():
        excess = np.nan_to_num(difference / (allowed + 1e-300), nan=np.inf, posinf=np.inf)
        worst = int(np.argmax(np.where(wrong, excess, 0)))
        place = tuple(int(index) for index in np.unravel_index(worst, actual.shape))
        expected = np.broadcast_to(expected, actual.shape)
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.size} differ by more than {kind} allows; at {place}: "
            f"{actual[place]:.9g} against {expected[place]:.9g}, off by {difference[place]:.3e}, "
            f"allowed {allowed[place]:.3e}"
        )


def assert_printed(actual: Any, printed: str) -> None:
    """Fails unless ``actual`` agrees with a list of printed numbers, separated by spaces."""
    words = printed.split()
    values = np.ravel(np.asarray(actual, np.float64))
    assert len(words) == values.size, f"{len(words)} numbers for {values.size} values"
    for value, word in zip(values, words, strict=True):
        assert_close(value, float(word), "printed", printed=word)


def standard_error(draws: Any) -> Any:
    """Of the mean over the leading axis."""
    draws = np.asarray(draws, np.float64)
    return draws.std(0, ddof=1) / np.sqrt(draws.shape[0])
