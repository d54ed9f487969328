"""CrossIterationBatchNorm: BatchNorm with the statistics of recent batches, brought up to date."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import Layer, Shape, Signal, layer
from meanfield_jax.layers.batch_norm import BatchNorm, BatchNormModule, batch_statistics
from meanfield_jax.layers.combine import Sequential
from meanfield_jax.layers.conv import Conv
from meanfield_jax.layers.dense import Dense
from meanfield_jax.layers.norm import normalize, of_rank, statistics_dtype
from meanfield_jax.precise import matmul
from meanfield_jax.pytree import static


@layer
class CrossIterationBatchNorm(Sequential):
    r"""Weights and BatchNorm, with statistics averaged over the last iterations.

    The statistics mu and nu (first and second moment of a channel) of s iterations ago belong to
    other weights. They are brought up to date to first order in the weights directly before,

    .. math:: \mu_{t-s}(w_t) \approx \mu_{t-s} + \langle d\mu_{t-s}/dw, w_t - w_{t-s} \rangle,

    and likewise for nu. The mean is the average of the mu; the variance is the average of
    max(nu, mu^2) minus the square of the mean. Past statistics are constants for the gradient.
    Running statistics are averages of those of the current batch alone, and evaluation is that of
    BatchNorm.

    Rule: that of [weights, BatchNorm], to which it is equal at the start, when there is no past.

    Attributes:
        layers: Weights (Dense or Conv) and BatchNorm over channels. Without the weights it can be
            passed as ``norm`` to the presets, which insert theirs; if no weights come directly
            before it, its BatchNorm is used alone.
        window: k, the number of iterations whose statistics are averaged, including the current.
        burn_in: Iterations that use the current statistics alone, while weights change fast; the
            paper takes 8 epochs.
        compensate: Whether old statistics are brought up to date.

    Source:
        Yao, Cao, Zheng, Huang & Lin 2020 (arXiv:2002.05712), equations 5 to 9.

        Departure: the paper's weights have no biases. Here the bias is left out of the statistics
        in training, where BatchNorm cancels it, so that old statistics need no correction for it.
    """

    norm_name: ClassVar[str | None] = "cross_iteration"
    abbreviation: ClassVar[str] = "CBN"

    layers: tuple[Layer, ...] = (BatchNorm(),)
    window: int = static(default=4, least=1)
    burn_in: int = static(default=0)
    compensate: bool = static(default=True)

    def __post_init__(self):
        super().__post_init__()
        if self.burn_in < 0:
            name = "CrossIterationBatchNorm.burn_in"
            cause, remedy = "must be an integer of at least 0", "pass a number of iterations"
            raise problem(SpecError, name, self.burn_in, cause, remedy)

    def signals(self, signal: Signal) -> list[Signal]:
        kinds = [type(inner) for inner in self.layers]
        over_channels = bool(kinds) and getattr(self.layers[-1], "axes", None) == "channel"
        if kinds not in ([Dense, BatchNorm], [Conv, BatchNorm]) or not over_channels:
            names = tuple(kind.__name__ for kind in kinds)
            cause = "it needs weights and BatchNorm over channels"
            remedy = "pass (Dense or Conv, BatchNorm()), or use the layer as norm= in a preset"
            raise problem(SpecError, "CrossIterationBatchNorm.layers", names, cause, remedy)
        return super().signals(signal)

    def around(self, weights: Layer | None, activation: Layer | None) -> tuple[Layer, ...]:
        whole = () if weights is None else (self.replace(layers=(weights, *self.layers)),)
        return (*(whole or self.layers), *(() if activation is None else (activation,)))

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (*self.layers[:-1], None)

    def changed(self, change: Callable[[Layer], Layer]) -> Sequential:
        return self.replace(layers=super().changed(change).layers)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        weights, norm = self.modules(shape, rngs)
        assert isinstance(norm, BatchNormModule)
        return CrossIterationBatchNormModule(
            weights, norm, window=self.window, burn_in=self.burn_in, compensate=self.compensate
        )


def averaged(
    mean: Array, second: Array, past: tuple[Array, Array], counts: Array
) -> tuple[Array, Array]:
    """Mean and variance from the moments of the current batch and of some past ones.

    Args:
        mean: Mean of the current batch, (channels,).
        second: Second moment of the current batch, (channels,).
        past: The same moments of past batches at the current weights, (window - 1, channels) each.
        counts: 1 for each past batch to be included, else 0, (window - 1,).

    Returns:
        The mean and the variance, (channels,) each.
    """
    total = 1 + counts.sum()
    old_mean, old_second = past
    mean = (mean + matmul(counts, old_mean)) / total
    second = (second + matmul(counts, jnp.maximum(old_second, old_mean**2))) / total
    return mean, second - mean**2


def along(slopes: Array, kernel: Array) -> Array:
    """<slope, w> for every channel, (..., channels); slopes are (..., *kernel), or one for all."""
    return jnp.sum(slopes * of_rank(kernel, slopes.ndim), tuple(range(-kernel.ndim, -1)))


class Past(nnx.Variable):
    """What a module keeps of its last iterations; unlike running statistics, only for training."""


class CrossIterationBatchNormModule(nnx.Module):
    """The Flax module of :class:`CrossIterationBatchNorm`.

    Past moments are kept as affine functions of the weights (their value at zero weights and their
    slope), so that past weights need not be kept.

    Args:
        weights: Any ``nnx.Linear`` or ``nnx.Conv``, from this package or from another model.
        norm: The BatchNorm module after it, with scale, offset and running statistics.
        window: k, the number of iterations whose statistics are averaged.
        burn_in: Iterations that use the current statistics alone.
        compensate: Whether old statistics are brought up to date.
    """

    def __init__(
        self,
        weights: Any,
        norm: BatchNormModule,
        *,
        window: int = 4,
        burn_in: int = 0,
        compensate: bool = True,
    ):
        self.layers = nnx.List([weights, norm])
        self.window, self.burn_in, self.compensate = window, burn_in, compensate
        kernel = weights.kernel[...]
        dtype = statistics_dtype(kernel)

        def empty(*shape: int) -> Past:
            return Past(jnp.zeros((window - 1, *shape), dtype))

        self.iterations = Past(jnp.zeros((), jnp.int32))
        self.mean, self.second = empty(kernel.shape[-1]), empty(kernel.shape[-1])
        # channels that see the same inputs have the same slope of the mean
        alike = getattr(weights, "feature_group_count", 1) == 1
        self.mean_slope = empty(*kernel.shape[:-1], 1 if alike else kernel.shape[-1])
        self.second_slope = empty(*kernel.shape)

    def __call__(self, x: Array) -> Array:
        """Applies weights and normalization to x, (samples, *positions, channels)."""
        weights, norm = self.layers
        y = weights(x)
        if norm.use_running_average:
            return norm(y)
        bias = 0.0 if weights.bias is None else weights.bias[...]
        z = y.astype(statistics_dtype(y)) - of_rank(bias, y.ndim)
        own = batch_statistics(z, tuple(range(z.ndim - 1)), norm.axis_name)
        norm.average(own[0] + bias, own[1])
        mean, var = own if self.window == 1 else self.statistics(x, z, *own)
        scaled = normalize(z, mean, var, norm.scale[...], norm.bias[...], norm.eps)
        return scaled.astype(y.dtype)

    def statistics(self, x: Array, z: Array, mean: Array, var: Array) -> tuple[Array, Array]:
        """Mean and variance over the window; adds the current batch to it."""
        count, second = self.iterations[...], var + mean**2
        slots = jnp.arange(self.window - 1)
        counts = ((slots < count) & (count >= self.burn_in)).astype(mean.dtype)
        weights: Any = self.layers[0]
        kernel = jax.lax.stop_gradient(weights.kernel[...])
        past = (
            self.mean[...] + along(self.mean_slope[...], kernel),
            self.second[...] + along(self.second_slope[...], kernel),
        )
        statistics = averaged(mean, second, past, counts)
        slopes = self._slopes(x, z)
        if not self.compensate:
            slopes = jax.tree.map(jnp.zeros_like, slopes)
        at_zero = (mean - along(slopes[0], kernel), second - along(slopes[1], kernel))
        slot = count % (self.window - 1)
        kept = (self.mean, self.second, self.mean_slope, self.second_slope)
        for variable, new in zip(kept, (*at_zero, *slopes), strict=True):
            old = variable[...]
            variable[...] = old.at[slot].set(jax.lax.stop_gradient(new).astype(old.dtype))
        self.iterations[...] = count + 1
        return statistics

    def _slopes(self, x: Array, z: Array) -> tuple[Array, Array]:
        """Derivatives of the batch's moments with respect to each channel's own weights."""
        weights, norm = self.layers
        graph, kernel, rest = nnx.split(weights, nnx.PathContains("kernel"), ...)

        def pulled(x: Array, cotangent: Array) -> Array:
            def apply(kernel):
                return nnx.merge(graph, kernel, rest, copy=True)(x)

            y, pull = jax.vjp(apply, kernel)
            (slope,) = jax.tree.leaves(pull(jnp.broadcast_to(cotangent, y.shape).astype(y.dtype)))
            return slope if norm.axis_name is None else jax.lax.pmean(slope, norm.axis_name)

        x, z = jax.lax.stop_gradient((x, z))
        positions = math.prod(z.shape[1:-1])
        # the mean of an affine function of x is the function of the mean of x
        mean = pulled(x.mean(0, keepdims=True), jnp.asarray(1 / positions))
        mean = mean[..., : self.mean_slope.shape[-1]]
        return mean, pulled(x, 2 * z / (len(z) * positions))
