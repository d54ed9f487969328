"""Statistics of the Fisher information matrix, from the tangent kernel of the outputs."""

import functools
import math
import operator
from typing import ClassVar

import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from meanfield_jax.empirical.draws import DrawnEigenvalues
from meanfield_jax.pytree import pytree, static

MOST_FLUCTUATION = 5 / 3
"""Largest ``variance_fluctuation`` for which ``lambda_max`` is trusted: that of five directions."""

MARGIN = 2.0
"""Allowance for the bulk's edge in units of ``bulk_high``; 1.3 to 2.2 measured at finite width."""


@pytree
class Contributions:
    """What each layer's parameters contribute to the outlier; all contributions sum to it.

    Attributes:
        weights: Contributions of the weights; their sum is the bound of Wei et al. 2019.
        biases: Contributions of the biases.
        norm: Contributions of a BatchNorm's scale and offset.
        layers: Paths of the layers with parameters.
    """

    weights: Float[Array, "*batch layers"]
    biases: Float[Array, "*batch layers"]
    norm: Float[Array, "*batch layers"]
    layers: tuple[str, ...] = static()


@pytree
class Fisher:
    """Statistics of the spectrum of F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T.

    In the wide limit the eigenvalues of F are those of T/n, each C times, where T is the n x n
    tangent kernel of one output. All trainable parameters count. With a categorical likelihood
    F = (1/n) sum_i J_i^T S_i J_i, where S_i = diag(p_i) - p_i p_i^T for class probabilities p_i.

    Attributes:
        tangent_same: T for one sample with itself, <grad f_k(x), grad f_k(x)>; on data the mean.
        tangent_other: T for two samples; on data the mean.
        inverse_samples: 1/n; 0 in the limit.
        contributions: Contributions to the outlier by layer.
        bulk_contributions: Contributions to ``bulk`` by layer.
        draw_width: By layer, relative width of the range of the C outliers in one draw, (layers,);
            see ``outlier_high``.
        information: Eigenvalues of the mean S_i, ascending, (C,); ones for a Gaussian likelihood.
        num_parameters: The number of parameters, P.
        eigenvalues: On data, descending: the n eigenvalues of T/n, each of which F has C times, or
            with a categorical likelihood all n C eigenvalues of F. None for i.i.d. inputs, where
            T/n has a large eigenvalue and n - 1 equal to (T_same - T_other)/n.
        multiplicity: How many times F has each of ``eigenvalues``.
        variance_fluctuation: The largest E[1 / variance] E[variance], over random weights, of the
            values that are normalized over a batch of data, or over positions and a group of
            channels: r / (r - 2) if they vary equally in r directions.
        drawn: The largest eigenvalues of drawn networks, if ``analyze`` was given ``draws``; they
            take the place of ``lambda_max`` of the wide limit.

    Accuracy:
        Where the S_i differ, ``eigenvalues`` couples the largest 1000 / C eigenvectors of T. The
        eigenvalue of every other eigenvector u is multiplied by the eigenvalues of sum_i u_i^2 S_i
        (first order). The trace is exact.

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
        "outlier_low",
        "outlier_high",
        "bulk_high",
        "lambda_max",
        "within_domain",
    )

    tangent_same: Float[Array, "*batch"]
    tangent_other: Float[Array, "*batch"]
    inverse_samples: Float[Array, "*batch"]
    contributions: Contributions
    bulk_contributions: Float[Array, "*batch layers"]
    draw_width: Float[Array, "*batch layers"]
    information: Float[Array, "*batch outputs"]
    num_parameters: int = static()
    multiplicity: int = static()
    eigenvalues: Float[Array, "*batch n"] | None = None
    variance_fluctuation: Float[Array, "*batch"] | float = 1.0
    drawn: DrawnEigenvalues | None = None

    @property
    def outlier(self) -> Float[Array, "*batch"]:
        """The large eigenvalue, averaged over draws; its multiplicity is C (uniform p: C - 1).

        For i.i.d. inputs it is T_same/n + (n-1)/n T_other, times the largest of ``information``.
        """
        if self.eigenvalues is not None:
            return self.eigenvalues[..., 0]
        fraction = self.inverse_samples
        large = fraction * self.tangent_same + (1 - fraction) * self.tangent_other
        return large * self.information[..., -1]

    @property
    def bulk(self) -> Float[Array, "*batch"]:
        """The mean of all but the C largest eigenvalues; for i.i.d. inputs (T_same - T_other)/n."""
        if self.eigenvalues is not None:
            return self.eigenvalues[..., self._num_outliers :].mean(-1)
        small = self.inverse_samples * (self.tangent_same - self.tangent_other)
        return small * self.information.mean(-1)

    @property
    def outlier_high(self) -> Float[Array, "*batch"]:
        r"""The largest of the C outliers in one draw.

        .. math:: \sum_l f_l (1 + \sqrt{C \sum_{m > l} 1/N_m})^2

        f_l is the contribution of layer l, and N_m is the width entering the random layer m after
        it. The product of these layers' weights acts on C outputs like a product of Wishart
        matrices.
        """
        return (self._contributions * (1 + self.draw_width) ** 2).sum(-1)

    @property
    def outlier_low(self) -> Float[Array, "*batch"]:
        """The smallest of the C outliers in one draw: ``outlier_high`` with 1 - sqrt(...)."""
        return (self._contributions * jnp.maximum(1 - self.draw_width, 0) ** 2).sum(-1)

    @property
    def bulk_high(self) -> Float[Array, "*batch"]:
        r"""A lower estimate of the bulk's edge in one draw.

        .. math:: \sum_l b_l (1 + \sqrt{2 C \sum_{m > l} 1/N_m})^2

        b_l are ``bulk_contributions``. This is ``outlier_high`` for the C outputs of one sample,
        transmitted by the half of the units that a rectifier lets pass (hence the 2).

        Accuracy:
            The repulsion between samples is neglected: in networks limited by the bulk, the
            measured edge is 1.3 to 2.2 times as high (see ``within_domain``).
        """
        return (self.bulk_contributions * (1 + math.sqrt(2) * self.draw_width) ** 2).sum(-1)

    @property
    def within_domain(self) -> Bool[Array, "*batch"]:
        """Whether ``lambda_max`` can be trusted: the outliers are above twice all else.

        ``outlier_high`` is compared with ``bulk_high``, and on data also ``outlier`` with the
        kernel's second eigenvalue, which varies within one draw as ``outlier`` does. Deep, narrow
        networks and small batches are outside the domain, because finite width lifts their bulk to
        the outliers or beyond. So are data with several strong directions, because their
        eigenvalues repel each other.

        Accuracy:
            ReLU networks with BatchNorm (benchmarks/domain.py), 48 on Gaussian inputs and 40 on
            MNIST: where it is true, every draw's lambda_max was within 3.2 % and 1.4 % of the
            prediction; where it is false, that of the median draw was .99 to 2.2 and .79 to 1.6
            times the prediction. It is false for FC 3072-500x3-10 on 400 CIFAR-10 images, where the
            measured lambda_max was 1.16 times the prediction.
        """
        if self.drawn is not None:
            return jnp.ones(self.tangent_same.shape, bool)
        within = [fraction <= most for fraction, most, _ in self._domain]
        return functools.reduce(operator.and_, within)

    def domain_reason(self) -> str:
        """The reason why ``lambda_max`` cannot be trusted, for one network; "" if it can."""
        found = [
            text.format(float(fraction), most)
            for fraction, most, text in self._domain
            if not bool(fraction <= most)
        ]
        if self.drawn is not None or not found:
            return ""
        return "; ".join([*found, "or draw networks with draws=8"])

    @property
    def _domain(self) -> list[tuple[Array, float, str]]:
        """Ratios, the largest trusted value of each, and what a larger one means."""
        found = [
            (
                self.bulk_high / self.outlier_high,
                1 / MARGIN,
                "the bulk reaches {:.2f} of the outliers (trusted up to {:.2f}), so finite width "
                "may lift it above them: make the network wider or less deep, or the batch larger",
            ),
            (
                jnp.asarray(self.variance_fluctuation),
                MOST_FLUCTUATION,
                "E[1 / variance] E[variance] of a normalization is {:.2f} (trusted up to {:.2f}): "
                "use data that vary in more directions, or larger groups",
            ),
        ]
        if self.eigenvalues is not None:
            second = self.eigenvalues[..., self._num_outliers] / self.outlier
            text = (
                "the kernel's second eigenvalue is {:.2f} of the first (trusted up to {:.2f}), and "
                "eigenvalues repel each other"
            )
            found.append((second, 1 / MARGIN, text))
        return found

    @property
    def _num_outliers(self) -> int:
        """How many of ``eigenvalues`` are the C outliers."""
        return self.information.shape[-1] // self.multiplicity

    @property
    def _contributions(self) -> Float[Array, "*batch layers"]:
        return self.contributions.weights + self.contributions.biases + self.contributions.norm

    @property
    def lambda_max(self) -> Float[Array, "*batch"]:
        """The largest eigenvalue of one draw: the larger of ``outlier_high`` and ``bulk_high``.

        See ``within_domain`` for its domain. With ``draws`` it is that of the median draw.
        """
        if self.drawn is not None:
            return self.drawn.lambda_max.astype(self.tangent_same.dtype)
        return jnp.maximum(self.outlier_high, self.bulk_high)

    @property
    def trace(self) -> Float[Array, "*batch"]:
        """Sum of all eigenvalues, C T_same; an upper bound on lambda_max."""
        return self.information.sum(-1) * self.tangent_same

    @property
    def mean(self) -> Float[Array, "*batch"]:
        """Mean of all P eigenvalues, trace/P."""
        return self.trace / self.num_parameters

    @property
    def second_moment(self) -> Float[Array, "*batch"]:
        """Mean of the squares of all P eigenvalues."""
        fraction = self.inverse_samples
        square = (1 - fraction) * self.tangent_other**2 + fraction * self.tangent_same**2
        total = jnp.sum(self.information**2, -1) * square
        if self.eigenvalues is not None:
            total = self.multiplicity * jnp.sum(self.eigenvalues**2, -1)
        return total / self.num_parameters
