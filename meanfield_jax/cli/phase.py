"""``meanfield-jax phase``."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meanfield_jax.cli.options import MOST
from meanfield_jax.cli.output import outputs, write_picture
from meanfield_jax.cli.result import print_json
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import Activation, BatchNorm, Dense, Sequential
from meanfield_jax.plots import plot_phase_diagram
from meanfield_jax.status import Status
from meanfield_jax.theory.phase_diagram import phase_diagram


@dataclasses.dataclass(frozen=True)
class Phase:
    """Map order and chaos of a deep network [Dense, norm, activation] over its variances."""

    activation: str = "tanh"
    """Activation: relu, leaky_relu, tanh, erf, gelu, silu or identity."""
    norm: Literal["none", "batch"] = "none"
    """Norm before each activation."""
    gamma: float = 1.0
    """Scale of BatchNorm."""
    num_samples: int | None = None
    """Batch size n of BatchNorm [the limit of large batches]."""
    weight_var: str = "0.5:4:128"
    """Variance of a weight times the fan-in, as lowest:highest:count."""
    bias_var: str = "0:1:128"
    """Variance of a bias, as lowest:highest:count."""
    output: Path | None = None
    """Path of the picture (.png, .pdf or .svg) to write."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Computes the phase diagram, draws it and prints the table."""
        pictures = [] if self.output is None else outputs("--output", self.output, ".png")
        norm = [BatchNorm(self.gamma)] if self.norm == "batch" else []
        block = Sequential((Dense(1), *norm, Activation(self.activation)))
        weight_var = _axis("--weight-var", self.weight_var)
        bias_var = _axis("--bias-var", self.bias_var)
        with jax.enable_x64():
            dataset = phase_diagram(
                block,
                weight_var=weight_var,
                bias_var=bias_var,
                num_samples=self.num_samples,
            )
        written = [write_picture(path, plot_phase_diagram(dataset)) for path in pictures]
        if self.json:
            print_json("phase", dataset)
        else:
            console = Console()
            console.print(_critical_table(dataset))
            for status, count in zip(*np.unique(dataset.status, return_counts=True), strict=True):
                console.print(f"{count} of {dataset.status.size}: {Status(status).name}")
        if written:
            print("wrote", *written, file=sys.stderr)


def _axis(option: str, text: str) -> np.ndarray:
    """The values of lowest:highest:count."""
    try:
        lowest, highest, count = text.split(":")
        values = np.linspace(float(lowest), float(highest), min(int(count), MOST + 1))
    except ValueError:
        cause, remedy = "it is not of the form lowest:highest:count", "write, e.g., 0.5:4:128"
        raise problem(SpecError, option, text, cause, remedy) from None
    if not 2 <= values.size <= MOST or not values[0] < values[-1]:
        cause = f"it is not a range of 2 to {MOST:,} values"
        remedy = "give the lower end first, and such a count"
        raise problem(SpecError, option, text, cause, remedy)
    return values


def _critical_table(dataset) -> Table:
    table = Table(title="Edge of chaos, chi_1 = 1", box=SIMPLE_HEAD)
    for name in ("bias_var", "weight_var"):
        table.add_column(name, justify="right")
    step = max(1, dataset.sizes["bias_var"] // 8)
    for value in dataset.critical_weight_var[::step]:
        known = np.isfinite(value.item())
        table.add_row(f"{value.bias_var:.4g}", f"{value:.6g}" if known else "none")
    return table
