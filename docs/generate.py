"""Writes the pages that are made from the package: its reference and its command line.

``conf.py`` calls this before every build. The notebooks are copied, executed as they are.
"""

import contextlib
import io
import os
import re
import shutil
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import meanfield_jax as mf
from meanfield_jax.cli import program

DOCS = Path(__file__).parent
NOTEBOOKS = DOCS.parent / "notebooks"

REFERENCE: dict[str, tuple[str, tuple[str, ...]]] = {
    "specification": (
        "Networks and layers",
        (
            *("Network", "mlp", "cnn", "preact_resnet", *mf.layers.__all__),
            *("layers.norm.Norm", "layers.group_norm.group_rule"),
        ),
    ),
    "theory": (
        "Theory",
        (
            *("analyze", "Theory", "theory.fisher.Fisher", "theory.fisher.Contributions"),
            "theory.order_parameters.OrderParameters",
            *("fixed_point", "FixedPoint", "batch_growth", "phase_diagram"),
        ),
    ),
    "learning_rates": (
        "Learning rates",
        (
            *("learning_rate", "LearningRate", "suggest_schedule", "Schedule"),
            *("theory.rates.rates", "eta_max", "stability_limit"),
        ),
    ),
    "models": ("Flax models", ("build", "functional", "calibrate")),
    "measurement": (
        "Measurement",
        (
            *("fisher_operator", "FisherOperator", "top_eigenvalues", "TopEigenvalues"),
            *("spectral_density", "SpectralDensity", "trace", "Trace", "layer_table"),
            *("drawn_eigenvalues", "DrawnEigenvalues"),
        ),
    ),
    "comparison": (
        "Theory beside measurement",
        ("validate", "measured_boundary", "compare"),
    ),
    "training": ("Training and sweeps", ("train", "Training", "sweep", "load_sweep")),
    "tuning": ("Tuning", ("tune", "Tuning", "objectives")),
    "plots": (
        "Pictures",
        (
            *("plot_validation", "plot_spectrum", "plot_sweep", "sweep_page", "plot_comparison"),
            *("plot_phase_diagram", "plot_tuning"),
        ),
    ),
    "diagnostics": ("Diagnostics", ("diagnostics",)),
    "data": ("Data sets", ("data",)),
    "results": ("Errors and statuses", ("SpecError", "DataError", "Status")),
}
"""By page of the reference, its title and what it describes."""


def members(module: ModuleType) -> list[str]:
    """The public functions and classes of a module."""
    listed = getattr(module, "__all__", None)
    return listed or [
        name
        for name, value in vars(module).items()
        if getattr(value, "__module__", None) == module.__name__ and name[0] != "_"
    ]


def described(path: str) -> str:
    """The directives for a public name; for a module, those of its members."""
    found = mf
    for part in path.split("."):
        found = getattr(found, part)
    if isinstance(found, ModuleType):
        names = "\n".join(described(f"{path}.{name}") for name in members(found))
        return f".. automodule:: meanfield_jax.{path}\n   :no-members:\n\n{names}"
    name = path.rpartition(".")[2]
    module = "meanfield_jax" if path == name else f"meanfield_jax.{path.rpartition('.')[0]}"
    if isinstance(found, type) and issubclass(found, Exception):
        return f".. autoexception:: {module}::{name}\n"
    if isinstance(found, type):
        shown = "" if issubclass(found, tuple) else "   :members:\n"
        return f".. autoclass:: {module}::{name}\n{shown}"
    return f".. autofunction:: {module}::{name}\n"


def reference(title: str, names: tuple[str, ...]) -> str:
    """A page of the reference."""
    text = "\n".join(map(described, names))
    return f"# {title}\n\n```{{eval-rst}}\n.. currentmodule:: meanfield_jax\n\n{text}```\n"


def help_of(arguments: list[str]) -> str:
    """What a command prints for ``--help``."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        program.run([*arguments, "--help"])
    return said.getvalue().strip()


def command_line() -> str:
    """The text below the head of the page on the command line."""
    with patch.dict(os.environ, COLUMNS="88"):
        parts = [f"```text\n{help_of([])}\n```\n"]
        for command in program.COMMANDS:
            parts.append(f"## {command}\n\n```text\n{help_of([command])}\n```\n")
    return "\n".join(parts)


def from_root(name: str) -> str:
    """A page of the repository's root, whose links to source files become their names."""
    text = (DOCS.parent / name).read_text()
    return re.sub(
        r"\[(.+?)\]\((?!http)(.+?)\)",
        lambda link: f"[{link[1]}](../{link[2][5:]})" if link[2].startswith("docs/") else link[1],
        text,
    )


def write() -> None:
    """Writes all of them; nothing else may be in their folders."""
    for folder in ("api", "notebooks", "project"):
        shutil.rmtree(DOCS / folder, ignore_errors=True)
        (DOCS / folder).mkdir()
    for page, (title, names) in REFERENCE.items():
        (DOCS / "api" / f"{page}.md").write_text(reference(title, names))
    for path in NOTEBOOKS.glob("*.ipynb"):
        shutil.copy(path, DOCS / "notebooks")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        (DOCS / "project" / name.lower()).write_text(from_root(name))
    (DOCS / "api" / "command_help.md").write_text(command_line())
