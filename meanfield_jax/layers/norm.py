"""What normalization layers share: scale, offset, and what they add to the tangent."""

import dataclasses
import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Matrix,
    Problem,
    Shape,
    static,
    variance_problems,
)


@dataclasses.dataclass(frozen=True, repr=False)
class Norm(Layer):
    """gamma z_hat + beta: what is normalized, and over what, is the subclass's.

    Attributes:
        gamma: Initial scale, the same for all channels.
        beta: Initial offset.
        eps: Added to the variance.
        trainable: Whether scale and offset are parameters (of the Fisher matrix, of the module).
    """

    over_batch: ClassVar[bool] = False
    """Whether outputs depend on the batch in training, and on running statistics after."""

    gamma: float | Array = 1.0
    beta: float | Array = 0.0
    eps: float | Array = 1e-5
    trainable: bool = static(True)

    def meets_positions(self, vary: bool) -> bool:
        """Whether pairs of distinct positions count; ``vary``: whether positions differ."""
        return False

    def parameter_shape(self, shape: Shape) -> Shape:
        """The shape of scale and offset."""
        return shape[-1:]

    def num_parameters(self, shape: Shape) -> int:
        return 2 * math.prod(self.parameter_shape(shape)) if self.trainable else 0

    def affine(
        self, kernel: Kernel, correlation: Matrix, tangent: Matrix, shared: Array | float = 1.0
    ) -> tuple[Kernel, Injection | None]:
        """The kernel behind gamma z_hat + beta, and what the two add to its tangent.

        Args:
            kernel: Before the layer.
            correlation: Of z_hat.
            tangent: Of z_hat.
            shared: 1 for pairs of values with the same scale and offset, else 0.
        """
        behind = kernel.behind(
            cov=jax.tree.map(lambda entry: self.gamma**2 * entry, correlation),
            tangent=jax.tree.map(lambda entry: self.gamma**2 * entry, tangent),
            # None for an offset that is known to be 0
            mean=None if self.beta is None else jnp.asarray(self.beta, kernel.dtype),
        )
        if not self.trainable:
            return behind, None
        return behind, Injection(
            offset=jax.tree.map(lambda entry: shared * jnp.ones_like(entry), correlation),
            scale=jax.tree.map(lambda entry: shared * entry, correlation),
        )

    def parameters(self, shape: Shape) -> tuple[nnx.Variable, nnx.Variable]:
        """Scale and offset of the module: parameters, or variables that do not learn."""
        variable = nnx.Param if self.trainable else nnx.Variable
        size = self.parameter_shape(shape)
        scale, bias = (jnp.full(size, value, jnp.float32) for value in (self.gamma, self.beta))
        return variable(scale), variable(bias)

    def value_problems(self) -> Iterator[Problem]:
        for field in ("gamma", "beta"):
            value = getattr(self, field)
            if not np.all(np.isfinite(value)):
                yield field, value, "not a finite number", "give a finite number"
        yield from variance_problems(self, "eps")


def statistics_dtype(x: Array) -> jnp.dtype:
    """The dtype of means and variances: that of x, but float32 for half precision."""
    return jnp.promote_types(x.dtype, jnp.float32)


def normalize(
    x: Array, mean: Array, var: Array, scale: Array | float, bias: Array | float, eps: float
) -> Array:
    """Scale (x - mean) / sqrt(var + eps) + bias, broadcast; of x's dtype."""
    y = (x - mean) * (scale * jax.lax.rsqrt(var + eps)) + bias
    return y.astype(x.dtype)
