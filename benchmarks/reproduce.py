"""Figures 1 and 2 of Wei, Stokes & Schwab (2019, arXiv:1903.02606) and what they claim.

Figure 1: lambda_max and eta_max over gamma, theory and Lanczos. Figure 2: the test loss after five
epochs over learning rate and gamma, with the predicted boundaries. On real images; the published
claims are tested, each with its number.

Run: ``python reproduce.py fig1 | fig2 [--scale small | full] [--data-dir FOLDER]``.
"""

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
import tyro
import xarray as xr
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meanfield_jax import data
from meanfield_jax.cli.output import check_folder, write, write_picture
from meanfield_jax.experiments import diagram
from meanfield_jax.experiments.sweep import sweep
from meanfield_jax.experiments.validate import validate
from meanfield_jax.kernel.kernel import STATISTICS
from meanfield_jax.layers import BatchNorm
from meanfield_jax.network import Network
from meanfield_jax.plot_style import letters, picture
from meanfield_jax.plots import draw_validation
from meanfield_jax.presets import cnn, mlp
from meanfield_jax.sweep_plots import draw_sweep
from meanfield_jax.variants import VANILLA

FRACTIONS = np.geomspace(1 / 16, 1, 9)
"""Learning rates over eta_max at which losses of different scales are compared."""

ALL_IMAGES = dict(mnist=60_000, cifar10=50_000)
"""For training."""

MOST = 0.9
"""Fraction of comparisons that a claim of order has to win."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one data set.

    Attributes:
        images: What they are, for people.
        architecture: Likewise.
        key: Of its files.
        dataset: Name for :func:`meanfield_jax.data.load`.
        network: The specification.
        num_train: Training samples; None: all.
        num_test: Test samples; None: all.
        grid: Of figure 2.
        loss: Of figure 2.
    """

    images: str
    architecture: str
    key: str
    dataset: str
    network: Network
    num_train: int | None
    num_test: int | None = None
    grid: dict[str, Any] = dataclasses.field(default_factory=dict)
    loss: str = "squared"

    def title(self, num_samples: int) -> str:
        """For people; says where the training images are not all there are."""
        subset = " subset" if num_samples < ALL_IMAGES[self.dataset] else ""
        return f"{self.images}{subset}, {self.architecture}, n = {num_samples}"

    def load(self, split: str, data_dir: Any) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels."""
        return data.load(
            self.dataset,
            split=split,
            num_samples=self.num_train if split == "train" else self.num_test,
            flatten=len(self.network.input_shape) == 1,
            data_dir=data_dir,
        )


@dataclasses.dataclass(frozen=True)
class Result:
    """A reproduced figure.

    Attributes:
        picture: The figure.
        rows: Its table, by data set and gamma.
        claims: What was published, whether it holds here, and by which numbers.
    """

    picture: Figure
    rows: list[dict[str, Any]]
    claims: list[dict[str, Any]]

    def record(self) -> dict[str, Any]:
        """Rows and claims as JSON-able data."""
        return dict(rows=self.rows, claims=self.claims)


def _mlp(width: int) -> Network:
    return mlp([width] * 3, inputs=784, outputs=10, norm=BatchNorm())


def _cnn() -> Network:
    return cnn([30, 60, 90], inputs=(32, 32, 3), outputs=10, norm=BatchNorm())


def _cases1(scale: str) -> list[Case]:
    fc, conv = (400, 128) if scale == "small" else (1000, 512)
    return [
        Case("MNIST", "FC 784-1000x3-10", "mnist", "mnist", _mlp(1000), fc),
        Case("CIFAR-10", "conv 30-60-90", "cifar10", "cifar10", _cnn(), conv),
    ]


def cases2(scale: str) -> list[Case]:
    """Networks, data and grids of figure 2, "small" or "full"."""
    if scale == "small":
        gammas, seeds = [0.1, 0.25, 0.5, 1.0, 2.0, 4.0], range(3)
        fc = dict(gamma=gammas, learning_rate=np.geomspace(1e-3, 10, 33), seed=seeds)
        conv = dict(gamma=gammas[1:], learning_rate=np.geomspace(3e-4, 1, 21), seed=range(2))
        entropy = fc | dict(learning_rate=np.geomspace(1e-3, 1e2, 21), seed=range(2))
        width, mnist, cifar, test = 300, 2000, 1000, 1000
    else:
        gammas, seeds = np.geomspace(0.1, 4, 15), range(5)
        fc = dict(gamma=gammas, learning_rate=np.geomspace(1e-3, 10, 41), seed=seeds)
        conv = fc | dict(learning_rate=np.geomspace(3e-4, 3, 41))
        entropy = fc | dict(learning_rate=np.geomspace(1e-3, 1e2, 41))
        width, mnist, cifar, test = 1000, None, None, None
    network = _mlp(width)
    name = f"FC 784-{width}x3-10"
    return [
        Case("MNIST", name, "mnist", "mnist", network, mnist, test, fc),
        Case("CIFAR-10", "conv 30-60-90", "cifar10", "cifar10", _cnn(), cifar, test, conv),
        Case(
            "MNIST",
            f"{name}, cross-entropy",
            "mnist-cross-entropy",
            "mnist",
            network,
            mnist,
            test,
            entropy,
            "cross_entropy",
        ),
    ]


def figure1(
    scale: str, folder: Path, *, data_dir: str | os.PathLike | None = None, progress: bool = False
) -> Result:
    """lambda_max and eta_max over gamma, by theory and measured by Lanczos.

    Args:
        scale: "small" or "full".
        folder: Where the numbers go, one NetCDF file a network.
        data_dir: Folder with the images.
        progress: Whether to show progress on stderr.

    Returns:
        Picture, table and claims.
    """
    cases = _cases1(scale)
    figure = picture(10.5, 4.2 * len(cases))
    rows, claims, panels = [], [], figure.subplots(len(cases), 2)
    letters(panels.ravel())
    for axes, case in zip(panels, cases, strict=True):
        x = jnp.asarray(case.load("train", data_dir)[0])
        gammas = (0.25, 0.5, 1.0, 2.0, 3.0, 5.0)
        draws = 2 if scale == "small" else 4
        found = validate(
            case.network, x, gammas=gammas, draws=draws, theory="data", progress=progress
        )
        found.to_netcdf(folder / f"{case.key}.nc")
        title = case.title(len(x))
        draw_validation(axes, found, title=title)
        rows += _rows1(title, found)
        claims += [_lowers(title, found, mode) for mode in ("batch", "frozen")]
    return Result(figure, rows, claims)


def _rows1(title: str, found: xr.Dataset) -> list[dict[str, Any]]:
    rows = []
    for label in found.network.values:
        at = found.sel(network=label)
        row: dict[str, Any] = {"case": title, "gamma": str(label).replace("gamma=", "")}
        for mode in ("batch",) if label == VANILLA else ("batch", "frozen"):
            name = {"batch": "training", "frozen": "evaluation"}[mode]
            row[f"measured, {name}"] = float(at.measured_mean.sel(mode=mode))
            row[f"theory / measured, {name}"] = float(at.ratio.sel(statistics=mode))
        if label != VANILLA:
            row["as published / measured, training"] = float(
                at.predicted.sel(statistics="wei2019") / at.measured_mean.sel(mode="batch")
            )
        rows.append(row)
    return rows


def _lowers(title: str, found: xr.Dataset, mode: str) -> dict[str, Any]:
    """Up to which scale BatchNorm lowers lambda_max."""
    vanilla = float(found.measured_mean.sel(network=VANILLA, mode="batch"))
    rest = found.sel(network=found.network != VANILLA, mode=mode)
    logs = np.log(rest.measured_mean.values / vanilla)
    crossing = float(np.exp(np.interp(0, logs, np.log(rest.gamma.values), left=0, right=np.inf)))
    name = {"batch": "training", "frozen": "evaluation"}[mode]
    return dict(
        claim=f"BatchNorm lowers lambda_max for gamma below about 3 ({name} mode)",
        case=title,
        holds=bool(2 <= crossing <= 4.5),
        numbers=f"measured lambda_max is that of the network without BatchNorm at {crossing:.2f}",
    )


def figure2(
    scale: str, folder: Path, *, data_dir: str | os.PathLike | None = None, progress: bool = False
) -> Result:
    """Test loss after five epochs over learning rate and gamma, and the boundaries.

    Args:
        scale: "small" or "full".
        folder: Where the stores go; what is there is resumed.
        data_dir: Folder with the images.
        progress: Whether to show progress on stderr.

    Returns:
        Picture, table and claims.
    """
    cases = cases2(scale)
    figure = picture(5.6 * len(cases), 4.6)
    rows, claims, panels = [], [], figure.subplots(1, len(cases))
    letters(panels)
    for index, (axes, case) in enumerate(zip(panels, cases, strict=True)):
        samples = case.load("train", data_dir)
        found = sweep(
            case.network,
            samples,
            case.grid,
            store=folder / f"{case.key}.zarr",
            resume=True,
            test=case.load("test", data_dir),
            loss=case.loss,
            progress=progress,
        )
        title = case.title(len(samples[0]))
        draw_sweep(axes, found, title=title, legend=index == 0)
        rows += _rows2(title, found)
        claims += _claims2(title, found)
    return Result(figure, rows, claims)


def _rows2(title: str, found: xr.Dataset) -> list[dict[str, Any]]:
    measured, best = diagram.boundary(found), diagram.best_rate(found)
    rows = []
    for gamma in found.gamma.values:
        rate = float(measured.sel(gamma=gamma))
        row = {"case": title, "gamma": float(gamma), "measured": rate}
        for name in STATISTICS:
            row[f"measured / {name}"] = rate / float(found[f"eta_max_{name}"].sel(gamma=gamma))
        top = float(best.sel(gamma=gamma))
        row["best rate"] = top
        row["best / batch"] = top / float(found.eta_max_batch.sel(gamma=gamma))
        rows.append(row)
    return rows


def _claims2(title: str, found: xr.Dataset) -> list[dict[str, Any]]:
    losses = diagram.averaged(found, "test_loss").transpose("gamma", "learning_rate").values
    rates, top = found.learning_rate.values, found.eta_max_batch.values
    relative = np.stack(
        [
            np.interp(np.log(FRACTIONS * most), np.log(rates), row, left=np.nan, right=np.nan)
            for most, row in zip(top, losses, strict=True)
        ]
    )
    ratios = diagram.best_rate(found).values / top
    boundaries = diagram.boundary(found).values / top
    shown = " ".join(f"{ratio:.2f}" for ratio in ratios)
    edges = " ".join(f"{ratio:.2f}" for ratio in boundaries)
    return [
        _ordered(title, "at the same learning rate", losses),
        _ordered(title, "at the same fraction of eta_max", relative),
        dict(
            claim="the best learning rate is about half of eta_max (within a factor of 2)",
            case=title,
            holds=bool(np.all((ratios >= 0.25) & (ratios <= 1))),
            numbers=f"best / eta_max by gamma: {shown}",
        ),
        dict(
            claim="training diverges above eta_max, and not below (within a factor of 1.5)",
            case=title,
            holds=bool(np.all((boundaries >= 1 / 1.5) & (boundaries <= 1.5))),
            numbers=f"boundary / eta_max by gamma: {edges}",
        ),
    ]


def _ordered(title: str, where: str, losses: np.ndarray) -> dict[str, Any]:
    """Whether the loss grows with gamma, (gammas, ...), among neighbours that both converged."""
    below, above = losses[:-1], losses[1:]
    both = np.isfinite(below) & np.isfinite(above)
    won = int((below < above)[both].sum())
    count = int(both.sum())
    return dict(
        claim=f"a smaller gamma has the lower test loss after the same epochs {where}",
        case=title,
        holds=bool(won >= MOST * count),
        numbers=f"in {won} of {count} comparisons",
    )


def tables(result: Result) -> list[Table]:
    """A table of the rows of each case, and one of the claims, for the terminal."""
    made = []
    for title in dict.fromkeys(row["case"] for row in result.rows):
        rows = [row for row in result.rows if row["case"] == title]
        names = [name for row in rows for name in row if name != "case"]
        made.append(_table(title, list(dict.fromkeys(names)), rows))
    made.append(_table("Published claims", ["case", "claim", "holds", "numbers"], result.claims))
    return made


def _table(title: str, names: list[str], rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_lines=False)
    for name in names:
        table.add_column(name)
    for row in rows:
        table.add_row(*(_text(row.get(name, "")) for name in names))
    return table


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclasses.dataclass(frozen=True)
class Options:
    """Figure 1 or 2 of Wei, Stokes & Schwab (2019) on real images, and which claims hold."""

    figure: Annotated[Literal["fig1", "fig2"], tyro.conf.Positional]
    """fig1: lambda_max and eta_max over gamma; fig2: test loss over learning rate and gamma."""
    scale: Literal["small", "full"] = "small"
    """small: minutes on two cores; full: the paper's networks and all images, for a GPU."""
    output: Path | None = None
    """Folder of the results; what is there is resumed [meanfield-jax-FIGURE-SCALE]."""
    data_dir: Path | None = None
    """Folder with the images [$MEANFIELD_JAX_DATA]."""


def main(options: Options) -> None:
    """Computes, draws, prints the tables."""
    folder = options.output or Path(f"meanfield-jax-{options.figure}-{options.scale}")
    check_folder(folder)
    folder.mkdir(exist_ok=True)
    make = figure1 if options.figure == "fig1" else figure2
    result = make(options.scale, folder, data_dir=options.data_dir, progress=True)
    record = json.dumps(result.record(), indent=1) + "\n"
    written = [
        write_picture(folder / f"{options.figure}.png", result.picture),
        write(folder / f"{options.figure}.json", lambda path: path.write_text(record)),
    ]
    Console().print(*tables(result))
    print("wrote", *written, file=sys.stderr)


if __name__ == "__main__":
    main(tyro.cli(Options))
