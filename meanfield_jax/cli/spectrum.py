"""``meanfield-jax spectrum``."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
import xarray as xr
from flax import nnx
from rich.console import Console
from rich.table import Table

from meanfield_jax.cli.options import DataOptions, NetworkOptions, chosen
from meanfield_jax.cli.output import outputs, write, write_picture
from meanfield_jax.cli.result import print_json
from meanfield_jax.empirical.density import spectral_density
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.model import build, calibrate
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.plots import plot_spectrum
from meanfield_jax.theory.analyze import analyze as analyze_network
from meanfield_jax.variants import has_batch_norm


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """Predict and measure the whole Fisher spectrum of one network on data."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataOptions
    )
    gamma: float = 1.0
    """Scale of every BatchNorm."""
    statistics: Literal["batch", "frozen"] = "batch"
    """Statistics of BatchNorm: batch as in training, frozen as in evaluation."""
    vanilla: bool = False
    """Remove the BatchNorms."""
    num_steps: int = 90
    """Lanczos steps for the spectral density, at most one for each eigenvalue."""
    top: int = 20
    """Number of largest eigenvalues to measure and list."""
    output: Path = Path("meanfield-jax-spectrum")
    """Path of the numbers (.nc) and the picture (.png, or .pdf or .svg if the path ends so)."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Predicts and measures the spectrum, prints the top eigenvalues and writes the files."""
        numbers, picture = outputs("--output", self.output, ".nc", ".png")
        shape = self.inputs.shape(self.network.net)
        network = chosen(self.network.network(shape), self.gamma, self.vanilla)
        x, _ = self.inputs.load(network)
        with Console(stderr=True).status("Predicting the spectrum"):
            fisher = analyze_network(network, statistics=self.statistics, data=x).fisher
            predicted = np.repeat(np.asarray(fisher.eigenvalues), fisher.multiplicity)
        model = build(network, rngs=nnx.Rngs(self.inputs.seed))
        if self.statistics == "frozen" and has_batch_norm(network):
            calibrate(model, x)
        op = fisher_operator(model, x, statistics=self.statistics)
        with Console(stderr=True).status("Measuring the spectrum"):
            top = top_eigenvalues(op, self.top).raise_if_failed()
            steps = min(self.num_steps, op.dual.shape[0])
            density = spectral_density(op, num_steps=steps).raise_if_failed()
        dataset = xr.Dataset(
            dict(
                predicted=("predicted_rank", predicted),
                eigenvalues=("rank", np.asarray(top.eigenvalues)),
                error_bounds=("rank", np.asarray(top.error_bounds)),
                nodes=(("draw", "step"), np.asarray(density.nodes)),
                weights=(("draw", "step"), np.asarray(density.weights)),
            ),
            attrs=dict(
                spec=network.to_json(indent=None),
                statistics=self.statistics,
                outlier_low=float(fisher.outlier_low),
                outlier_high=float(fisher.outlier_high),
            ),
        )
        figure = plot_spectrum(
            density,
            num_eigenvalues=op.dual.shape[0],
            predicted=predicted,
            measured=np.asarray(top.eigenvalues),
        )
        written = [
            write(numbers, dataset.to_netcdf),
            write_picture(picture, figure),
        ]
        if self.json:
            print_json("spectrum", dataset)
        else:
            Console().print(_spectrum_table(dataset))
        print("wrote", *written, file=sys.stderr)


def _spectrum_table(dataset: xr.Dataset) -> Table:
    low, high = dataset.outlier_low, dataset.outlier_high
    caption = f"theory: mean over draws; outliers of one draw: {low:.4g} to {high:.4g}"
    table = Table(title="Largest eigenvalues of F", caption=caption)
    for name in ("rank", "measured", "predicted", "ratio"):
        table.add_column(name, justify="right")
    pairs = zip(dataset.eigenvalues.values, dataset.predicted.values, strict=False)
    for rank, (measured, predicted) in enumerate(pairs):
        ratio = predicted / measured
        table.add_row(str(rank + 1), f"{measured:.5g}", f"{predicted:.5g}", f"{ratio:.3f}")
    return table
