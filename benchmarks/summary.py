"""Writes results/summary.md from the JSON files beside it: ratios first, never typed by hand.

Run: ``python summary.py`` (the benchmarks do it themselves).
"""

import json
from collections.abc import Sequence
from typing import Any

from common import RESULTS

NAMES = ("fisher_lambda_max", "spectral_density", "theory_grid")
HEADER = """# Results

Written by `summary.py` from the JSON files in this folder. A ratio is a peer's time over
meanfield_jax's in calls made side by side: above 1, the package is faster. "Cold" is the first call
in a fresh process with imports done, compilation included; "warm" calls follow it.
"""


def write_summary() -> None:
    """Reads what results there are and writes the tables."""
    writers = dict(
        fisher_lambda_max=_lambda_max, spectral_density=_density, theory_grid=_theory_grid
    )
    parts = [HEADER]
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            parts += [*writers[name](record), _claims(record), _environment(record)]
    (RESULTS / "summary.md").write_text("\n".join(parts))


def _lambda_max(record: dict[str, Any]) -> list[str]:
    tolerance = record["tolerance"]
    parts = [f"## lambda_max of the Fisher matrix to {tolerance:g}\n"]
    for case in record["cases"]:
        parts.append(f"**{case['case']}: {case['title']}**\n")
        rows = [
            _lambda_max_row(peer, index == 0, tolerance) for index, peer in enumerate(case["peers"])
        ]
        columns = ("peer", "warm", "cold", "products", "relative error", "peak MB")
        parts.append(_table(columns, rows))
    return parts


def _lambda_max_row(peer: dict[str, Any], ours: bool, tolerance: float) -> list[str]:
    if "error" not in peer:
        return [peer["name"], str(peer["failure"]), "", "", "", ""]
    missed = "" if peer["error"] <= tolerance else " (missed)"
    return [
        peer["name"],
        "1" if ours else _number(peer["warm_ratio"], ".1f"),
        "1" if ours else _number(peer["cold_ratio"], ".1f"),
        str(peer["products"]),
        f"{peer['error']:.1e}{missed}",
        _number(peer["megabytes"], ".0f"),
    ]


def _density(record: dict[str, Any]) -> list[str]:
    rows = []
    for index, peer in enumerate(record["peers"]):
        if "error" not in peer:
            rows.append([peer["name"], str(peer["failure"])[:80], "", "", ""])
            continue
        ratios = [_number(peer[key], ".1f") for key in ("cold_ratio", "warm_ratio")]
        rows.append(
            [
                peer["name"],
                *(("1", "1") if index == 0 else ratios),
                f"{peer['error']:.1e}",
                _number(peer["megabytes"], ".0f"),
            ]
        )
    columns = ("peer", "cold", "warm", "top Ritz value off by", "peak MB")
    title = f"## Spectral density by {record['num_steps']} steps, network A\n"
    return [title, _table(columns, rows)]


def _theory_grid(record: dict[str, Any]) -> list[str]:
    rows = [
        [
            peer["name"],
            f"{peer['speed_ratio']:.3g}",
            f"{peer['compile_ratio']:.3g}",
            f"{peer['disagreement']:.1e}",
        ]
        for peer in record["peers"]
    ]
    columns = ("", "points per second, ours over it", "first call over a warm one", "differs by")
    return ["## eta_max and its gradient on a grid of 100,000 networks\n", _table(columns, rows)]


def _claims(record: dict[str, Any]) -> str:
    rows = [
        [
            claim["text"],
            _number(claim["value"], ".3g"),
            f"{'at least' if claim['at_least'] else 'at most'} {claim['bound']:g}",
            "yes" if claim["holds"] else "**no**",
        ]
        for claim in record["claims"]
    ]
    return _table(("claim", "measured", "bound", "holds"), rows)


def _environment(record: dict[str, Any]) -> str:
    facts = record["environment"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    machine = f"{facts['cores']} cores, {facts['cpu']}, {facts['memory_gib']} GiB"
    return f"{machine}; Python {facts['python']}, {versions}.\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


if __name__ == "__main__":
    write_summary()
