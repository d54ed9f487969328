"""``meanfield-jax reproduce``."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from meanfield_jax.cli.output import check_folder, write, write_png
from meanfield_jax.experiments.reproduce import figure1, figure2, tables


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Figure 1 or 2 of Wei, Stokes & Schwab (2019) on real images, and which claims hold."""

    figure: Annotated[Literal["fig1", "fig2"], tyro.conf.Positional]
    """fig1: lambda_max and eta_max over gamma; fig2: test loss over learning rate and gamma."""
    scale: Literal["small", "full"] = "small"
    """small: minutes on two cores; full: the paper's networks and all images, for a GPU."""
    output: Path | None = None
    """Folder of the results; what is there is resumed [meanfield-jax-FIGURE-SCALE]."""
    data_dir: Path | None = None
    """Folder with the images [$MEANFIELD_JAX_DATA]."""
    json: bool = False
    """Print JSON instead of the tables."""

    def run(self) -> None:
        """Computes, draws, prints the tables."""
        folder = self.output or Path(f"meanfield-jax-{self.figure}-{self.scale}")
        check_folder(folder)
        folder.mkdir(exist_ok=True)
        make = figure1 if self.figure == "fig1" else figure2
        result = make(self.scale, folder, data_dir=self.data_dir, progress=True)
        record = json.dumps(result.record(), indent=1) + "\n"
        written = [
            write_png(folder / f"{self.figure}.png", result.picture),
            write(folder / f"{self.figure}.json", lambda path: path.write_text(record)),
        ]
        if self.json:
            print(record, end="")
        else:
            Console().print(*tables(result))
        print("wrote", *written, file=sys.stderr)
