"""The tables of the benchmarks, printed and as results/summary.md, all from the JSON records.

Run: ``python summary.py`` writes the file anew (the benchmarks do it themselves).
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from common import RESULTS, Claim, console, environment
from rich import box
from rich.markup import escape
from rich.table import Table

NAMES = ("fisher_lambda_max", "spectral_density", "theory_grid", "theory_on_data")
HEADER = """# Results

Written by `summary.py` from the JSON files in this folder. A ratio is a peer's time over
meanfield_jax's in calls made side by side: above 1, the package is faster. "Cold" is the first call
in a fresh process with imports done, compilation included; "warm" calls follow it. "Missed" marks
answers that are further off than the tolerance asked for.
"""


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, to be printed or written as Markdown."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def printed(self) -> Table:
        """For the console."""
        table = Table(*self.columns, title=escape(self.title), box=box.SIMPLE)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """For summary.md."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        return f"**{self.title}**\n\n{table}"


def lambda_max_tables(record: dict[str, Any]) -> list[Rows]:
    """One table a case."""
    columns = ("peer", "warm", "cold", "products", "relative error", "peak MB")
    tables = []
    for case in record["cases"]:
        rows = []
        for index, peer in enumerate(case["peers"]):
            cells = _failure(peer, len(columns)) or [
                peer["name"],
                *_ratios(peer, index, "warm_ratio", "cold_ratio"),
                str(peer["products"]),
                _error(peer["error"], record["tolerance"]),
                number(peer["megabytes"], ".0f"),
            ]
            rows.append(cells)
        title = f"{case['case']}: {case['title']}, lambda_max = {case['reference']['value']:.6g}"
        tables.append(Rows(title, columns, rows))
    return tables


def density_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of spectral_density.py."""
    columns = ("peer", "cold", "top Ritz value off by", "peak MB")
    rows = []
    for index, peer in enumerate(record["peers"]):
        cells = _failure(peer, len(columns)) or [
            peer["name"],
            *_ratios(peer, index, "cold_ratio"),
            f"{peer['error']:.1e}",
            number(peer["megabytes"], ".0f"),
        ]
        rows.append(cells)
    return [Rows(f"Network A, {record['num_steps']} steps", columns, rows)]


def grid_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of theory_grid.py."""
    columns = ("", "points per second, ours over it", "first call over a warm one", "differs by")
    rows = [
        [
            peer["name"],
            f"{peer['speed_ratio']:.3g}",
            f"{peer['compile_ratio']:.3g}",
            f"{peer['disagreement']:.1e}",
        ]
        for peer in record["peers"]
    ]
    return [Rows("eta_max and its gradient, FC with BatchNorm, gamma x weight_var", columns, rows)]


def batch_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of theory_on_data.py; here a ratio is a row's time over the first row's."""
    columns = ("", "warm, over the first row", "cold, over the first row", "peak MB")
    rows = [
        [
            peer["name"],
            *_ratios(peer, index, "warm_ratio", "cold_ratio"),
            number(peer["megabytes"], ".0f"),
        ]
        for index, peer in enumerate(record["peers"])
    ]
    return [Rows("FC 784-1000x4-10, spectrum, shares and order parameters", columns, rows)]


def rate_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of rates.py: measured over predicted, medians over draws."""
    columns = ("case", "momentum", "bounded", "no spike", "2 (1 + mu) / lambda_max", "caution")
    rows = [
        [
            row["case"],
            number(row["momentum"], "g"),
            number(row["bounded"], ".2f"),
            number(statistics.median(row["no_spike"]), ".2f"),
            number(row["quadratic"], ".3g"),
            row["domain"].partition(":")[0],
        ]
        for row in record["rows"]
    ]
    return [Rows("Measured boundary over the predicted rate", columns, rows)]


def resnet_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of resnet18.py; a first call, compiled programs included."""
    rows = [
        [
            peer["name"],
            number(peer["cold_ratio"], ".2f"),
            number(peer.get("value"), ".3f"),
            number(peer["megabytes"], ".0f"),
        ]
        for peer in record["peers"]
    ]
    return [Rows("Training mode", ("", "time over ours", "lambda_max", "peak MB"), rows)]


def adam_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of adam_rates.py."""
    rows = [
        [" ".join(map(str, row["network"])), row["data"], number(row["ratio"], ".2f")]
        for row in record["rows"]
    ]
    columns = ("layers, width, gamma, activation, norm", "data", "measured / predicted")
    return [Rows("Largest rate without a spike", columns, rows)]


TABLES = dict(
    fisher_lambda_max=("lambda_max of the Fisher matrix to 1e-4", lambda_max_tables),
    spectral_density=("Spectral density", density_tables),
    theory_grid=("Theory on a grid of 100,000 networks", grid_tables),
    theory_on_data=("Theory of a batch", batch_tables),
    resnet18=("lambda_max of a ResNet-18 on 512 images", resnet_tables),
    rates=("Learning rates from a random start", rate_tables),
    adam_rates=("Adam from a random start", adam_tables),
)


def claims_table(record: dict[str, Any]) -> Rows:
    """What is claimed and whether it held."""
    rows = [
        [
            claim["text"],
            number(claim["value"], ".3g"),
            f"{'at least' if claim['at_least'] else 'at most'} {claim['bound']:g}",
            "yes" if claim["holds"] else "NO",
        ]
        for claim in record["claims"]
    ]
    return Rows("Claims", ("claim", "measured", "bound", "holds"), rows)


def finish(name: str, body: dict[str, Any], claims: Sequence[Claim]) -> int:
    """Writes the record and summary.md, prints the tables, and returns the exit status."""
    verdicts = [claim.record() for claim in claims]
    record = dict(benchmark=name, environment=environment(), claims=verdicts, **body)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for table in (*TABLES[name][1](record), claims_table(record)):
        console.print(table.printed())
    write_summary()
    return 0 if all(claim.holds for claim in claims) else 1


def write_summary() -> None:
    """Reads what records there are and writes the tables."""
    parts = [HEADER]
    for name in NAMES:
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        title, tables = TABLES[name]
        parts.append(f"## {title}\n\n{_environment(record['environment'])}")
        parts += [table.markdown() for table in (*tables(record), claims_table(record))]
    (RESULTS / "summary.md").write_text("\n".join(parts))


def number(value: float | None, form: str) -> str:
    """The number, or a dash where nothing was measured."""
    return "-" if value is None else format(value, form)


def _failure(peer: dict[str, Any], width: int) -> list[str] | None:
    if "error" in peer:
        return None
    return [peer["name"], str(peer["failure"]), *[""] * (width - 2)]


def _ratios(peer: dict[str, Any], index: int, *keys: str) -> list[str]:
    return ["1" if index == 0 else number(peer[key], ".1f") for key in keys]


def _error(error: float, tolerance: float) -> str:
    return f"{error:.1e}" + ("" if error <= tolerance else " missed")


def _environment(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    machine = f"{facts['cores']} cores, {facts['cpu']}, {facts['memory_gib']} GiB"
    machine += f", load average {facts['load_average'][2]:g} over the last 15 minutes"
    return f"{machine}; Python {facts['python']}, {versions}.\n"


if __name__ == "__main__":
    sys.exit(write_summary())
