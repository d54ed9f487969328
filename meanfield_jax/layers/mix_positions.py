"""MixPositions: random weights over the positions of a map, the same for all channels."""

import math
from collections.abc import Iterator
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn import initializers

from meanfield_jax.checks import MOST_UNITS, sequence, whole
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
    total,
    tunable,
    variance_problems,
)
from meanfield_jax.precise import HIGHEST
from meanfield_jax.pytree import static


@layer
class MixPositions(Layer):
    """y_d = sum_t W_dt x_t + b_d over positions t, W ~ N(0, weight_var / positions before).

    The weights are the same for all channels: the token mixing of an MLP-Mixer is two of these with
    an activation between them.

    Rule, with <.> the average over equal positions, at equal positions d:
    K <- bias_var + weight_var <K>;  T <- positions <K_in> + 1 + weight_var <T>. Pairs of distinct
    positions have mean 0 over the weights.

    Attributes:
        positions: (height, width) of the map after the layer; (d, 1) for d positions in a row.
        weight_var: sigma_w^2, the variance of a weight times the number of positions before.
        bias_var: sigma_b^2, the variance of a bias.
        use_bias: Whether there are biases, one for each position.

    Example:
        >>> import meanfield_jax as mf
        >>> mix = mf.MixPositions((32, 1)), mf.Activation("gelu"), mf.MixPositions((4, 4))
        >>> layers = mf.Conv(16, 2, 2), mf.Residual(mf.Sequential(mix)), mf.Flatten(), mf.Dense(3)
        >>> mf.Network((8, 8, 3), layers).num_parameters
        2051

    Source:
        Tolstikhin et al. 2021 (arXiv:2105.01601).

    Accuracy:
        Corrections are of relative size 1/positions, whatever the number of channels
        (tests/test_contract.py). Before a mean over positions there are some that do not vanish:
        covariances of distinct positions have mean 0, but their squares add up. The tangent kernel
        of a Mixer with such a head is predicted 9 % too small with 16 positions and 7 % with 64
        (width 48, noise or correlated pixels; tests/test_layer_options.py). What all channels
        share, the bias and the mean of an activation before it, is removed by a
        :class:`LayerNorm` over channels, as in the network.
    """

    on_parts: ClassVar[str | None] = "each"

    positions: tuple[int, int] = static(default=(1, 1))
    weight_var: float | Array = tunable(2.0, positive=True)
    bias_var: float | Array = tunable(0.5, positive=True)
    use_bias: bool = static(default=True)

    def __post_init__(self):
        super().__post_init__()
        sizes = sequence("MixPositions.positions", self.positions)
        if len(sizes) != 2:
            cause, remedy = "not a pair", "pass (height, width)"
            raise problem(SpecError, "MixPositions.positions", self.positions, cause, remedy)
        sizes = tuple(whole("MixPositions.positions", size, 1, MOST_UNITS) for size in sizes)
        object.__setattr__(self, "positions", sizes)

    @property
    def ends_in_weights(self) -> bool:
        return True

    def output(self, signal: Signal) -> Signal:
        if len(signal.shape) != 3:
            cause = "MixPositions needs inputs of shape (height, width, channels)"
            raise problem(SpecError, "input shape", signal.shape, cause, "use Dense for vectors")
        return Signal((*self.positions, signal.shape[-1]), gaussian=True, random=signal.random)

    def num_parameters(self, shape: Shape) -> int:
        return (math.prod(shape[:-1]) + self.use_bias) * math.prod(self.positions)

    def rule(self, kernel: Kernel) -> tuple[Kernel, Injection]:
        count, mean = math.prod(kernel.positions), kernel.with_one_mean().around_means().mean
        moment = self._spread(kernel.moment)
        # what all channels have in common
        squares = None if mean is None else kernel.covariance.full(1.0) * mean**2
        shared = self._spread(total(squares, kernel.shared))
        ones = moment.at_equal_positions(1.0) if self.use_bias else None

        def weighted(matrix: Any, injected: Any) -> Any:
            return total(None if matrix is None else matrix * self.weight_var, injected)

        bias = None if ones is None else ones * self.bias_var
        own = None if shared is None else shared * count
        after = kernel.after(
            covariance=weighted(moment, bias),
            tangent=weighted(self._spread(kernel.effective_tangent), None),
            shared=weighted(shared, bias),
            shared_tangent=weighted(self._spread(kernel.shared_tangent), None),
        )
        return after, Injection(weights=moment * count, biases=ones, shared=total(own, ones))

    def _spread(self, matrix: Matrix | None) -> Any:
        return None if matrix is None else matrix.spread(self.positions)

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return MixPositionsModule(self, math.prod(shape[:-1]), rngs)

    def value_problems(self) -> Iterator[Problem]:
        yield from variance_problems(self, "weight_var", "bias_var")


class MixPositionsModule(nnx.Linear):
    """A Linear over all positions of a map, with the same weights for all channels."""

    def __init__(self, spec: MixPositions, count: int, rngs: nnx.Rngs):
        super().__init__(
            count,
            math.prod(spec.positions),
            use_bias=spec.use_bias,
            kernel_init=initializers.normal(jnp.sqrt(spec.weight_var / count)),
            bias_init=initializers.normal(jnp.sqrt(spec.bias_var)),
            precision=HIGHEST,
            rngs=rngs,
        )
        self.positions = spec.positions

    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        """Mixes the positions of the inputs, (samples, height, width, channels)."""
        samples, channels = inputs.shape[0], inputs.shape[-1]
        turned = jnp.swapaxes(inputs.reshape(samples, -1, channels), 1, 2)
        mixed = super().__call__(turned, out_sharding)
        return jnp.swapaxes(mixed, 1, 2).reshape(samples, *self.positions, channels)
