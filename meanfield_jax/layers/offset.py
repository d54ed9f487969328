"""Offset: trainable numbers that are added, such as the embedding of positions."""

import math
from collections.abc import Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Problem,
    Shape,
    layer,
    tunable,
    variance_problems,
)
from meanfield_jax.layers.norm import of_rank
from meanfield_jax.pytree import static


@layer
class Offset(Layer):
    """z + b, with a trainable b ~ N(0, bias_var) for every position and channel.

    Rule, at equal positions: K <- K + bias_var;  T <- T + 1.

    Attributes:
        bias_var: Variance of b at the start; Flax's vision transformer has .0004.
        per: ``"position"``: one number for every position and channel; ``"channel"``: the same at
            all positions.

    Example:
        >>> import meanfield_jax as mf
        >>> layers = mf.Conv(16, 4, 4), mf.Offset(), mf.SelfAttention(4), mf.GlobalMeanPool()
        >>> mf.Network((16, 16, 3), (*layers, mf.Dense(10))).num_parameters
        2298

    Source:
        Dosovitskiy et al. 2021 (arXiv:2010.11929), equation 1.

    Accuracy:
        That of the wide limit (tests/test_contract.py).
    """

    on_parts: ClassVar[str | None] = "each"
    linear: ClassVar[bool] = True

    bias_var: float | Array = tunable(0.0004, positive=True)
    per: str = static(default="position", choices=("position", "channel"))

    def parameter_shape(self, shape: Shape) -> Shape:
        """The shape of b."""
        return shape if self.per == "position" else shape[-1:]

    def num_parameters(self, shape: Shape) -> int:
        return math.prod(self.parameter_shape(shape))

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection]:
        kernel = kernel.with_one_mean()
        moment = kernel.moment
        ones = moment.full(1.0)
        if self.per == "position":
            ones = moment.at_equal_positions(1.0)
        after = kernel.after(
            covariance=kernel.covariance + ones * self.bias_var,
            tangent=kernel.effective_tangent,
            mean=kernel.mean,
            unit_mean=kernel.unit_mean,
            shared=kernel.shared,
            shared_tangent=kernel.shared_tangent,
        )
        return after, Injection(offset=ones)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        drawn = jax.random.normal(rngs.params(), self.parameter_shape(shape))
        return OffsetModule(nnx.Param(drawn * jnp.sqrt(jnp.asarray(self.bias_var, drawn.dtype))))

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "bias_var")


class OffsetModule(nnx.Module):
    """The input plus a parameter."""

    def __init__(self, offset: nnx.Variable):
        self.offset = offset

    def __call__(self, x: Array) -> Array:
        """The sum, of x's shape and dtype."""
        return x + of_rank(self.offset[...], x.ndim).astype(x.dtype)
