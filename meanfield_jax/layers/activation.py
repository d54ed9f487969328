"""Activation: an elementwise nonlinearity, given by name or as a function."""

from collections.abc import Callable

from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.gaussian import NONLINEARITIES, Nonlinearity
from meanfield_jax.layers.base import Kernel, Layer, Shape, Signal, layer
from meanfield_jax.pytree import static


@layer
class Activation(Layer):
    """h = phi(z), elementwise.

    Rule: K <- E[phi phi];  T <- T E[phi' phi'], plus E[phi' phi' z_hat z_hat] for the trainable
    scale of a norm directly before it. The pre-activations must be Gaussian.

    Attributes:
        function: A name (relu, leaky_relu, tanh, erf, gelu, silu, identity), any elementwise
            function of JAX operations, whose expectations are then computed by quadrature, or a
            :class:`Nonlinearity` that has closed forms.
        kinks: The points where a given function or its derivative jumps.

    Source:
        theory: Wei et al. 2019, section 3; closed forms as in kernel/gaussian.py.
    """

    function: str | Callable[[Array], Array] | Nonlinearity = static()
    kinks: tuple[float, ...] = static(default=())

    def __post_init__(self):
        if not callable(self.function) and self.function not in NONLINEARITIES:
            raise problem(
                SpecError,
                "Activation.function",
                self.function,
                "unknown activation",
                f"use one of {', '.join(NONLINEARITIES)}, or pass a function",
            )

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
        return Signal(signal.shape, gaussian=False)

    def rule(self, kernel: Kernel) -> tuple[Kernel, None]:
        return kernel.activated(self.nonlinearity), None

    def build(self, shape: Shape, rngs) -> Callable[[Array], Array]:
        return self.nonlinearity.function
