"""Activation: an elementwise nonlinearity, named or the user's own."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.kernel.gaussian import NONLINEARITIES, Nonlinearity, expectations
from meanfield_jax.kernel.state import EnsembleKernel, Pair
from meanfield_jax.layers.base import Layer, Shape, Signal, layer, static


@layer
class Activation(Layer):
    """h = phi(z), elementwise.

    Rule: K <- E[phi phi];  T <- T E[phi' phi'], plus E[phi' phi' z_hat z_hat] for the scale of a
    BatchNorm just before. Needs Gaussian pre-activations.

    Attributes:
        function: A name (relu, leaky_relu, tanh, erf, gelu, silu, identity) or any elementwise
            function of JAX operations, whose expectations are then taken by quadrature.
        kinks: For a function of your own: the points where it or its derivative jumps.

    Source:
        theory: Wei et al. 2019, section 3; closed forms as in kernel/gaussian.py.
    """

    function: str | Callable[[Array], Array] = static()
    kinks: tuple[float, ...] = static(())

    def __post_init__(self):
        if not callable(self.function) and self.function not in NONLINEARITIES:
            raise problem(
                SpecError,
                "Activation.function",
                self.function,
                "not a known name",
                f"use one of {', '.join(NONLINEARITIES)} or a function of your own",
            )

    @property
    def nonlinearity(self) -> Nonlinearity:
        """The function with its kinks and closed forms."""
        if callable(self.function):
            return Nonlinearity(self.function, self.kinks)
        return NONLINEARITIES[self.function]

    def output(self, signal: Signal) -> Signal:
        if not signal.gaussian:
            cause = "its inputs are not sums over many random weights"
            remedy = "put a Dense or Conv before it (and Flatten after it)"
            raise problem(SpecError, "Activation.function", self.function, cause, remedy)
        return Signal(signal.shape, gaussian=False)

    def rule(self, kernel: EnsembleKernel) -> tuple[EnsembleKernel, None]:
        phi, variances = self.nonlinearity, kernel.variances(kernel.cov)
        scale_a, scale_b = kernel.variances(kernel.scale)
        scale = safe.sqrt(scale_a * scale_b)

        moments = [expectations(phi, *variances, entry, kernel.mean) for entry in kernel.cov]
        tangent = [
            entry * moment.derivative + scale * moment.scale
            for entry, moment in zip(kernel.tangent, moments, strict=True)
        ]
        return kernel.replace(
            cov=Pair(*(moment.product for moment in moments)),
            tangent=Pair(*tangent),
            scale=jax.tree.map(jnp.zeros_like, kernel.scale),
            mean=None,
        ), None

    def build(self, shape: Shape, rngs) -> Callable[[Array], Array]:
        return self.nonlinearity.function
