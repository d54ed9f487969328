"""Options common to several commands: the network and its inputs."""

import dataclasses
import stat
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from meanfield_jax import data
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import BatchNorm
from meanfield_jax.network import Network
from meanfield_jax.presets import cnn, mlp, preact_resnet
from meanfield_jax.variants import with_gamma, without_norms

LARGEST_SPEC = 2**24
"""Bytes; a network of 50,000 layers has that many."""

MOST = 10**6
"""Values of a range that is given by its ends and their number."""


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """The network; the default is that of the paper, 784-1000x3-10 or conv 30-60-90."""

    net: Literal["mlp", "cnn", "resnet"] = "mlp"
    """Fully connected, convolutional (3x3, stride 2), or residual (two blocks per stage)."""
    widths: tuple[int, ...] = ()
    """Units or channels of each layer or stage [mlp: 1000 1000 1000, cnn: 30 60 90, resnet: 16 32
    64]."""
    activation: str = "relu"
    """Activation: relu, leaky_relu, tanh, erf, gelu, silu or identity."""
    weight_var: float = 2.0
    """sigma_w^2, the variance of a weight times the fan-in."""
    bias_var: float = 0.5
    """sigma_b^2, the variance of a bias."""
    axes: Literal["channel", "position"] = "channel"
    """Whether BatchNorm on maps has one mean and variance per channel, or one per position and
    channel."""
    head: Literal["flatten", "mean"] = "flatten"
    """How a cnn turns its last map into a vector."""
    spec: Path | None = None
    """A file with a network saved by Network.to_json, in place of all the options above."""

    def network(self, shape: tuple[int, ...], outputs: int = 10) -> Network:
        """The specification, with BatchNorms, for inputs of this shape; or that of ``spec``."""
        if self.spec is not None:
            return Network.from_json(_text(self.spec))
        options: dict[str, Any] = dict(
            activation=self.activation,
            weight_var=self.weight_var,
            bias_var=self.bias_var,
            norm=BatchNorm(axes=self.axes),
            outputs=outputs,
        )
        if self.net == "mlp":
            return mlp(self.widths or (1000,) * 3, inputs=int(np.prod(shape)), **options)
        if self.net == "resnet":
            return preact_resnet(self.widths or (16, 32, 64), inputs=shape, **options)
        return cnn(self.widths or (30, 60, 90), inputs=shape, head=self.head, **options)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The inputs."""

    data: Literal["gaussian", "digits", "mnist", "fashion_mnist", "cifar10"] = "gaussian"
    """Data set. Gaussian noise needs no files; files of the others are read from --data-dir, or
    downloaded if they are not there."""
    num_samples: int = 1000
    """Number of samples n: the batch of a Fisher matrix, or the training samples."""
    data_dir: Path | None = None
    """Folder of the data files [$MEANFIELD_JAX_DATA]."""
    seed: int = 0
    """Seed of the inputs and of the first network."""

    def shape(self, net: str) -> tuple[int, ...]:
        """Shape of one sample."""
        return (32, 32, 3) if self.data == "gaussian" and net != "mlp" else data.shape_of(self.data)

    def load(self, network: Network) -> tuple[jax.Array, np.ndarray]:
        """The inputs, in the shape that the network takes, and their labels."""
        return self._load(network, "train", self.num_samples)

    def load_test(
        self, network: Network, num_samples: int | None, default: int
    ) -> tuple[jax.Array, np.ndarray]:
        """Test samples likewise; without a number, the default or all if there are fewer."""
        x, labels = self._load(network, "test", num_samples)
        most = num_samples or default
        return x[:most], labels[:most]

    def _load(
        self, network: Network, split: str, num_samples: int | None
    ) -> tuple[jax.Array, np.ndarray]:
        shape = network.input_shape
        x, labels = data.load(
            self.data,
            split=split,
            num_samples=num_samples,
            data_dir=self.data_dir,
            seed=self.seed,
            flatten=len(shape) == 1,
            shape=shape if self.data == "gaussian" else None,
        )
        return jnp.asarray(x), labels


def _text(path: Path) -> str:
    """The text of a specification; raises SpecError, and never waits or reads without end."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            cause = "it is not a regular file"
        elif about.st_size > LARGEST_SPEC:
            cause = f"it has {about.st_size:,} bytes, above the {LARGEST_SPEC:,} of any network"
        else:
            return path.read_text("utf-8")
    except (OSError, ValueError) as error:  # also a path with a null byte
        cause = getattr(error, "strerror", None) or "it is not a text file"
    remedy = "use a file written by Network.to_json"
    raise problem(SpecError, "--spec", str(path), cause, remedy)


def chosen(network: Network, gamma: float, vanilla: bool) -> Network:
    """The network with this scale in its norms, or without norms."""
    return without_norms(network) if vanilla else with_gamma(network, gamma)
