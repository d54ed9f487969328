"""``meanfield-jax compare``."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
import xarray as xr
from rich.console import Console

from meanfield_jax.cli.options import DataOptions, NetworkOptions
from meanfield_jax.cli.output import outputs, write, write_picture
from meanfield_jax.cli.result import print_json
from meanfield_jax.cli.tables import comparison_table
from meanfield_jax.experiments.compare import RATES, compare, norm_names
from meanfield_jax.plots import plot_comparison

WIDTHS = dict(mlp=(100, 100, 100), cnn=(16, 32, 64), resnet=(8, 16, 32))
"""Small enough for dozens of training runs of every norm in minutes on two cores."""


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compare the normalization layers: predicted and measured stability, and training."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=lambda: DataOptions(data="digits")
    )
    norms: Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            help=f"Norms to compare: all that fit the network, or some of {', '.join(norm_names())}"
        ),
    ] = ("all",)
    batch_sizes: tuple[int, ...] = (4, 32, 256)
    """Samples per batch, in training and in the Fisher matrix."""
    learning_rates: tuple[float, ...] = RATES
    """Learning rates to try; each norm's best one is that of its smallest training loss."""
    epochs: int = 2
    """Passes over the training samples, the same for every norm and batch size."""
    seeds: int = 2
    """Training runs for each norm, batch size and learning rate."""
    draws: int = 2
    """Random networks to measure for each norm and batch size."""
    num_test: int | None = None
    """Number of test samples [300]."""
    loss: Literal["squared", "cross_entropy"] = "cross_entropy"
    """The training loss."""
    momentum: float = 0.9
    """Momentum of gradient descent."""
    output: Path = Path("meanfield-jax-compare")
    """Path of the numbers (.nc) and the picture (.png, or .pdf or .svg if the path ends so)."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Measures, trains, prints the table and writes the files."""
        numbers, picture = outputs("--output", self.output, ".nc", ".png")
        widths = self.network.widths or WIDTHS[self.network.net]
        options = dataclasses.replace(self.network, widths=widths)
        network = options.network(self.inputs.shape(self.network.net))
        dataset = compare(
            network,
            self.inputs.load(network),
            test=self.inputs.load_test(network, self.num_test, 300),
            norms=None if self.norms == ("all",) else self.norms,
            batch_sizes=self.batch_sizes,
            learning_rates=self.learning_rates,
            momentum=self.momentum,
            epochs=self.epochs,
            seeds=self.seeds,
            draws=self.draws,
            loss=self.loss,
            progress=True,
        )
        dataset.attrs["data"] = self.inputs.data
        written = [
            write(numbers, dataset.to_netcdf),
            write_picture(picture, plot_comparison(dataset)),
        ]
        if self.json:
            print_json("compare", dataset)
        else:
            Console().print(comparison_table(dataset))
        if left_out := self._left_out(dataset):
            print(f"left out, because they do not fit this network: {left_out}", file=sys.stderr)
        print("wrote", *written, file=sys.stderr)

    def _left_out(self, dataset: xr.Dataset) -> str:
        asked = norm_names() if self.norms == ("all",) else ()
        return ", ".join(name for name in asked if name not in dataset.norm.values)
