"""``meanfield-jax analyze``."""

import dataclasses
from typing import Annotated, Literal

import jax
import tyro
import xarray as xr
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meanfield_jax.cli.options import NetworkOptions, chosen
from meanfield_jax.cli.result import print_json
from meanfield_jax.theory.analyze import Theory
from meanfield_jax.theory.analyze import analyze as analyze_network


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Compute the theory: order parameters, Fisher statistics, largest stable learning rate."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    gamma: float = 1.0
    """Scale of every BatchNorm."""
    statistics: Literal["batch", "frozen", "wei2019"] = "batch"
    """What is differentiated through a BatchNorm: batch as in training, frozen as in evaluation,
    wei2019 as published."""
    vanilla: bool = False
    """Remove the BatchNorms."""
    num_samples: int | None = None
    """Batch size n [the limit of large batches]."""
    draws: int | None = None
    """Networks to draw, for lambda_max at their width [the wide limit]; needs --num-samples."""
    momentum: float = 0.9
    """Momentum of gradient descent."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Prints the theory."""
        shape = (784,) if self.network.net == "mlp" else (32, 32, 3)
        network = chosen(self.network.network(shape), self.gamma, self.vanilla)
        with jax.enable_x64():
            theory = analyze_network(
                network,
                statistics=self.statistics,
                num_samples=self.num_samples,
                draws=self.draws,
            ).raise_if_failed()
            dataset = theory.to_xarray(self.momentum)
        if self.json:
            print_json("analyze", dataset)
            return
        console = Console()
        console.print(_answer(dataset, self.draws), highlight=False)
        console.print(repr(network), highlight=False)
        console.print(_fisher_table(theory, dataset))
        console.print(_order_table(dataset))


def _answer(dataset: xr.Dataset, draws: int | None) -> str:
    """The largest stable learning rate, and whether to trust it."""
    first = (
        f"[bold]eta_max = {float(dataset.eta_max):.4g}[/bold]: near a minimum of the squared loss, "
        f"larger learning rates of the heavy ball (momentum {dataset.momentum:g}) diverge."
    )
    if draws is not None:
        low, high = dataset.lambda_max_interval.values
        trust = (
            f"It is that of the median of {draws} drawn networks; lambda_max of nine in ten lies "
            f"between {low:.4g} and {high:.4g}."
        )
    elif dataset.domain == "within":
        trust = "The network is within the theory's domain: trust it."
    else:
        trust = f"Do not trust it: {dataset.domain}."
    return f"{first}\n{trust}\n"


def _order_table(dataset: xr.Dataset) -> Table:
    table = Table(title="Order parameters", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("layer", no_wrap=True)
    names = [str(name) for name in dataset.data_vars if dataset[name].dims == ("layer",)]
    for name in names:
        table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
    for layer in dataset.layer.values:
        values = (float(dataset[name].sel(layer=layer)) for name in names)
        table.add_row(str(layer), *(f"{value:.4g}" for value in values))
    return table


def _fisher_table(theory: Theory, dataset: xr.Dataset) -> Table:
    table = Table(title=f"Fisher matrix, statistics={dataset.statistics!r}", show_header=False)
    for name in theory.fisher.STATISTICS:
        value = dataset[name].item()
        table.add_row(name, str(value) if isinstance(value, bool) else f"{value:.6g}")
    table.add_row(f"eta_max (momentum {dataset.momentum:g})", f"{float(dataset.eta_max):.6g}")
    return table
