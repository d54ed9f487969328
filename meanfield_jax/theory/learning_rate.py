"""The largest stable learning rate for a given largest eigenvalue."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from meanfield_jax.arguments import checked, momenta
from meanfield_jax.errors import SpecError, problem


@checked(momentum=momenta)
def eta_max(lambda_max: float | Array, momentum: float | Array = 0.9) -> Float[Array, "..."]:
    """The largest stable learning rate, eta_max = 2 (1 + momentum) / lambda_max.

    Heavy-ball gradient descent on a quadratic is stable if and only if eta < eta_max.

    Args:
        lambda_max: Largest eigenvalue of the Fisher matrix (or the Hessian), any shape.
        momentum: Momentum mu of the heavy ball, 0 <= mu < 1.

    Returns:
        The learning rate, of the broadcast shape.

    Raises:
        SpecError: if a momentum is outside [0, 1), or if an eigenvalue is 0, for which every
            learning rate is stable (under jit the result is then infinite).

    Accuracy:
        Exact for the squared loss near a minimum. The curvature of the cross-entropy is smaller,
        and the rate is then not a bound.

    Example:
        >>> import jax.numpy as jnp, meanfield_jax as mf
        >>> round(float(mf.eta_max(jnp.array(160.0), momentum=0.9)), 5)
        0.02375

    Source:
        Polyak 1964; Wei, Stokes & Schwab 2019 (arXiv:1903.02606), equation 6.
    """
    if not isinstance(lambda_max, Tracer) and np.any(np.asarray(lambda_max) <= 0):
        smallest = float(np.nanmin(np.asarray(lambda_max)))
        cause = "no curvature: the outputs do not depend on the parameters, any rate is stable"
        remedy = "check for weights of 0, dead units or a gamma of 0"
        raise problem(SpecError, "lambda_max", smallest, cause, remedy)
    return stable_rate(lambda_max, momentum)


def stable_rate(lambda_max: float | Array, momentum: float | Array) -> Float[Array, "..."]:
    """``eta_max`` for many cells, without checks: infinite where lambda_max is 0."""
    return 2 * (1 + momentum) / jnp.asarray(lambda_max)
