"""Dense: a fully connected layer with random weights and biases."""

import math
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.nn import initializers

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import (
    Injection,
    Kernel,
    Layer,
    Matrix,
    Problem,
    Shape,
    Signal,
    layer,
    silent,
    tunable,
    variance_problems,
)
from meanfield_jax.precise import HIGHEST
from meanfield_jax.pytree import static


@layer
class Dense(Layer):
    """z = W h + b, W ~ N(0, weight_var / fan_in), b ~ N(0, bias_var).

    Rule: K <- bias_var + weight_var K;  T <- fan_in K_in + 1 + weight_var T.

    Attributes:
        width: Number of units.
        weight_var: sigma_w^2, the variance of a weight times the fan-in.
        bias_var: sigma_b^2, the variance of a bias.
        use_bias: Whether there are biases; without them ``bias_var`` has no effect.
        multiplier: The weights are this number times the parameters, which are drawn with a
            variance smaller by its square; see ``Network.in_parametrization``.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), section 3; tangent: Jacot et al. 2018.
    """

    is_weights: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "mean"

    width: int = static(least=1)
    weight_var: float | Array = tunable(2.0, positive=True)
    bias_var: float | Array = tunable(0.5, positive=True)
    use_bias: bool = static(default=True)
    multiplier: float | Array = silent(1.0)

    def output(self, signal: Signal) -> Signal:
        if len(signal.shape) != 1:
            remedy = "put Flatten() or GlobalMeanPool() before it"
            cause = "Dense needs inputs of shape (features,)"
            raise problem(SpecError, "input shape", signal.shape, cause, remedy)
        return Signal((self.width,), gaussian=True, random=True)

    def num_parameters(self, shape: Shape) -> int:
        return (shape[0] + self.use_bias) * self.width

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection]:
        return linear_rule(self, kernel, self.width)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        options = linear_options(self, shape[0])
        product = multiplied(jax.lax.dot_general, self.multiplier)
        return nnx.Linear(shape[0], self.width, rngs=rngs, dot_general=product, **options)

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "weight_var", "bias_var")
        yield from multiplier_problems(self)


def linear_rule(
    layer: Any, kernel: Kernel, width: int, groups: int = 1
) -> tuple[Kernel, Injection]:
    """The rule for random weights and biases applied to the values, or windows, of ``kernel``."""
    moment, (deviation, tangent_deviation) = kernel.moment, kernel.deviations
    # the squared derivative of a value with respect to its weights, over the moment
    gain = kernel.channels / groups * layer.multiplier**2
    covariance = moment * layer.weight_var

    def weighted(matrix: Matrix | None) -> Matrix | None:
        return None if matrix is None else matrix * layer.weight_var

    injection = Injection(
        weights=moment * gain,
        biases=moment.full(1.0) if layer.use_bias else None,
        # all samples have the same bias, which centring removes
        deviation=None if deviation is None else deviation * gain,
    )
    after = kernel.after(
        covariance=covariance + layer.bias_var if layer.use_bias else covariance,
        tangent=kernel.effective_tangent * layer.weight_var,
        channels=jnp.asarray(width, kernel.dtype),
        deviation=weighted(deviation),
        tangent_deviation=weighted(tangent_deviation),
    )
    return after, injection


def multiplied(product: Callable[..., Array], factor: Any) -> Callable[..., Array]:
    """The product times a factor; the product itself for the factor 1."""
    if isinstance(factor, float) and math.isclose(factor, 1, rel_tol=0):
        return product

    def times(*args: Any, **options: Any) -> Array:
        return factor * product(*args, **options)

    return times


def multiplier_problems(layer: Any) -> Iterator[Problem]:
    """Yields the problem of a multiplier that is not a finite positive number."""
    value = layer.multiplier
    if not np.all(np.isfinite(value) & (np.asarray(value) > 0)):
        yield "multiplier", value, "must be finite and positive", "pass a number above 0"


def linear_options(layer: Any, fan_in: int) -> dict[str, Any]:
    """Options of a Flax layer that draws the declared weights and multiplies in full precision."""
    return dict(
        use_bias=layer.use_bias,
        kernel_init=initializers.normal(jnp.sqrt(layer.weight_var / fan_in) / layer.multiplier),
        bias_init=initializers.normal(jnp.sqrt(layer.bias_var)),
        precision=HIGHEST,
    )
