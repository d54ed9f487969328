"""Statistics of the Fisher information matrix, from the tangent kernel of the outputs."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shares:
    """What each layer's parameters contribute to the outlier; all together they sum up to it.

    Attributes:
        weights: Of the weights, (layers,); their sum is the bound of Wei et al. 2019.
        biases: Of the biases, (layers,).
        norm: Of a BatchNorm's scale and offset, (layers,).
        layers: Paths of the layers with parameters.
    """

    weights: Array
    biases: Array
    norm: Array
    layers: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fisher:
    """The spectrum of F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T, by its statistics.

    In the wide limit the eigenvalues of F are those of T/n, T the n x n tangent kernel of one
    output, each C times. All trainable parameters count.

    Attributes:
        tangent_same: T for one sample with itself, <grad f_k(x), grad f_k(x)>.
        tangent_other: T for two samples.
        inverse_samples: 1/n; 0 in the limit.
        shares: The outlier by layer.
        num_outputs: C.
        num_parameters: P.

    Source:
        Karakida, Akaho & Amari 2019 (arXiv:1806.01316), theorems 1 and 2.
    """

    STATISTICS: ClassVar[tuple[str, ...]] = (
        "tangent_same",
        "tangent_other",
        "outlier",
        "bulk",
        "trace",
        "mean",
        "second_moment",
        "lambda_max",
    )

    tangent_same: Array
    tangent_other: Array
    inverse_samples: Array
    shares: Shares
    num_outputs: int = dataclasses.field(metadata=dict(static=True))
    num_parameters: int = dataclasses.field(metadata=dict(static=True))

    @property
    def outlier(self) -> Array:
        """The large eigenvalue, of multiplicity C: T_same/n + (n-1)/n T_other."""
        share = self.inverse_samples
        return share * self.tangent_same + (1 - share) * self.tangent_other

    @property
    def bulk(self) -> Array:
        """The other C (n-1) eigenvalues: (T_same - T_other)/n."""
        return self.inverse_samples * (self.tangent_same - self.tangent_other)

    @property
    def lambda_max(self) -> Array:
        """The larger one of outlier and bulk."""
        return jnp.maximum(self.outlier, self.bulk)

    @property
    def trace(self) -> Array:
        """Sum of all eigenvalues, C T_same; an upper bound of lambda_max."""
        return self.num_outputs * self.tangent_same

    @property
    def mean(self) -> Array:
        """Mean of all P eigenvalues, trace/P."""
        return self.trace / self.num_parameters

    @property
    def second_moment(self) -> Array:
        """Mean of the squares of all P eigenvalues."""
        share = self.inverse_samples
        square = (1 - share) * self.tangent_other**2 + share * self.tangent_same**2
        return self.num_outputs * square / self.num_parameters
