"""Scale: a factor, trainable or not, such as that of LayerScale, SkipInit or ReZero."""

from collections.abc import Iterator
from typing import ClassVar

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
    layer,
    tunable,
)
from meanfield_jax.layers.norm import of_rank
from meanfield_jax.pytree import static

PER = ("channel", "layer", "none")


@layer
class Scale(Layer):
    """value * z, with one trainable factor per channel, one for the layer, or none.

    Rule: K <- value^2 K;  T <- value^2 T + K, where the last term is that of the trainable factors.

    Attributes:
        value: The factor at the start.
        per: ``"channel"`` (LayerScale), ``"layer"`` (SkipInit, ReZero) or ``"none"`` (a constant).

    Source:
        Touvron et al. 2021 (arXiv:2103.17239); De & Smith 2020 (arXiv:2002.10444).

    Accuracy:
        For one factor per layer, the term K in T is its mean over random weights after the layer;
        it does not become sharp as the width grows.
    """

    linear: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "each"

    value: float | Array = tunable(1.0, positive=False)
    per: str = static(default="channel", choices=PER)

    def num_parameters(self, shape: Shape) -> int:
        return {"channel": shape[-1], "layer": 1, "none": 0}[self.per]

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection | None]:
        def scaled(matrix: Matrix | None) -> Matrix | None:
            return None if matrix is None else matrix * self.value**2

        deviation, tangent_deviation = kernel.deviations
        mean, unit_mean = (
            None if part is None else part * self.value for part in (kernel.mean, kernel.unit_mean)
        )
        after = kernel.after(
            covariance=kernel.covariance * self.value**2,
            tangent=kernel.effective_tangent * self.value**2,
            mean=mean,
            unit_mean=unit_mean,
            deviation=scaled(deviation),
            tangent_deviation=scaled(tangent_deviation),
            shared=scaled(kernel.shared),
            shared_tangent=scaled(kernel.shared_tangent),
        )
        moment = kernel.moment
        own = Injection(weights=None, offset=moment, deviation=deviation)
        return after, None if self.per == "none" else own

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        sizes = {"channel": shape[-1:], "layer": (), "none": ()}[self.per]
        variable = nnx.Variable if self.per == "none" else nnx.Param
        return ScaleModule(variable(jnp.full(sizes, self.value, jnp.float32)))

    def value_problems(self) -> Iterator[Problem]:
        if not np.all(np.isfinite(self.value)):
            yield "value", self.value, "must be finite", "pass a finite number"


class ScaleModule(nnx.Module):
    """The factor times the input."""

    def __init__(self, factor: nnx.Variable):
        self.factor = factor

    def __call__(self, x: Array) -> Array:
        """The product, of x's shape and dtype."""
        return x * of_rank(self.factor[...], x.ndim).astype(x.dtype)
