"""The command line: ``meanfield-jax analyze | validate | spectrum``.

Exit status: 0 done, 1 a computation or file failed, 2 the command was not understood. Errors are
one line on stderr; with ``--json`` stdout has the result and nothing else.
"""

import contextlib
import dataclasses
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import tyro
import xarray as xr
from flax import nnx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from meanfield_jax import data
from meanfield_jax.empirical.density import spectral_density
from meanfield_jax.empirical.fisher import fisher_operator
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.model import build, calibrate
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.experiments.validate import spectrum_table, validate
from meanfield_jax.experiments.validate import table as validation_table
from meanfield_jax.layers import BatchNorm
from meanfield_jax.network import Network, cnn, mlp
from meanfield_jax.plots import plot_spectrum, plot_validation
from meanfield_jax.theory.propagate import Theory
from meanfield_jax.theory.propagate import analyze as analyze_network
from meanfield_jax.variants import has_batch_norm, with_gamma, without_batch_norm


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Which network; the default is the paper's, 784-1000x3-10 or conv 30-60-90."""

    net: Literal["mlp", "cnn"] = "mlp"
    """Fully connected or convolutional (3x3, stride 2)."""
    widths: tuple[int, ...] = ()
    """Units or channels of each hidden layer [mlp: 1000 1000 1000, cnn: 30 60 90]."""
    activation: str = "relu"
    """relu, leaky_relu, tanh, erf, gelu, silu or identity."""
    weight_var: float = 2.0
    """sigma_w^2, the variance of a weight times the fan-in."""
    bias_var: float = 0.5
    """sigma_b^2, the variance of a bias."""
    axes: Literal["channel", "position"] = "channel"
    """What BatchNorm's statistics belong to, for maps."""
    head: Literal["flatten", "mean"] = "flatten"
    """What follows the last map."""
    spec: Path | None = None
    """A network saved with Network.to_json, instead of all the above."""

    def network(self, shape: tuple[int, ...], outputs: int = 10) -> Network:
        """The specification, with BatchNorms, for inputs of this shape."""
        if self.spec is not None:
            try:
                return Network.from_json(self.spec.read_text())
            except (OSError, UnicodeDecodeError) as error:
                cause = getattr(error, "strerror", None) or "not a text file"
                remedy = "give a file written with Network.to_json"
                raise problem(SpecError, "--spec", str(self.spec), cause, remedy) from None
        options: dict[str, Any] = dict(
            activation=self.activation,
            weight_var=self.weight_var,
            bias_var=self.bias_var,
            norm=BatchNorm(axes=self.axes),
            outputs=outputs,
        )
        if self.net == "mlp":
            return mlp(self.widths or (1000,) * 3, inputs=int(np.prod(shape)), **options)
        return cnn(self.widths or (30, 60, 90), inputs=shape, head=self.head, **options)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which inputs."""

    data: Literal["gaussian", "digits", "mnist", "fashion_mnist", "cifar10"] = "gaussian"
    """Gaussian noise needs no files; the others are looked for in --data-dir, then downloaded."""
    num_samples: int = 1000
    """n, the batch of which the Fisher matrix is taken."""
    data_dir: Path | None = None
    """Folder with the files [$MEANFIELD_JAX_DATA]."""
    seed: int = 0
    """Seed of the inputs and of the first network."""

    def shape(self, net: str) -> tuple[int, ...]:
        """One sample's shape."""
        return (32, 32, 3) if self.data == "gaussian" and net == "cnn" else data.shape_of(self.data)

    def load(self, network: Network) -> jax.Array:
        """The inputs in the network's shape."""
        shape = network.input_shape
        x, _ = data.load(
            self.data,
            num_samples=self.num_samples,
            data_dir=self.data_dir,
            seed=self.seed,
            flatten=len(shape) == 1,
            shape=shape if self.data == "gaussian" else None,
        )
        return jnp.asarray(x)


@dataclasses.dataclass(frozen=True)
class Analyze:
    """Theory only: order parameters, Fisher statistics and the largest stable learning rate."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = NetworkOptions()
    gamma: float = 1.0
    """Scale of every BatchNorm."""
    statistics: Literal["batch", "frozen", "wei2019"] = "batch"
    """What is differentiated through a BatchNorm: training, evaluation, as published."""
    vanilla: bool = False
    """Leave the BatchNorms out."""
    num_samples: int | None = None
    """n, the batch [the limit of many]."""
    momentum: float = 0.9
    """Momentum of gradient descent."""
    json: bool = False
    """Print JSON."""

    def run(self) -> None:
        """Prints the theory."""
        shape = (32, 32, 3) if self.network.net == "cnn" else (784,)
        network = _chosen(self.network.network(shape), self.gamma, self.vanilla)
        with jax.enable_x64():
            theory = analyze_network(
                network, statistics=self.statistics, num_samples=self.num_samples
            )
            dataset = theory.to_xarray(self.momentum)
        if self.json:
            print(json.dumps(_plain(dataset), indent=2))
            return
        console = Console()
        console.print(repr(network), highlight=False)
        console.print(_order_table(dataset))
        console.print(_fisher_table(theory, dataset))
        if not dataset.outlier_limited.item():
            console.print(
                "The bulk, not the outliers, limits this network: at finite width lambda_max may "
                "be twice as high, and eta_max half. Widen it, or make it less deep."
            )


@dataclasses.dataclass(frozen=True)
class Validate:
    """Theory against measurement, with and without BatchNorm, over gamma: table, PNG and NetCDF."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = NetworkOptions()
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = DataOptions()
    gammas: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0)
    """Scales of BatchNorm."""
    draws: int = 3
    """Networks drawn at random for each."""
    num_eigenvalues: int | None = None
    """Compare so many of the kernel's eigenvalues, too, with theory of these very inputs."""
    momentum: float = 0.9
    """Momentum of gradient descent."""
    output: Path = Path("meanfield-jax-validate")
    """Where the picture (.png) and the numbers (.nc) go."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Measures, prints the table and writes the files."""
        _check_folder(self.output)
        network = self.network.network(self.inputs.shape(self.network.net))
        x = self.inputs.load(network)
        dataset = validate(
            network,
            x,
            gammas=self.gammas if has_batch_norm(network) else (),
            draws=self.draws,
            num_eigenvalues=self.num_eigenvalues,
            momentum=self.momentum,
            seed=self.inputs.seed,
            progress=True,
        )
        dataset.attrs["data"] = self.inputs.data
        written = [_write(self.output.with_suffix(".nc"), dataset.to_netcdf)]
        if "curve" in dataset:
            save = lambda path: plot_validation(dataset).savefig(path, format="png", dpi=160)  # noqa: E731
            written.append(_write(self.output.with_suffix(".png"), save))
        if self.json:
            print(json.dumps(_plain(dataset), indent=2))
        else:
            Console().print(validation_table(dataset))
            if self.num_eigenvalues is not None:
                Console().print(spectrum_table(dataset))
        print("wrote", *written, file=sys.stderr)
        if not np.isfinite(dataset.measured).all():
            raise ComputationError("a measurement failed; see the NaN in the results")


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The whole Fisher spectrum of one network on data, predicted and measured."""

    network: Annotated[NetworkOptions, tyro.conf.OmitArgPrefixes] = NetworkOptions()
    inputs: Annotated[DataOptions, tyro.conf.OmitArgPrefixes] = DataOptions()
    gamma: float = 1.0
    """Scale of every BatchNorm."""
    statistics: Literal["batch", "frozen"] = "batch"
    """Training or evaluation mode."""
    vanilla: bool = False
    """Leave the BatchNorms out."""
    num_steps: int = 90
    """Lanczos steps of the density."""
    top: int = 20
    """Largest eigenvalues to measure and list."""
    output: Path = Path("meanfield-jax-spectrum")
    """Where the picture (.png) and the numbers (.nc) go."""
    json: bool = False
    """Print JSON instead of the table."""

    def run(self) -> None:
        """Measures, prints the top eigenvalues and writes the files."""
        _check_folder(self.output)
        shape = self.inputs.shape(self.network.net)
        network = _chosen(self.network.network(shape), self.gamma, self.vanilla)
        x = self.inputs.load(network)
        with Console(stderr=True).status("Predicting the spectrum"):
            fisher = analyze_network(network, statistics=self.statistics, data=x).fisher
            predicted = np.repeat(np.asarray(fisher.eigenvalues), fisher.multiplicity)
        model = build(network, rngs=nnx.Rngs(self.inputs.seed))
        if self.statistics == "frozen" and has_batch_norm(network):
            calibrate(model, x)
        op = fisher_operator(model, x, statistics=self.statistics)
        with Console(stderr=True).status("Measuring the spectrum"):
            top = top_eigenvalues(op, self.top).raise_if_failed()
            density = spectral_density(op, num_steps=self.num_steps).raise_if_failed()
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
            num_eigenvalues=int(np.prod(op.shape)),
            predicted=predicted,
            measured=np.asarray(top.eigenvalues),
        )
        save = lambda path: figure.savefig(path, format="png", dpi=160)  # noqa: E731
        written = [
            _write(self.output.with_suffix(".nc"), dataset.to_netcdf),
            _write(self.output.with_suffix(".png"), save),
        ]
        if self.json:
            print(json.dumps(_plain(dataset), indent=2))
        else:
            Console().print(_spectrum_table(dataset))
        print("wrote", *written, file=sys.stderr)


def entry() -> NoReturn:
    """The program: leaves with the status of :func:`main`.

    After an interruption XLA may still compute in the background, and tearing Python down under it
    crashes: the process then ends at once.
    """
    status = main()
    if status == 130:
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class ComputationError(RuntimeError):
    """A computation ended without a usable result."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = _parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(command, int):
        return command
    try:
        command.run()
    except (SpecError, DataError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing half-written is left", 130)
    except BrokenPipeError:
        sys.stdout = None
        return 1
    except (RuntimeError, MemoryError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 1)
    return 0


def _parse(arguments: list[str]) -> Any:
    """The command, or an exit status; what tyro has to say of an error becomes one line."""
    commands = {"analyze": Analyze, "validate": Validate, "spectrum": Spectrum}
    said, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                commands,  # pyright: ignore[reportArgumentType]
                prog="meanfield-jax",
                description="Mean-field theory of neural networks, held against the real network",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            print(said.getvalue(), end="")
            return 0
        return _fail(_one_line(errors.getvalue() or said.getvalue()), 2)


def _one_line(message: str) -> str:
    """A boxed message with hints as one line: boxes, colours and all but the cause left out."""
    words = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{3,}", " ", message)
    cause = re.split(r"Perhaps you meant|For full helptext", words)[0]
    # the box's title may say what the text says again
    return re.sub(r"^(.{4,}?) \1", r"\1", " ".join(cause.split())) + "; see --help"


def _fail(message: str, status: int) -> int:
    print(f"meanfield-jax: {message}", file=sys.stderr)
    return status


def _chosen(network: Network, gamma: float, vanilla: bool) -> Network:
    return without_batch_norm(network) if vanilla else with_gamma(network, gamma)


def _check_folder(output: Path) -> None:
    """Finds out before the work whether the results can be written."""
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        cause = "its folder does not exist or cannot be written"
        raise problem(SpecError, "--output", str(output), cause, "name a file in a folder of yours")


def _write(path: Path, save: Callable[[Path], Any]) -> str:
    """Writes a file wholly or not at all."""
    with _temporary(path) as unfinished:
        save(unfinished)
        unfinished.replace(path)
    return str(path)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _plain(dataset: xr.Dataset) -> dict[str, Any]:
    """A data set as plain dictionaries and lists; what is not finite as null."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value.item() if isinstance(value, np.generic) else value

    variables = {
        str(name): dict(dims=list(array.dims), values=convert(array.values.tolist()))
        for name, array in dataset.variables.items()
    }
    return dict(attributes={k: convert(v) for k, v in dataset.attrs.items()}, variables=variables)


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


def _spectrum_table(dataset: xr.Dataset) -> Table:
    low, high = dataset.outlier_low, dataset.outlier_high
    caption = f"theory: mean over draws; outliers of one draw {low:.4g} to {high:.4g}"
    table = Table(title="Largest eigenvalues of F", caption=caption)
    for name in ("rank", "measured", "predicted", "ratio"):
        table.add_column(name, justify="right")
    pairs = zip(dataset.eigenvalues.values, dataset.predicted.values, strict=False)
    for rank, (measured, predicted) in enumerate(pairs):
        ratio = predicted / measured
        table.add_row(str(rank + 1), f"{measured:.5g}", f"{predicted:.5g}", f"{ratio:.3f}")
    return table


if __name__ == "__main__":
    entry()
