"""Activation: an elementwise nonlinearity, given by name or as a function."""

import functools
from collections.abc import Callable, Hashable, Iterator
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.checks import numbers
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.gaussian import Nonlinearity
from meanfield_jax.kernel.nonlinearities import NONLINEARITIES
from meanfield_jax.layers.base import Kernel, Layer, Problem, Shape, Signal, layer
from meanfield_jax.pytree import static


@layer
class Activation(Layer):
    """h = phi(z), elementwise.

    Rule: K <- E[phi phi];  T <- T E[phi' phi'], plus E[phi' phi' z_hat z_hat] for the trainable
    scale of a norm directly before it. The pre-activations must be Gaussian, or the sum of a
    Gaussian branch and the outputs of an earlier activation (ResNet v1), which is treated as a
    Gaussian of the same mean and covariance.

    Attributes:
        function: A name (relu, leaky_relu, relu6, elu, selu, tanh, erf, sigmoid, gelu, gelu_tanh,
            silu, hard_silu, softplus, identity), any elementwise function of JAX operations, whose
            expectations are then computed by quadrature, or a :class:`Nonlinearity` that has closed
            forms.
        kinks: The points where a given function or its derivative jumps.

    Accuracy:
        After a sum of a Gaussian branch and the outputs of an activation, the tangent kernel is off
        by 6 %, at a standard error of 3 % (width 48, tests/test_layer_options.py).

    Source:
        theory: Wei et al. 2019, section 3; closed forms as in kernel/nonlinearities.py.
    """

    on_parts: ClassVar[str | None] = "each"

    function: str | Callable[[Array], Array] | Nonlinearity = static()
    kinks: tuple[float, ...] = static(default=())

    def __post_init__(self):
        super().__post_init__()
        given = self.function
        if not callable(given) and not (isinstance(given, str) and given in NONLINEARITIES):
            remedy = f"use one of {', '.join(NONLINEARITIES)}, or pass a function"
            raise problem(SpecError, "Activation.function", given, "unknown activation", remedy)
        if not isinstance(given, Hashable):
            cause, remedy = "it has no hash", "pass a function"
            raise problem(SpecError, "Activation.function", given, cause, remedy)
        kinks = np.ravel(numbers("Activation.kinks", self.kinks)).astype(float).tolist()
        object.__setattr__(self, "kinks", tuple(kinks))

    @property
    def nonlinearity(self) -> Nonlinearity:
        """The function with its kinks and closed forms."""
        if isinstance(self.function, Nonlinearity):
            return self.function
        if callable(self.function):
            return Nonlinearity(self.function, self.kinks)
        return NONLINEARITIES[self.function]

    def output(self, signal: Signal) -> Signal:
        if not signal.gaussian:
            cause = "it needs Gaussian inputs, but these are not sums over many random weights"
            remedy = "put a Dense or Conv before it, and Flatten after it"
            raise problem(SpecError, "Activation.function", self.function, cause, remedy)
        return Signal(signal.shape, random=signal.random)

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        return kernel.around_means().activated(self.nonlinearity), None

    def build(self, shape: Shape, rngs) -> Callable[[Array], Array]:
        return self.nonlinearity.function

    def value_problems(self) -> Iterator[Problem]:
        if callable(self.function) and not _is_elementwise(self.nonlinearity.function):
            cause, remedy = "not elementwise", "pass a function such as jax.numpy.sin"
            yield "function", self.function, cause, remedy


@functools.lru_cache
def _is_elementwise(function: Callable[[Array], Array]) -> bool:
    """Whether a function maps a real array to one of the same shape."""
    given = jax.ShapeDtypeStruct((2,), jnp.float32)
    try:
        found = jax.eval_shape(function, given)
    except Exception:  # it is anyone's function
        return False
    return getattr(found, "shape", None) == (2,) and jnp.issubdtype(found.dtype, jnp.floating)
