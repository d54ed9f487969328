"""What normalization layers have in common: scale, offset, and their terms in the tangent."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.core import Tracer

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Matrix,
    Problem,
    Shape,
    Signal,
    tunable,
    variance_problems,
)
from meanfield_jax.pytree import static


@dataclasses.dataclass(frozen=True, repr=False)
class Norm(Layer):
    """gamma z_hat + beta; each subclass defines what z_hat is normalized over.

    Attributes:
        gamma: Initial scale, the same for all channels.
        beta: Initial offset, the same for all channels.
        eps: Added to the variance.
        trainable: Whether scale and offset are parameters, in the Fisher matrix and in the module.
        use_bias: Whether the offset is a parameter; else it stays at beta.
    """

    is_norm: ClassVar[bool] = True

    gamma: float | Array = tunable(1.0, positive=True)
    beta: float | Array = tunable(0.0, positive=False)
    eps: float | Array = 1e-5
    trainable: bool = static(default=True)
    use_bias: bool = static(default=True, keyword=True)

    def opened(self, norm: Layer | None) -> tuple[Layer | None, ...]:
        return (None,)

    def parameter_shape(self, shape: Shape) -> Shape:
        """The shape of scale and offset."""
        return shape[-1:]

    def num_parameters(self, shape: Shape) -> int:
        return self.trainable * (1 + self.use_bias) * math.prod(self.parameter_shape(shape))

    def gain(self, matrix: Matrix, var: Array) -> Array:
        """1 / (s_a s_b) for every pair of values, with s^2 = var + eps for each value."""
        var = var + self.eps
        inverse = safe.divide(jnp.ones_like(var), safe.sqrt(var))
        a, b = matrix.of_members(inverse)
        return a * b

    def affine(
        self, kernel: Kernel, correlation: Matrix, tangent: Matrix, alike: Array | float = 1.0
    ) -> tuple[Kernel, Injection | None]:
        """The kernel after gamma z_hat + beta, and what gamma and beta add to its tangent.

        Args:
            kernel: The kernel before the layer.
            correlation: Correlation of z_hat.
            tangent: Tangent of z_hat.
            alike: 1 for pairs of values with the same scale and offset, else 0.

        Returns:
            As :meth:`meanfield_jax.Layer.rule`; the injection is None if scale and offset are not
            trained.
        """
        beta: Any = self.beta  # None if it is known to be 0
        after = kernel.after(
            covariance=correlation * self.gamma**2,
            tangent=tangent * self.gamma**2,
            mean=None if beta is None else jnp.asarray(beta, kernel.dtype),
        )
        if not self.trainable:
            return after, None
        offset = correlation.full(1.0) * alike if self.use_bias else None
        return after, Injection(offset=offset, scale=correlation * alike)

    def parameters(self, shape: Shape) -> tuple[nnx.Variable, nnx.Variable]:
        """Scale and offset of the module: parameters, or variables that are not trained."""
        trained = self.trainable, self.trainable and self.use_bias
        scale_kind, bias_kind = (nnx.Param if kind else nnx.Variable for kind in trained)
        size = self.parameter_shape(shape)
        scale, bias = (jnp.full(size, value, jnp.float32) for value in (self.gamma, self.beta))
        return scale_kind(scale), bias_kind(bias)

    def value_problems(self) -> Iterator[Problem]:
        for field in ("gamma", "beta"):
            value = getattr(self, field)
            if not np.all(np.isfinite(value)):
                yield field, value, "must be finite", "pass a finite number"
        yield from variance_problems(self, "eps")


class FlaxNorm(nnx.Module):
    """A Flax norm without scale and offset, followed by those of a specification.

    Statistics of half-precision inputs are float32; the output has the input's dtype.

    Attributes:
        norm: The Flax module.
    """

    def __init__(self, norm: Callable[[Array], Array], spec: Norm, shape: Shape):
        self.norm = norm
        self.scale, self.bias = spec.parameters(shape)

    def __call__(self, x: Array) -> Array:
        """Normalizes x of shape (samples, *positions, channels)."""
        y = self.norm(x.astype(statistics_dtype(x)))
        scale, bias = (of_rank(value[...], x.ndim) for value in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


def flax_options(spec: Norm, rngs: nnx.Rngs) -> dict[str, Any]:
    """The options of a Flax norm inside a :class:`FlaxNorm`."""
    options: dict[str, Any] = dict(use_scale=False, use_bias=False, use_fast_variance=False)
    return dict(epsilon=constant(spec.eps), rngs=rngs, **options)


def constant(value: float | Array) -> float | Array:
    """A number in the form in which a module holds it."""
    return nnx.data(value) if isinstance(value, Tracer) else float(value)


def check_gaussian(name: str, signal: Signal) -> None:
    """Raises SpecError if units need not have mean 0 over the channels of a sample."""
    if not signal.gaussian:
        cause = "it needs Gaussian inputs, but these are not sums over many random weights"
        raise problem(SpecError, name, signal.shape, cause, "put it after a Dense or Conv")


MOST_GROUPS, LEAST_CHANNELS = 8, 4
"""The most groups that :func:`fitting_groups` chooses, and the fewest channels per group."""


MOST_DIVISOR = 10_000
"""The largest divisor of a number of channels that a message names."""


def fitting_groups(widths: Sequence[int]) -> int:
    """A number of groups that divides each of these numbers of channels."""
    common = math.gcd(*widths)
    most = max(1, min(MOST_GROUPS, min(widths) // LEAST_CHANNELS))
    return max(count for count in range(1, most + 1) if common % count == 0)


def check_groups(name: str, num_groups: int, channels: int) -> None:
    """Raises SpecError if the number of groups does not divide the number of channels."""
    if channels % num_groups:
        few = range(1, min(channels, MOST_DIVISOR) + 1)
        divisors = [str(count) for count in few if channels % count == 0]
        cause = f"it does not divide {channels} channels"
        remedy = f"use {', '.join(divisors[-12:])}"
        raise problem(SpecError, f"{name}.num_groups", num_groups, cause, remedy)


def statistics_dtype(x: Array) -> jnp.dtype:
    """The dtype of means and variances: that of x, but float32 if x is in half precision."""
    return jnp.promote_types(x.dtype, jnp.float32)


def of_rank(value: Array | float, ndim: int) -> Array:
    """The value with leading axes of size 1, which JAX can be configured not to add by itself."""
    return jnp.expand_dims(value, range(ndim - jnp.ndim(value)))


def normalize(
    x: Array, mean: Array, var: Array, scale: Array | float, bias: Array | float, eps: Array | float
) -> Array:
    """Computes scale (x - mean) / sqrt(var + eps) + bias by broadcasting, in the dtype of x."""
    mean, var, scale, bias = (of_rank(value, x.ndim) for value in (mean, var, scale, bias))
    y = (x - mean) * (scale * jax.lax.rsqrt(var + eps)) + bias
    return y.astype(x.dtype)
