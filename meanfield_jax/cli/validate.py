"""``meanfield-jax validate``."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console

from meanfield_jax.cli.options import DataOptions, NetworkOptions
from meanfield_jax.cli.output import ComputationError, outputs, write, write_picture
from meanfield_jax.cli.result import print_json
from meanfield_jax.cli.tables import rates_table, spectrum_table, validation_table
from meanfield_jax.experiments.validate import validate
from meanfield_jax.plots import plot_validation
from meanfield_jax.variants import has_norm


@dataclasses.dataclass(frozen=True)
class Validate:
    """Compare theory with measurement, without BatchNorm and over gamma: table, PNG and NetCDF."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=NetworkOptions
    )
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = dataclasses.field(
        default_factory=DataOptions
    )
    gammas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0)
    """Scales of BatchNorm."""
    theory: Literal["iid", "data"] = "iid"
    """Theory for i.i.d. inputs, or for the given inputs."""
    draws: int = 3
    """Number of random draws of each network."""
    num_eigenvalues: int | None = None
    """Also compare this number of the kernel's eigenvalues, with the theory for the given
    inputs."""
    train: bool = False
    """Also train every network, by full-batch gradient descent on the squared loss, to find the
    largest learning rates from a random start: without a spike, and with a bounded loss."""
    num_steps: int = 200
    """Steps of each training."""
    momentum: float = 0.9
    """Momentum of gradient descent."""
    output: Path = Path("meanfield-jax-validate")
    """Path of the numbers (.nc) and the picture (.png, or .pdf or .svg if the path ends so)."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Measures, prints the table and writes the files."""
        numbers, picture = outputs("--output", self.output, ".nc", ".png")
        network = self.network.network(self.inputs.shape(self.network.net))
        x, labels = self.inputs.load(network)
        dataset = validate(
            network,
            x,
            y=jnp.asarray(labels) if self.train else None,
            gammas=self.gammas if has_norm(network) else (),
            draws=self.draws,
            theory=self.theory,
            num_eigenvalues=self.num_eigenvalues,
            num_steps=self.num_steps,
            momentum=self.momentum,
            seed=self.inputs.seed,
            progress=True,
        )
        dataset.attrs["data"] = self.inputs.data
        written = [write(numbers, dataset.to_netcdf)]
        if "curve" in dataset:
            written.append(write_picture(picture, plot_validation(dataset)))
        if self.json:
            print_json("validate", dataset)
        else:
            Console().print(validation_table(dataset))
            if self.num_eigenvalues is not None:
                Console().print(spectrum_table(dataset))
            if self.train:
                Console().print(rates_table(dataset))
        print("wrote", *written, file=sys.stderr)
        if not np.isfinite(dataset.measured).all():
            raise ComputationError("validate: a measurement failed; see the NaN in the results")
