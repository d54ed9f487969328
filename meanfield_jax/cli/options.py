"""Options that commands share: which network, on which inputs."""

import dataclasses
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from meanfield_jax import data
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import BatchNorm
from meanfield_jax.network import Network, cnn, mlp, preact_resnet
from meanfield_jax.variants import with_gamma, without_norms


@dataclasses.dataclass(frozen=True)
class NetworkOptions:
    """Which network; the default is the paper's, 784-1000x3-10 or conv 30-60-90."""

    net: Literal["mlp", "cnn", "resnet"] = "mlp"
    """Fully connected, convolutional (3x3, stride 2), or residual (two blocks a stage)."""
    widths: tuple[int, ...] = ()
    """Units or channels of each layer or stage [mlp: 1000 1000 1000, cnn: 30 60 90, resnet: 16 32
    64]."""
    activation: str = "relu"
    """relu, leaky_relu, tanh, erf, gelu, silu or identity."""
    weight_var: float = 2.0
    """sigma_w^2, the variance of a weight times the fan-in."""
    bias_var: float = 0.5
    """sigma_b^2, the variance of a bias."""
    axes: Literal["channel", "position"] = "channel"
    """What BatchNorm's statistics belong to, for maps."""
    head: Literal["flatten", "mean"] = "flatten"
    """What follows the last map of a cnn."""
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
        if self.net == "resnet":
            return preact_resnet(self.widths or (16, 32, 64), inputs=shape, **options)
        return cnn(self.widths or (30, 60, 90), inputs=shape, head=self.head, **options)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which inputs."""

    data: Literal["gaussian", "digits", "mnist", "fashion_mnist", "cifar10"] = "gaussian"
    """Gaussian noise needs no files; the others are looked for in --data-dir, then downloaded."""
    num_samples: int = 1000
    """n, the samples: the batch of which a Fisher matrix is taken, or what is trained on."""
    data_dir: Path | None = None
    """Folder with the files [$MEANFIELD_JAX_DATA]."""
    seed: int = 0
    """Seed of the inputs and of the first network."""

    def shape(self, net: str) -> tuple[int, ...]:
        """One sample's shape."""
        return (32, 32, 3) if self.data == "gaussian" and net != "mlp" else data.shape_of(self.data)

    def load(
        self, network: Network, split: str = "train", num_samples: int | None = None
    ) -> tuple[jax.Array, np.ndarray]:
        """The inputs in the network's shape, and labels."""
        shape = network.input_shape
        x, labels = data.load(
            self.data,
            split=split,
            num_samples=num_samples or self.num_samples,
            data_dir=self.data_dir,
            seed=self.seed,
            flatten=len(shape) == 1,
            shape=shape if self.data == "gaussian" else None,
        )
        return jnp.asarray(x), labels


def chosen(network: Network, gamma: float, vanilla: bool) -> Network:
    """The network at this scale of its BatchNorms, or without them."""
    return without_norms(network) if vanilla else with_gamma(network, gamma)
