"""Dropout, which theory and measurement leave out."""

from typing import ClassVar

import numpy as np
from flax import nnx

from meanfield_jax.checks import numbers
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers.base import Kernel, Layer, Shape, layer
from meanfield_jax.pytree import static


@layer
class Dropout(Layer):
    """Sets values to 0 with probability ``rate`` in training, and divides the others by 1 - rate.

    Rule: none. The theory is that of the network with all of its units, which is what evaluation
    runs and what :func:`fisher_operator` measures; the Flax network drops units in training only.

    Attributes:
        rate: Probability of a value to be dropped.

    Source:
        Srivastava et al. 2014.
    """

    linear: ClassVar[bool] = True
    on_parts: ClassVar[str | None] = "each"

    rate: float = static(default=0.5)

    def __post_init__(self):
        super().__post_init__()
        rate = numbers("Dropout.rate", self.rate)
        if np.shape(rate) != () or not 0 <= rate < 1:
            cause, remedy = "not a probability below 1", "pass a number of at least 0 and below 1"
            raise problem(SpecError, "Dropout.rate", self.rate, cause, remedy)
        object.__setattr__(self, "rate", float(rate))

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        return kernel, None

    def build(self, shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
        return nnx.Dropout(self.rate, rngs=rngs)
