"""The tables of the benchmarks, from the JSON records, for the console and for the documentation.

``docs/render.py`` writes them into the pages of the documentation.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from typing import Any

from common import RESULTS, Claim, console, environment
from rich import box
from rich.markup import escape
from rich.table import Table

MODES = {"batch": "training", "frozen": "evaluation", "": "-"}


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table, to be printed or written as Markdown; a title of "" is left out."""

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
        """For a page of the documentation."""
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        table = "".join("| " + " | ".join(line) + " |\n" for line in lines)
        return (f"**{self.title}**\n\n" if self.title else "") + table


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


def accuracy_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of accuracy.py."""
    columns = "network", "mode", "predicted", "measured", "ratio", "as published / measured"
    rows = [
        [
            row["network"],
            MODES[row["mode"]],
            f"{row['predicted']:.2f}",
            f"{row['measured']:.2f} ± {row['standard_error']:.2f}",
            f"{row['ratio']:.4f}",
            f"{row['published_ratio']:.3f}" if row["mode"] else "-",
        ]
        for row in record["rows"]
    ]
    return [Rows("", columns, rows)]


def data_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of real_data.py: predicted / measured."""
    columns = "images, network", "mode", "outliers", "eigenvalues 2 to 6", "trace", "goals missed"
    rows = [
        [
            f"{row['case']}, n = {row['num_samples']}",
            MODES[row["mode"]],
            f"{row['ratios'][0]:.3f} ± {row['relative_errors'][0]:.3f}",
            " ".join(f"{ratio:.2f}" for ratio in row["ratios"][1:]),
            f"{row['trace_ratio']:.3f}",
            ", ".join(name for name, holds in row["holds"].items() if not holds) or "none",
        ]
        for row in record["rows"]
    ]
    return [Rows("", columns, rows)]


def boundary_tables(record: dict[str, Any]) -> list[Rows]:
    """The one table of training_boundary.py."""
    columns = (
        *("images, network", "gamma", "start", "predicted"),
        *("measured, by draw", "ratio", "within 10 %"),
    )
    rows = [
        [
            row["case"],
            f"{row['gamma']}",
            "near" if row["residual"] < 1 else "random",
            f"{row['predicted']:.4g}",
            " ".join(f"{value:.4g}" for value in row["measured"]),
            f"{row['ratio']:.3f}",
            "yes" if row["holds"] else "no",
        ]
        for row in record["rows"]
    ]
    return [Rows("", columns, rows)]


TABLES = dict(
    accuracy=("Outliers of the Fisher matrix", accuracy_tables),
    real_data=("Spectra on real images", data_tables),
    training_boundary=("Where training blows up", boundary_tables),
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
    """Writes the record, prints the tables, and returns the exit status."""
    verdicts = [claim.record() for claim in claims]
    record = dict(benchmark=name, environment=environment(), claims=verdicts, **body)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    for table in (*TABLES[name][1](record), claims_table(record)):
        console.print(table.printed())
    return 0 if all(claim.holds for claim in claims) else 1


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


def machine(facts: dict[str, Any]) -> str:
    """The machine and the versions of a run, in one sentence."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if number)
    where = f"{facts['cores']} cores, {facts['cpu']}, {facts['memory_gib']} GiB"
    where += f", load average {facts['load_average'][2]:g} over the last 15 minutes"
    return f"{where}; Python {facts['python']}, {versions}."
