"""A phase diagram of 512 x 512 networks with all depth scales, against a loop over scipy.

[Dense, tanh] and [Dense, relu], weight_var x bias_var, float64: q*, c*, three slopes, gradient
growth, status, and the critical line. The scipy loop solves every 51st row and column, 0.04 % of
the grid, by quad, dblquad and brentq: q*, chi_1, c* and its slope.

Run: ``python phase_speed.py``. The exit status is 1 when a claim is false.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Claim, Peer, compare, console, write_rows

SIZE, STRIDE = 512, 51
SECONDS = 5.0


def axes() -> tuple[np.ndarray, np.ndarray]:
    """The weight_var of the rows, the bias_var of the columns."""
    return np.linspace(0.5, 4.0, SIZE), np.linspace(0.0, 1.0, SIZE)


def part(values: np.ndarray) -> np.ndarray:
    """The cells that the loop solves."""
    return values[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def meanfield(activation: str) -> Callable[[], dict[str, Any]]:
    """The package."""
    import jax

    import meanfield_jax as mf

    block = mf.Sequential((mf.Dense(100), mf.Activation(activation)))
    weight_var, bias_var = axes()

    def solve() -> dict[str, Any]:
        with jax.enable_x64():
            grid = mf.phase_diagram(block, weight_var=weight_var, bias_var=bias_var)
        answer = np.stack([part(grid[name].values) for name in ("q", "c", "chi_1", "chi_c")])
        return dict(points=grid.q.size, answer=answer)

    return solve


def scipy_loop(activation: str) -> Callable[[], dict[str, Any]]:
    """Cell by cell: quad for the integrals, brentq for the roots."""
    from scipy.integrate import dblquad, quad
    from scipy.optimize import brentq

    if activation == "tanh":
        phi, slope = math.tanh, lambda x: 1 / math.cosh(x) ** 2
    else:
        phi, slope = lambda x: max(x, 0.0), lambda x: float(x > 0)

    def normal(x: float) -> float:
        return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    def mean(function: Any, q: float) -> float:
        def integrand(x: float) -> float:
            return function(math.sqrt(q) * x) ** 2 * normal(x)

        return sum(quad(integrand, *ends, epsabs=1e-10)[0] for ends in ((-8, 0), (0, 8)))

    def pair_mean(function: Any, q: float, c: float) -> float:
        std, rest = math.sqrt(q), math.sqrt(1 - c * c)

        def integrand(w: float, x: float) -> float:
            return function(std * x) * function(std * (c * x + rest * w)) * normal(x) * normal(w)

        return dblquad(integrand, -7, 7, -7, 7, epsabs=1e-5)[0]

    def cell(weight_var: float, bias_var: float) -> tuple[float, float, float, float]:
        try:
            q = brentq(lambda q: bias_var + weight_var * mean(phi, q) - q, 1e-9, 1e6)
        except ValueError:
            return (math.nan,) * 4
        chi_1 = weight_var * mean(slope, q)
        if chi_1 <= 1:
            return q, 1.0, chi_1, chi_1

        def gap(c: float) -> float:
            return (bias_var + weight_var * pair_mean(phi, q, c)) / q - c

        # next to the edge of chaos the bracket may hold no root
        c = brentq(gap, 0.0, 0.999, xtol=1e-4) if gap(0.0) > 0 > gap(0.999) else math.nan
        if math.isnan(c):
            return q, c, chi_1, c
        return q, c, chi_1, weight_var * pair_mean(slope, q, c)

    rows, columns = (part(axis) for axis in np.meshgrid(*axes(), indexing="ij"))

    def solve() -> dict[str, Any]:
        cells = [cell(*at) for at in zip(rows.ravel(), columns.ravel(), strict=True)]
        answer = np.array(cells).T.reshape(4, *rows.shape)
        return dict(points=len(cells), answer=answer)

    return solve


def main() -> int:
    """Measures, prints, writes results/phase_speed.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    rows, claims = [], []
    for activation in ("tanh", "relu"):
        setup = dict(activation=activation)
        peers = [
            Peer("meanfield_jax, float64", "phase_speed:meanfield"),
            Peer("scipy, a loop over 0.04 % of the grid", "phase_speed:scipy_loop", rounds=2,
                 timeout=600.0),
        ]  # fmt: skip
        compare(peers, setup, options.rounds if activation == "relu" else 2)
        ours, loop = peers
        answers = [peer.result.pop("answer") for peer in peers]
        off = float(np.nanmax(np.abs(answers[0][[0, 2]] - answers[1][[0, 2]])))
        # seconds a point: the loop's over ours
        records = [peer.record() for peer in peers]
        share = ours.result["points"] / loop.result["points"]
        ratio = (records[1]["warm_ratio"] or math.nan) * share
        warm = records[0]["warm_seconds"]
        compiling = records[0]["cold_seconds"] - warm
        console.print(f"{activation}: {warm:.2f} s warm, {compiling:.1f} s to compile, ",
                      f"scipy's loop takes {ratio:.0f} times as long a point", sep="")  # fmt: skip
        rows.append(dict(activation=activation, compile_seconds=compiling, ratio=ratio,
                         disagreement=off, peers=records))  # fmt: skip
        claims += [
            Claim(f"{activation}: seconds for 512 x 512, warm", warm, SECONDS, at_least=False),
            Claim(f"{activation}: points per second over scipy's loop, times", ratio, 100),
            Claim(f"{activation}: q* and chi_1 off from scipy's by", off, 1e-6, at_least=False),
        ]
    for claim in claims:
        console.print(f"{'holds' if claim.holds else 'FALSE'}: {claim.text} {claim.value:.3g}")
    write_rows("phase_speed", rows, claims=[claim.record() for claim in claims])
    return int(not all(claim.holds for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
