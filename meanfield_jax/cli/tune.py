"""``meanfield-jax tune``."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meanfield_jax import objectives
from meanfield_jax.cli.options import DataOptions, NetworkOptions
from meanfield_jax.cli.output import ComputationError, outputs, write, write_picture
from meanfield_jax.cli.result import print_json
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.network import Network
from meanfield_jax.plots import plot_tuning
from meanfield_jax.status import Status
from meanfield_jax.tuning import Tuning
from meanfield_jax.tuning import tune as tune_network
from meanfield_jax.variants import with_depth, with_gamma

# each objective, and the default of its --value (None if it has none)
OBJECTIVES: dict[str, tuple[Callable[..., objectives.Objective], float | None]] = {
    "target_eta_max": (objectives.target_eta_max, 0.1),
    "target_rate": (objectives.target_rate, 0.1),
    "max_rate": (objectives.max_rate, 1.0),
    "max_eta_max": (objectives.max_eta_max, 1.0),
    "unit_growth": (objectives.unit_growth, None),
    "equal_shares": (objectives.equal_shares, None),
    "sharpness": (objectives.sharpness, 1.0),
}


@dataclasses.dataclass(frozen=True)
class Tune:
    """Tune gamma, beta or the variances to an objective of the theory; show the change by layer."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataOptions
    )
    objective: Literal[
        "target_eta_max",
        "target_rate",
        "max_rate",
        "max_eta_max",
        "unit_growth",
        "equal_shares",
        "sharpness",
    ] = "target_eta_max"
    """The objective to reach."""
    value: float | None = None
    """Value of the objective: the learning rate of target_rate and target_eta_max [0.1], the
    smallest variance of the outputs for max_rate and max_eta_max [1], or their variance for
    sharpness [1]."""
    rate: Literal["quadratic", "no_spike", "bounded"] | None = None
    """The learning rate of target_rate and max_rate: stable near a minimum, without a spike from a
    random start [no_spike], or the one above which training diverges."""
    over: tuple[str, ...] = ("gamma",)
    """Numbers to tune: gamma, beta, weight_var, bias_var."""
    shared: bool = False
    """Use the same value in all layers."""
    depth: int | None = None
    """Number of identical hidden layers [the number of widths]."""
    gamma: float | None = None
    """Scale of every BatchNorm to start from [1, or that of --spec]."""
    theory: Literal["iid", "data"] = "iid"
    """Theory for infinitely many i.i.d. inputs, or for the given inputs."""
    statistics: Literal["batch", "frozen", "wei2019"] = "batch"
    """What is differentiated through a BatchNorm: batch as in training, frozen as in evaluation,
    wei2019 as published."""
    max_steps: int = 200
    """Largest number of steps."""
    output: Path | None = None
    """Path of the picture (.png, .pdf or .svg) to write."""
    save: Path | None = None
    """Path of the tuned specification (.json) to write, for use as --spec."""
    json: bool = False
    """Print the history as JSON instead of the table."""

    def run(self) -> None:
        """Tunes, prints the table and writes the files."""
        pictures = [] if self.output is None else outputs("--output", self.output, ".png")
        specs = [] if self.save is None else outputs("--save", self.save, ".json")
        with jax.enable_x64():
            tuned = self._tuned()
            written = [write_picture(path, plot_tuning(tuned)) for path in pictures]
            text = tuned.network.to_json()
            written += [write(path, lambda path: path.write_text(text)) for path in specs]
            if self.json:
                history = tuned.history.assign_attrs(
                    network=text, status=tuned.status.label, message=tuned.message
                )
                print_json("tune", history)
            else:
                Console().print(_table(tuned))
                print(tuned.message)
        if written:
            print("wrote", *written, file=sys.stderr)
        if tuned.status != Status.CONVERGED:
            raise ComputationError(tuned.message)

    def _tuned(self) -> Tuning:
        network = self._network()
        x = self.inputs.load(network)[0].astype(float) if self.theory == "data" else None
        return tune_network(
            network,
            self._objective(),
            over=self.over,
            shared=self.shared,
            data=x,
            statistics=self.statistics,
            max_steps=self.max_steps,
            progress=True,
        )

    def _network(self) -> Network:
        network = self.network.network(self.inputs.shape(self.network.net))
        if self.depth is not None:
            network = with_depth(network, self.depth)
        return network if self.gamma is None else with_gamma(network, self.gamma)

    def _objective(self) -> objectives.Objective:
        make, default = OBJECTIVES[self.objective]
        about_rate = self.objective in ("target_rate", "max_rate")
        if self.rate is not None and not about_rate:
            cause = f"the objective {self.objective} has no rate to choose"
            raise problem(SpecError, "--rate", self.rate, cause, "leave it out")
        if default is not None:
            options = dict(rate=self.rate or "no_spike") if about_rate else {}
            return make(default if self.value is None else self.value, **options)
        if self.value is not None:
            cause = f"the objective {self.objective} has no value"
            raise problem(SpecError, "--value", self.value, cause, "leave it out")
        return make()


def _table(tuned: Tuning) -> Table:
    """Before and after, by layer: the tuned numbers, and the layer's share of the outlier."""
    ends = tuned.history.isel(step=[0, -1])
    tables = [theory.to_xarray() for theory in (tuned.before, tuned.after)]
    kinds = [f"contribution_{kind}" for kind in ("weights", "biases", "norm")]
    parts = [data[kinds].to_dataarray("kind").sum("kind") for data in tables]
    shares: Any = xr.concat(parts, "step")
    fields = [str(name) for name in ends.data_vars if "layer" in ends[name].dims]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    for name in (*fields, "share of lambda_max"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in shares.block.values:
        known = layer in ends.layer.values
        cells = [_change(ends[field].sel(layer=layer)) if known else "" for field in fields]
        table.add_row(str(layer), *cells, _change(shares.sel(block=layer) / shares.sum("block")))
    table.add_section()
    for name in ("objective", "lambda_max", "eta_max"):
        table.add_row(name, *[""] * len(fields), _change(ends[name]))
    return table


def _change(values: xr.DataArray) -> str:
    before, after = values.values
    return "" if before != before else f"{before:.4g} -> {after:.4g}"
