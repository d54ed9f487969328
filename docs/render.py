"""Writes the results of the benchmarks into the pages of the documentation.

A page has a comment ``<!-- result: NAME -->``, or ``<!-- result: NAME PART -->``; what stands
between it and ``<!-- end of result -->`` is made from ``benchmarks/results/NAME.json``. Run
``python docs/render.py`` after a benchmark; the tests fail while a page and a result differ.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy.io import netcdf_file

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
sys.path.append(str(ROOT / "benchmarks"))  # last, so that no name of another module is hidden

from summary import TABLES, Rows, claims_table, machine, number  # noqa: E402

MARKED = re.compile(r"(<!-- result: (.+?) -->).*?(<!-- end of result -->)", re.DOTALL)
PAGES = sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "theory").glob("*.md")])


def mark(holds: bool) -> str:
    """Yes or no."""
    return "yes" if holds else "no"


def claims(record: dict[str, Any]) -> list[Rows]:
    """What was claimed, what was found, and whether it holds, in any of the records' forms."""
    listed = record.get("claims") or record["rows"]
    if "bound" in listed[0]:
        table = claims_table(dict(claims=listed))
        return [Rows("", table.columns, table.rows)]
    names = [name for name in ("case", "text", "claim", "numbers") if name in listed[0]]
    rows = [[*(str(row[name]) for name in names), mark(row["holds"])] for row in listed]
    words = {"text": "claim", "numbers": "found"}
    return [Rows("", [*(words.get(name, name) for name in names), "holds"], rows)]


def figure1(record: dict[str, Any]) -> list[Rows]:
    """lambda_max over gamma, measured and predicted."""
    measured = [f"measured, {mode}" for mode in ("training", "evaluation")]
    ratios = [f"theory / {name}" for name in measured]
    names = [measured[0], ratios[0], measured[1], ratios[1], "as published / measured, training"]
    rows = [
        [row["case"], row["gamma"]]
        + [number(row.get(name), ".4g" if name in measured else ".3f") for name in names]
        for row in record["rows"]
    ]
    return [Rows("", ["images, network", "gamma", *names], rows)]


def figure2(record: dict[str, Any]) -> list[Rows]:
    """The boundary that training showed, over the predicted ones."""
    names = {
        "measured": "measured",
        "measured / batch": "/ training mode",
        "measured / frozen": "/ evaluation mode",
        "measured / wei2019": "/ as published",
        "best rate": "best rate",
        "best / batch": "best / eta_max",
    }
    rows = [
        [row["case"], f"{row['gamma']:g}"]
        + [number(row[name], ".2f" if "/" in name else ".3g") for name in names]
        for row in record["rows"]
    ]
    return [Rows("", ["images, network", "gamma", *names.values()], rows)]


def domain(record: dict[str, Any]) -> list[Rows]:
    """lambda_max of single draws over the predicted one, inside and outside of the domain."""
    rows = []
    for inputs, title in (("gaussian", "Gaussian inputs"), ("mnist", "MNIST images")):
        for inside in (True, False):
            found = [
                row
                for row in record["rows"]
                if row["inputs"] == inputs and row["within_domain"] is inside
            ]
            draws = [ratio for row in found for ratio in row["excess"]]
            cells = [f"{min(draws):.3f} to {max(draws):.3f}"]
            wide = [1 / statistics.median(row["excess"]) for row in found]
            for ratios in (wide, [row["drawn_ratio"] for row in found]):
                near = sum(abs(ratio - 1) <= 0.2 for ratio in ratios) / len(ratios)
                cells.append(f"{statistics.median(ratios):.2f}, {near:.0%}")
            rows.append([title, mark(inside), str(len(found)), *cells])
    columns = (
        *("inputs", "within_domain", "networks", "single draws / theory"),
        *("theory / measured: median, within 20 %", "drawn / measured: median, within 20 %"),
    )
    return [Rows("", columns, rows)]


def finite_width(record: dict[str, Any]) -> list[Rows]:
    """lambda_max at the width of a network, by theory and by drawn networks."""
    rows = [
        [
            row["network"],
            mark(row["within_domain"]),
            f"{row['wide_ratio']:.2f}",
            f"{row['drawn_ratio']:.2f}",
            f"{row['inside']:.0%}",
            f"{row['one_draw_warm_s']:.2g}",
        ]
        for row in record["rows"]
    ]
    columns = ("network", "in its domain", "theory", "drawn", "inside", "seconds a draw")
    return [Rows("", columns, rows)]


def rate_groups(record: dict[str, Any]) -> list[Rows]:
    """Measured over predicted rates from a random start, by kind of network."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in record["rows"]:
        groups.setdefault((_kind(row["case"]), row["momentum"]), []).append(row)
    rows = []
    for (kind, momentum), group in sorted(groups.items()):
        starts = [ratio for row in group for ratio in row["no_spike"]]
        fresh = [loss for row in group for loss in row["largest_at_no_spike"]]
        rows.append(
            [
                kind,
                f"{momentum:g}",
                str(len(group)),
                _range(starts, ".2f"),
                _range([row["bounded"] for row in group], ".2f"),
                f"{sum(loss >= 2 for loss in fresh)} of {len(fresh)}",
                _range([row["quadratic"] for row in group], ".3g"),
            ]
        )
    columns = ("networks", "momentum", "cases", "no_spike", "bounded", "spikes", "quadratic")
    return [Rows("", columns, rows)]


def _kind(case: str) -> str:
    """The group of a case of rate_cases.py."""
    first, norm, *rest = case.removeprefix("residual ").split()
    if case.startswith("residual"):
        return "residual, " + ("final norm" if "final" in rest else "no final norm")
    if case.startswith("conv"):
        return "convolutions"
    if norm == "none":
        return "no norm"
    if norm == "PN" or "tanh" in rest or ("gelu" in rest and rest[0] == "0.5"):
        return "tanh, ProxyNorm, GELU at gamma 0.5"
    if rest[0] in ("0.1", "0.25"):
        return "BatchNorm, gamma 0.1 and 0.25"
    if norm != "BN":
        return "LayerNorm, GroupNorm"
    depth = int(first.partition("x")[0])
    return f"BatchNorm, {'2 to 8' if depth < 10 else '10' if depth == 10 else '20 and 30'} layers"


def _range(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def tuning(record: dict[str, Any]) -> list[Rows]:
    """Training losses before and after tuning, medians over seeds."""
    rows = []
    for row in record["rows"]:
        best = min(statistics.median(losses) for losses in row["losses"])
        own, default = (statistics.median(row[name]) for name in ("own", "default"))
        cells = [f"{v:.2f}" if v < float("inf") else "diverges" for v in (own, default)]
        name = f"{row['case']}, {row['variant']}"
        rows.append([name, f"{best:.2f}", f"{row['rate']:.2g}", *cells])
    columns = ("network", "loss at its best rate", "recommended", "loss there", "loss at 0.1")
    return [Rows("", columns, rows)]


def tuning_seconds(record: dict[str, Any]) -> list[Rows]:
    """Seconds of a descent."""
    rows = [
        [
            *(row["case"], row["network"], str(row["steps"])),
            *(f"{row['warm_seconds']:.2g}", f"{row['cold_seconds']:.0f}"),
        ]
        for row in record["rows"]
    ]
    return [Rows("", ("goal", "network", "steps", "seconds", "first call, seconds"), rows)]


def sweep_speed(record: dict[str, Any]) -> list[Rows]:
    """Runs per second, vmapped and one by one."""
    rows = [
        [row["case"], row["name"], number(speed, ".3g"), number(row["warm_ratio"], ".2f")]
        for row in record["rows"]
        if (speed := row.get("runs_per_second"))
    ]
    return [Rows("", ("network", "by", "runs per second", "time over the sweep's"), rows)]


def phase_speed(record: dict[str, Any]) -> list[Rows]:
    """Fixed points of 512 x 512 networks."""
    rows = [
        [
            row["activation"],
            f"{row['peers'][0]['warm_seconds']:.2g}",
            f"{row['compile_seconds']:.2g}",
            f"{row['ratio']:.0f}",
            f"{row['disagreement']:.1g}",
        ]
        for row in record["rows"]
    ]
    columns = ("activation", "seconds", "compile seconds", "times scipy's loop", "differs by")
    return [Rows("", columns, rows)]


def norm_speed(record: dict[str, Any]) -> list[Rows]:
    """Forward and backward over Flax's BatchNorm, float32."""
    found = {
        (row["norm"], row["shape"]): row["ratio"]
        for row in record["rows"]
        if row["dtype"] == "float32"
    }
    norms = list(dict.fromkeys(norm for norm, _ in found))
    rows = [
        [norm.replace("_", " "), *(number(found.get((norm, at)), ".2f") for at in SHAPES)]
        for norm in norms
    ]
    return [Rows("", ("norm", *SHAPES), rows)]


SHAPES = ("vectors", "maps")


def enhancement(record: dict[str, Any]) -> list[Rows]:
    """How much instance enhancement raises eta_max at the start, by width."""
    rows = [
        [
            str(row["width"]),
            mark(row["outlier"]),
            f"{row['predicted']:.2f}",
            f"{row['measured']:.2f} ± {row['error']:.2f}",
        ]
        for row in record["ratios"]
    ]
    return [Rows("", ("width", "within_domain", "predicted", "measured"), rows)]


def power(record: dict[str, Any]) -> list[Rows]:
    """P1 by depth."""
    columns = ("", *(f"layer {layer}" for layer in record["layers"]))
    rows = [["LN, theory", *(f"{value:.3f}" for value in record["theory"]["LN"])]]
    for name in ("LN", "LN + PN", "BN"):
        rows.append([f"{name}, measured", *(f"{value:.2g}" for value in record["p1"][name])])
    return [Rows("", columns, rows)]


def faults(record: dict[str, Any]) -> list[Rows]:
    """What was done to a sweep."""
    rows = [[row["fault"], mark(row["holds"])] for row in record["rows"]]
    return [Rows("", ("fault", "survived"), rows)]


def comparison(_: Any) -> list[Rows]:
    """Norms side by side, from compare.nc."""
    with netcdf_file(RESULTS / "compare.nc", mmap=False) as file:
        at = {name: variable[:] for name, variable in file.variables.items()}
    rows = []
    for i, letters in enumerate(at["norm"]):
        name = b"".join(letters).decode().replace("_", " ")
        for j, size in enumerate(at["batch_size"]):
            if at["measured"][i, j].mean() != at["measured"][i, j].mean():
                continue
            # files of before a change of names call it by the old one
            inside = at.get("within_domain", at.get("outlier_limited"))[i, j]
            rows.append(
                [
                    *(name, str(size), f"{at['predicted'][i, j]:.4g}" + ("" if inside else " ?")),
                    *(f"{at['measured'][i, j].mean():.4g}", f"{at['ratio'][i, j]:.2f}"),
                    *(f"{at[n][i, j]:.2g}" for n in ("eta_max", "eta_max_measured", "best_rate")),
                    *(f"{at[n][i, j]:.3f}" for n in ("best_loss", "best_test_loss")),
                    f"{100 * at['best_test_accuracy'][i, j]:.1f}",
                ]
            )
    columns = (
        *("norm", "batch", "lambda_max predicted", "measured", "ratio"),
        *("eta_max predicted", "measured", "best rate", "training loss", "test loss"),
        "accuracy, %",
    )
    return [Rows("", columns, rows)]


def your_model(record: dict[str, Any]) -> list[Rows]:
    """lambda_max of Flax models, predicted over measured."""
    rows = [
        [
            row["model"],
            str(row["width"]),
            f"{row['predicted']:.4g}",
            f"{sum(row['measured']) / len(row['measured']):.4g}",
            f"{row['ratio']:.2f} ± {row['ratio'] * row['standard_error']:.2f}",
            mark(row["within_domain"]),
        ]
        for row in record["rows"]
    ]
    columns = ("model", "width", "predicted", "measured", "ratio", "in its domain")
    return [Rows("", columns, rows)]


def parametrization(record: dict[str, Any]) -> list[Rows]:
    """eta_max over that of the widest network, by width and parametrization."""
    widths = sorted({row["width"] for row in record["rows"]})
    tables: dict[tuple[str, str], list[list[float]]] = {}
    for row in record["rows"]:
        numbers = [row["predicted"], row["measured"]]
        tables.setdefault((row["network"], row["parametrization"]), []).append(numbers)
    names = dict(mlp="MLP", normed="MLP, BatchNorm", cnn="CNN")
    rows = []
    for (network, kind), numbers in tables.items():
        for column, by in enumerate(("theory", "measured")):
            values = [pair[column] for pair in numbers]
            last = next(value for value in reversed(values) if value is not None)
            cells = ["-" if value is None else f"{value / last:.2f}" for value in values]
            rows.append([names[network], kind, by, *cells])
    columns = ("network", "parametrization", "by", *(f"width {width}" for width in widths))
    return [Rows("", columns, rows)]


def time_to_loss(record: dict[str, Any]) -> list[Rows]:
    """Steps to a loss over those of the best rate of a grid, by network and rule."""
    table: dict[str, dict[str, float | None]] = {}
    for row in record["rows"]:
        table.setdefault(row["case"], {})[row["rule"]] = row["ratio"]
    rules = list(next(iter(table.values())))[1:]
    rows = [
        [case, *("-" if ratios[rule] is None else f"{ratios[rule]:.2f}" for rule in rules)]
        for case, ratios in table.items()
    ]
    middle = [
        statistics.median(ratios[rule] or math.inf for ratios in table.values()) for rule in rules
    ]
    rows.append(["median", *("-" if math.isinf(at) else f"{at:.2f}" for at in middle)])
    return [Rows("", ["network", *rules], rows)]


PARTS: dict[str, Callable[[Any], list[Rows]]] = {
    "claims": claims,
    "groups": rate_groups,
}
"""Tables of any record, or second tables of a record, by the word after its name."""

OWN: dict[str, Callable[[Any], list[Rows]]] = dict(
    fig1=figure1,
    fig2=figure2,
    domain=domain,
    parametrization=parametrization,
    time_to_loss=time_to_loss,
    finite_width=finite_width,
    tuning_pays=tuning,
    tune_speed=tuning_seconds,
    sweep_speed=sweep_speed,
    phase_speed=phase_speed,
    norm_speed=norm_speed,
    instance_enhancement=enhancement,
    proxy_norm=power,
    faults=faults,
    your_model=your_model,
    compare=comparison,
)


def result(text: str) -> str:
    """What stands after ``<!-- result: TEXT -->``."""
    name, _, part = text.partition(" ")
    path = RESULTS / f"{name}.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    if part == "machine":
        return machine(record["environment"])
    table = PARTS[part] if part else OWN.get(name) or TABLES[name][1]
    return "\n".join(rows.markdown() for rows in table(record)).strip()


def rendered(page: str) -> str:
    """The page with the results of now."""
    return MARKED.sub(lambda found: f"{found[1]}\n\n{result(found[2])}\n\n{found[3]}", page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(rendered(path.read_text()))
