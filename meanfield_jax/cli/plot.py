"""``meanfield-jax plot``."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from meanfield_jax.cli.output import local_store, outputs, write, write_picture
from meanfield_jax.cli.result import print_sweep
from meanfield_jax.cli.tables import sweep_table
from meanfield_jax.experiments.store import load_sweep
from meanfield_jax.page import sweep_page
from meanfield_jax.sweep_plots import plot_sweep


@dataclasses.dataclass(frozen=True)
class Plot:
    """Draw a sweep, finished or not: results over learning rate and scale, or over one axis."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder that `meanfield-jax sweep` wrote."""
    value: Literal["test_loss", "loss", "test_accuracy"] | None = None
    """Result to show, after the last epoch [test_loss, or loss without test samples]."""
    output: Path | None = None
    """Path of the picture [the store's name with .png; none with --html]."""
    html: Path | None = None
    """Path of a page for a browser, which shows each cell and its learning curves."""
    json: bool = False
    """Print the results as JSON instead of the table."""

    def run(self) -> None:
        """Reads the sweep, draws it and prints the table."""
        store = local_store(self.store)
        pictures = []
        if self.output is not None or self.html is None:
            name = store.resolve().name or "sweep"
            pictures = outputs("--output", self.output or Path(name).with_suffix(".png"), ".png")
        pages = [] if self.html is None else outputs("--html", self.html, ".html")
        dataset = load_sweep(store)
        written = [
            write_picture(picture, plot_sweep(dataset, value=self.value)) for picture in pictures
        ]
        for path in pages:
            page = sweep_page(dataset, value=self.value).encode()
            written.append(write(path, lambda file, page=page: file.write_bytes(page)))
        if self.json:
            print_sweep("plot", dataset)
        elif "learning_rate" in dataset.dims:
            Console().print(sweep_table(dataset))
        missing = int((dataset.diverged_at == -2).sum())
        note = f"; {missing} of {dataset.diverged_at.size} runs are not finished" * (missing > 0)
        print(f"wrote {' '.join(written)}{note}", file=sys.stderr)
