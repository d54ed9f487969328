"""Seconds to tune a network through the theory: a first call, which compiles, and later ones.

The paper's network for a learning rate; it and a deep one for unit growth, one gamma for each of
its layers; the deep one as a Repeat too, where all layers share it. Every case runs in a process of
its own, in float64 as the command line does. Later calls start from other scales, so that nothing
but the compiled program is shared.

Run: ``python tune_speed.py [--rounds 5] [--quick]``. The exit status is 1 when a claim is false.
About 7 minutes on 2 busy cores, nearly all of it the compilation of 30 layers written out.
"""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from common import Claim, console, median, worker, write_rows
from summary import claims_table

PAPER, DEEP, REPEATED = "FC 784-1000x3-10", "FC 784-1000x30-10", "FC 1000-(1000)x30-10, Repeat"
CASES = {
    "learning rate": dict(network=PAPER, activation="relu", objective="target_eta_max"),
    "unit growth, gamma and beta": dict(
        network=PAPER, activation="relu", objective="unit_growth", over=("gamma", "beta")
    ),
    "unit growth, tanh": dict(network=PAPER, activation="tanh", objective="unit_growth"),
    "learning rate, 30 gammas": dict(network=DEEP, activation="relu", objective="target_eta_max"),
    "unit growth, 30 gammas": dict(network=DEEP, activation="tanh", objective="unit_growth"),
    "unit growth, one gamma": dict(network=REPEATED, activation="tanh", objective="unit_growth"),
}
QUICK = ("learning rate",)
LIMIT = 2.0
"""Seconds that tuning the paper's network may take."""


def tuning(
    network: str, activation: str, objective: str, over: Any = "gamma"
) -> Callable[[], dict[str, Any]]:
    """A call of ``mf.tune``, each time from another scale."""
    import jax

    import meanfield_jax as mf

    start = iter(range(100, 10_000))

    def spec(gamma: float) -> Any:
        norm = mf.BatchNorm(gamma=gamma)
        if network == REPEATED:
            block = mf.Sequential((mf.Dense(1000), norm, mf.Activation(activation)))
            return mf.Network((1000,), (mf.Repeat(block, 30), mf.Dense(10)))
        depth = 3 if network == PAPER else 30
        options = dict(inputs=784, outputs=10, norm=norm, activation=activation)
        return mf.mlp([1000] * depth, **options)

    goals = dict(
        target_eta_max=mf.objectives.target_eta_max(0.1), unit_growth=mf.objectives.unit_growth()
    )

    def solve() -> dict[str, Any]:
        with jax.enable_x64():
            tuned = mf.tune(spec(next(start) / 100), goals[objective], over=over)
            growth = float(mf.objectives.growth(tuned.after).max())
        return dict(
            status=tuned.status.label,
            steps=tuned.history.sizes["step"] - 1,
            reached=float(tuned.history.objective[-1]),
            eta_max=float(tuned.history.eta_max[-1]),
            largest_growth=growth,
        )

    return solve


def measured(name: str, rounds: int) -> dict[str, Any]:
    """One case, in a process of its own."""
    with worker("tune_speed:tuning", CASES[name]) as process:
        first = process.run(600)
        later = [process.run(600) for _ in range(rounds)]
        megabytes = process.peak_megabytes()
    seconds = [run["seconds"] for run in later]
    row = dict(
        case=name,
        **CASES[name],
        cold_seconds=first["seconds"],
        warm_seconds=median(seconds),
        megabytes=megabytes,
        all_warm_seconds=seconds,
        converged=all(run["status"] == "converged" for run in (first, *later)),
        **{key: value for key, value in first.items() if key != "seconds"},
    )
    console.print(
        f"{name:30s} {row['network']:30s} first {row['cold_seconds']:7.2f} s, later "
        f"{row['warm_seconds']:7.3f} s, {row['steps']} steps, {row['status']}",
        highlight=False,
    )
    return row


def claims(rows: list[dict[str, Any]]) -> list[Claim]:
    found = [Claim("cases that converged, of all", sum(r["converged"] for r in rows), len(rows))]
    for row in rows:
        if row["network"] == PAPER:
            text = f"{row['case']}, {PAPER}: seconds of a later call"
            found.append(Claim(text, row["warm_seconds"], LIMIT, at_least=False))
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    rows = [measured(name, options.rounds) for name in (QUICK if options.quick else CASES)]
    found = claims(rows)
    console.print(claims_table(dict(claims=[claim.record() for claim in found])).printed())
    if not options.quick:
        write_rows("tune_speed", rows, claims=[claim.record() for claim in found])
    return int(not all(claim.holds for claim in found))


if __name__ == "__main__":
    sys.exit(main())
