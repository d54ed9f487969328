"""The stability limit of an optimizer on a quadratic, for any linear transformation of optax."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from meanfield_jax.arguments import checked
from meanfield_jax.errors import SpecError, problem

LATE = 2**20
"""A step at which nothing depends on the first steps any more."""

SIZES = 1e-4, 1.0, 1e4
"""Sizes of random gradients and states between which an update must be linear."""


Maker = Callable[[float], optax.GradientTransformation]


@checked()
def stability_limit(optimizer: optax.GradientTransformation | Maker) -> Float[Array, ""]:
    r"""The largest curvature at which an optimizer is stable on a quadratic loss.

    On :math:`\lambda w^2 / 2` a step is a linear map of the weight w and the optimizer's state v,
    (w, v) -> A (w, v) + b g with the gradient g = lambda w. With rising curvature an eigenvalue of
    the map passes -1, where w alternates with growing size:

    .. math:: \lambda_{limit} = -1 / [(A + 1)^{-1} b]_w

    Where a pair of complex eigenvalues leaves the unit circle before, as with two momenta in a
    chain, that curvature is found by bisection. For a learning rate of 1 this is the limit of
    learning rate times curvature, and the largest stable learning rate is
    ``stability_limit(make(1.0)) / lambda_max``. It is 2 for gradient descent, 2 (1 + mu) with
    momentum mu, and 2 (1 + mu) / (1 + 2 mu) with Nesterov's momentum.

    Args:
        optimizer: A transformation whose update is linear in gradient, state and parameters, such
            as ``optax.sgd`` with momentum or Nesterov's, ``optax.trace``, ``optax.ema`` without
            debiasing, weight decay, and chains of these. A function from a learning rate to one is
            called with 1.

    Returns:
        The curvature, (); it can be jitted, and differentiated in the optimizer's numbers.

    Raises:
        SpecError: if the update is not linear (Adam, clipping), changes with the steps (schedules,
            debiasing), or is unstable at every curvature. Under jit this is not checked, and only
            alternation is looked for.

    Accuracy:
        That of the dtype; the largest eigenvalue is checked below and above the limit.

    Example:
        >>> import optax, meanfield_jax as mf
        >>> round(float(mf.stability_limit(optax.sgd(1.0, momentum=0.9))), 3)
        3.8
        >>> round(float(mf.stability_limit(optax.sgd(1.0, momentum=0.9, nesterov=True))), 3)
        1.357

    Source:
        Polyak 1964; Cohen et al. 2021 (arXiv:2103.00065), section 2.
    """
    optimizer = of_rate_1(optimizer)
    try:
        own, gain = _update_map(optimizer, 0)
    except (TypeError, ValueError, AttributeError) as error:
        cause = f"its update fails on one weight: {' '.join(str(error).split())[:200]}"
        remedy = "pass a rule that needs the gradient only"
        raise problem(SpecError, "optimizer", type(optimizer).__name__, cause, remedy) from None
    response = jnp.linalg.solve(own + jnp.eye(len(own)), gain)[0]
    limit = -1 / response
    if not isinstance(limit, Tracer):
        _check_linear(optimizer)
        found = _smallest_unstable(np.asarray(own, float), np.asarray(gain, float), float(limit))
        limit = limit if found == float(limit) else jnp.asarray(found, limit.dtype)
    return limit


def first_step(optimizer: optax.GradientTransformation | Maker) -> Array:
    """The length of the first step, in units of rate times gradient.

    Returns:
        The length, (): 1 for the heavy ball, 1 + mu for Nesterov's momentum, and 1 - mu for an
        average of gradients.
    """
    return -_update_map(of_rate_1(optimizer), 0)[1][0]


def of_rate_1(optimizer: optax.GradientTransformation | Maker) -> optax.GradientTransformation:
    """The optimizer, or what a function makes of a learning rate of 1."""
    if isinstance(optimizer, optax.GradientTransformation):
        return optimizer
    try:
        made = optimizer(1.0)
    except (TypeError, ValueError, AttributeError):
        made = None
    if not isinstance(made, optax.GradientTransformation):
        cause, remedy = "makes no optimizer of a learning rate of 1", "pass optax.sgd(1.0, 0.9)"
        raise problem(SpecError, "optimizer", optimizer, cause, remedy)
    return made


def _update_map(
    optimizer: optax.GradientTransformation, step: int
) -> tuple[Float[Array, "size size"], Float[Array, " size"]]:
    """The map of (weight, floating-point state) at w = 0, and what a unit gradient adds to it."""
    update, size = _flat_update(optimizer, step)
    zeros = jnp.zeros(size)
    return jax.jacobian(update)(zeros, 0.0), jax.jacobian(update, 1)(zeros, 0.0)


def _flat_update(
    optimizer: optax.GradientTransformation, step: int
) -> tuple[Callable[[Array, Array | float], Array], int]:
    """One update as a function of (weight, state) and gradient; counters stand at ``step``."""
    weight = jnp.zeros(())
    leaves, treedef = jax.tree.flatten(optimizer.init(weight))
    moving = [
        index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    start, unravel = ravel_pytree((weight, [leaves[index] for index in moving]))
    fixed = [
        jnp.full_like(leaf, step) if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf
        for leaf in leaves
    ]

    def update(vector: Array, gradient: Array | float) -> Array:
        weight, floats = unravel(vector)
        known = list(fixed)
        for index, value in zip(moving, floats, strict=True):
            known[index] = value
        state = jax.tree.unflatten(treedef, known)
        change, state = optimizer.update(jnp.asarray(gradient, weight.dtype), state, weight)
        after = jax.tree.leaves(state)
        moved = (optax.apply_updates(weight, change), [after[index] for index in moving])
        return ravel_pytree(moved)[0]

    return update, start.size


def _check_linear(optimizer: optax.GradientTransformation) -> None:
    """Raises SpecError unless an update is linear, of any size and at any step."""
    rng = np.random.default_rng(0)
    for step in (0, LATE):
        update, size = _flat_update(optimizer, step)
        own, gain = _update_map(optimizer, 0)
        for scale in SIZES:
            vector, gradient = scale * rng.standard_normal(size), scale * rng.standard_normal()
            found = np.asarray(update(jnp.asarray(vector, own.dtype), gradient))
            expected = np.asarray(own) @ vector + np.asarray(gain) * gradient
            error = np.abs(found - expected).max()
            largest = scale * max(1.0, np.abs(own).max(), np.abs(gain).max())
            if not error < 100 * jnp.finfo(own.dtype).eps * size * largest:
                cause = "its update is not linear in gradient and state, or changes with the steps"
                remedy = "pass a linear rule of a constant rate, such as optax.sgd(1.0, 0.9)"
                raise problem(SpecError, "optimizer", type(optimizer).__name__, cause, remedy)


def _smallest_unstable(
    own: Float[np.ndarray, "size size"], gain: Float[np.ndarray, " size"], limit: float
) -> float:
    """The limit, unless the map becomes unstable before, in oscillations of another period."""

    def growth(curvature: float) -> float:
        closed = own.copy()
        closed[:, 0] += curvature * gain
        return float(np.abs(np.linalg.eigvals(closed)).max()) - 1

    tolerance = 1e-5
    if np.isfinite(limit) and limit > 0 and growth(0.02 * limit) < tolerance:
        grid = np.linspace(0.02, 0.98, 49) * limit
        unstable = np.array([growth(curvature) for curvature in grid]) > tolerance
        if not unstable.any() and growth(1.02 * limit) > tolerance:
            return limit
        if unstable.any():
            import scipy.optimize

            first = int(unstable.argmax())
            ends = grid[first - 1 : first + 1]
            return float(scipy.optimize.brentq(growth, *ends, xtol=1e-14))  # pyright: ignore[reportArgumentType]
    cause = "it is not stable up to a largest curvature"
    remedy = "check the sign of its learning rate, and that its momentum is below 1"
    raise problem(SpecError, "optimizer", limit, cause, remedy)
