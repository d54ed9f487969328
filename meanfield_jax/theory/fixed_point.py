"""Fixed points and depth scales of a deep network of equal blocks."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float, Int

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel import safe
from meanfield_jax.kernel.kernel import STATISTICS, Kernel, iid_inputs
from meanfield_jax.kernel.pair_matrix import PairMatrix
from meanfield_jax.layers import Conv, Layer, Residual, Sequential
from meanfield_jax.layers.base import Signal
from meanfield_jax.network import check_numbers, walk
from meanfield_jax.pytree import pytree
from meanfield_jax.status import Status, first_failure
from meanfield_jax.theory.analyze import check_num_samples
from meanfield_jax.theory.compiled import known_numbers

MAX_STEPS = 100

MARGIN = 16.0
"""Slopes closer to 1 than this, in units of sqrt(eps), count as 1."""

LARGEST_CHANGE = 16.0
"""Largest factor by which q may change in one step."""


class DepthScales(NamedTuple):
    """Layers over which a distance to the fixed point, or a gradient, changes by a factor e.

    Attributes:
        xi_q: Depth scale of q, -1/log |chi_q|.
        xi_c: Depth scale of the correlation, -1/log |chi_c|.
        xi_gradient: Depth scale of squared gradients, 1/|log growth|; gradients explode where
            growth is above 1.
    """

    xi_q: Float[Array, "*batch"]
    xi_c: Float[Array, "*batch"]
    xi_gradient: Float[Array, "*batch"]


@pytree
class FixedPoint:
    """The fixed point of a block and the slopes there; NaN if there is none.

    Attributes:
        q: q*, the second moment of a pre-activation.
        c: c*, the correlation of two inputs' pre-activations; 1 where q* is 0.
        chi_q: d q'/d q, the factor by which one block multiplies a small deviation of q.
        chi_c: d q_xy'/d q_xy at c*, the same factor for the correlation.
        chi_1: The same at c = 1 (and q*): above 1 similar inputs drift apart (chaos), below 1
            different ones become equal (order).
        growth: The factor by which the backward pass through one block multiplies squared
            gradients: the largest eigenvalue of the block's map of tangents. Without normalization
            over the batch it is chi_1.
        status: A :class:`Status` as an integer: CONVERGED, MARGINAL or NO_FIXED_POINT.
    """

    q: Float[Array, "*batch"]
    c: Float[Array, "*batch"]
    chi_q: Float[Array, "*batch"]
    chi_c: Float[Array, "*batch"]
    chi_1: Float[Array, "*batch"]
    growth: Float[Array, "*batch"]
    status: Int[Array, "*batch"]

    @property
    def depth_scales(self) -> DepthScales:
        """Depth scales in layers (blocks); infinite where marginal, 0 where one block is enough."""
        xi_q, xi_c, xi_gradient = (
            1 / jnp.abs(jnp.log(jnp.abs(slope))) for slope in (self.chi_q, self.chi_c, self.growth)
        )
        return DepthScales(xi_q, xi_c, xi_gradient)

    def raise_if_failed(self) -> "FixedPoint":
        """Returns itself, or raises if there is no fixed point (host only).

        Raises:
            RuntimeError: if q grows without bound.
        """
        failed = first_failure(self.status, Status.CONVERGED, Status.MARGINAL)
        if failed is None:
            return self
        raise RuntimeError(
            f"fixed_point: q grows without bound{failed.where}; "
            "use a smaller weight_var, or add a normalization"
        )


@checked()
def fixed_point(
    block: Layer, *, statistics: str = "batch", num_samples: int | Array | None = None
) -> FixedPoint:
    r"""The fixed point of a block repeated infinitely often, and its Jacobian's eigenvalues there.

    .. math:: q^* = V(q^*), \quad c^* = C(q^*, c^*), \quad
        \chi_q = V'(q^*), \quad \chi_c = \partial_c C(q^*, c^*), \quad
        \chi_1 = \partial_c C(q^*, 1)

    For [Dense, Activation], V(q) = bias_var + weight_var E[phi(sqrt(q) z)^2]. The maps V and C are
    the block's own rule, whatever it consists of, and the slopes are their derivatives. The signal
    starts at q = 1, c = 0; if there are several fixed points, the result is the one towards which q
    moves. It can be jitted, vmapped and differentiated (implicitly) in the block's numbers.

    Args:
        block: A layer on vectors with at least one Dense, such as
            ``Sequential((Dense(1000), BatchNorm(), Activation("tanh")))``. Wherever the block
            starts, the state refers to the pre-activations after its last random weights.
        statistics: As in :func:`analyze`; matters only with BatchNorm.
        num_samples: The batch size n of a BatchNorm; None for the limit n -> infinity.

    Returns:
        q*, c*, slopes and status, () each, in the dtype of the block's numbers.

    Raises:
        SpecError: if the block cannot be repeated, or one of its numbers cannot be used.

    Accuracy:
        That of the quadrature: 1e-8 of q*, c* and the slopes for tanh, erf, gelu, silu and relu at
        variances up to 9 (tests/test_fixed_point.py). It is worse by 1/(1 - slope) near
        marginality, where a c* within sqrt(eps) of 1 counts as 1. A q* above 1/sqrt(eps) counts as
        no fixed point.

    Example:
        >>> import meanfield_jax as mf
        >>> block = mf.Sequential((mf.Dense(100, 1.5, 0.05), mf.Activation("tanh")))
        >>> point = mf.fixed_point(block)
        >>> print(f"{point.q:.4f} {point.c:.4f} {point.chi_1:.4f} {point.depth_scales.xi_c:.2f}")
        0.4180 1.0000 0.9386 15.79

    Source:
        Poole et al. 2016 (arXiv:1606.05340); Schoenholz et al. 2017 (arXiv:1611.01232), who define
        xi_q and xi_c. Gradient growth with BatchNorm: Yang et al. 2019 (arXiv:1902.08129).
    """
    check_choice("statistics", statistics, STATISTICS)
    check_numbers(block)
    check_num_samples(block, num_samples)
    return solve(known_numbers(block), statistics, num_samples)


def solve(block: Layer, statistics: str, num_samples: int | Array | None) -> FixedPoint:
    """The fixed point of a block in the form of :func:`known_numbers`, without checks of numbers.

    Returns:
        The same as :func:`fixed_point`.
    """
    block = _ending_in_weights(block)
    dtype = jnp.result_type(float, *jax.tree.leaves(block))
    start = iid_inputs((), _checked_width(block), num_samples, statistics, False, dtype)
    nothing = dict(deviation=None, tangent_deviation=None)
    after = jax.eval_shape(lambda: block.propagate(start)[0].replace(**nothing))
    if jax.tree.structure(after) != jax.tree.structure(start):
        cause = "the norm right after its last random weights is inside another layer"
        raise problem(SpecError, "block", block, cause, "move it outside, after that layer")
    found = _found(block, start)
    none = found.status == Status.NO_FIXED_POINT
    values = jax.tree.map(lambda value: jnp.where(none, jnp.nan, value), found)
    return dataclasses.replace(values, status=found.status)


def _ending_in_weights(block: Layer) -> Sequential:
    """The same repeated block, but starting after its last random weights."""
    layers = _flat(block)
    ends = [i + 1 for i, la in enumerate(layers) if isinstance(la, Residual) or la.ends_in_weights]
    if not ends or any(isinstance(inner, Conv) for _, inner in walk(block)):
        cause, remedy = "must act on vectors and have random weights", "use Dense, and no Conv"
        raise problem(SpecError, "block", block, cause, remedy)
    return Sequential((*layers[ends[-1] :], *layers[: ends[-1]]))


def _flat(block: Layer) -> tuple[Layer, ...]:
    if isinstance(block, Sequential):
        return tuple(inner for layer in block.layers for inner in _flat(layer))
    return (block,)


def _checked_width(block: Layer) -> int:
    """The number of units at the end of the block, which must be able to start again from them."""
    width = [inner.width for _, inner in walk(block) if inner.is_weights][-1]
    before = Signal((width,), gaussian=True, random=True)
    after = block.output(before)
    if after != before:
        cause = f"it maps shape ({width},) to {after.shape}"
        raise problem(SpecError, "block", block, cause, "make the two shapes equal")
    return width


@jax.jit
def _found(block: Layer, start: Kernel[PairMatrix]) -> FixedPoint:
    """The fixed point; if there is none, the numbers are those at the largest q."""
    import lineax as lx
    import optimistix as optx

    eps = float(jnp.finfo(start.dtype).eps)
    largest = eps**-0.5
    solution = optx.fixed_point(
        _improved,
        # after a Newton step of this size, the error is its square
        optx.FixedPointIteration(rtol=eps**0.5, atol=16 * eps),
        (jnp.ones((), start.dtype), jnp.zeros((), start.dtype)),
        (block, start),
        max_steps=MAX_STEPS,
        adjoint=optx.ImplicitAdjoint(linear_solver=lx.SVD(rcond=1e-3)),
        throw=False,
    )
    q, c = solution.value
    c = jnp.where(q > 64 * eps, c, 1.0)
    after, chi_q, chi_c = _slopes(block, start, q, c)
    chi_1 = _slopes(block, start, q, jnp.ones_like(c))[2]
    gap = jnp.minimum(jnp.abs(1 - chi_q), jnp.abs(1 - chi_c))
    left = jnp.abs(after.same - q) + jnp.abs(after.other - q * c)
    found = (q < largest / 2) & (left <= eps**0.5 * (q + eps**0.5))
    attractive = jnp.where(gap > MARGIN * eps**0.5, Status.CONVERGED, Status.MARGINAL)
    status = jnp.where(found, attractive, Status.NO_FIXED_POINT)
    return FixedPoint(q, c, chi_q, chi_c, chi_1, _growth(block, start, q, c), status)


class Moments(NamedTuple):
    """Second moments of one sample (same) and of two (other)."""

    same: Float[Array, ""]
    other: Float[Array, ""]


def _slopes(
    block: Layer, start: Kernel[PairMatrix], q: Float[Array, ""], c: Float[Array, ""]
) -> tuple[Moments, Float[Array, ""], Float[Array, ""]]:
    """The second moments after the block, and the derivative of each in its own input."""

    def after(moments: Moments) -> Moments:
        covariance = start.covariance.replaced(*moments)
        found = block.propagate(start.replace(covariance=covariance))[0].covariance
        return Moments(found.same, found.other)

    before, one, zero = Moments(q, q * c), jnp.ones_like(q), jnp.zeros_like(q)
    found, along_q = jax.jvp(after, (before,), (Moments(one, zero),))
    _, along_xy = jax.jvp(after, (before,), (Moments(zero, one),))
    return found, along_q.same, along_xy.other


def _improved(
    state: tuple[Float[Array, ""], Float[Array, ""]], args: tuple[Layer, Kernel[PairMatrix]]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """One step in the direction of the block's map, with a length that depends on its slope.

    This is Newton's step in each variable, except for its direction, which is always that of the
    map: (V(q) - q) / |1 - V'(q)|. Repelling fixed points are therefore avoided, and one that
    attracts slowly is reached as fast as any other. Derivatives treat the length factor as a
    constant, so that they are those of V(q) = q.

    Returns:
        The next q and c.
    """
    block, start = args
    q, c = state
    after, slope_q, slope_xy = _slopes(block, start, q, c)
    eps = float(jnp.finfo(q.dtype).eps)
    correlation = safe.divide(after.other, after.same)
    slope_c = slope_xy * safe.divide(q, after.same)
    q_new = _step(q, after.same, slope_q, q + eps)
    # limited to a factor per step, since q may have to change by many orders of magnitude
    bounds = jnp.minimum(LARGEST_CHANGE * q, eps**-0.5), q / LARGEST_CHANGE
    q_new = _clipped(q_new, bounds[1], bounds[0])
    c_new = _clipped(_step(c, correlation, slope_c, jnp.ones_like(c)), -1.0, 1.0)
    c_new = _clipped(c_new, jnp.where(c_new > 1 - eps**0.5, 1.0, -1.0), 1.0)
    # c = 1 is a fixed point even where it repels, and a step may overshoot while q still changes
    repelled = (c == 1) & (slope_c > 1 + MARGIN * eps**0.5)
    return q_new, jnp.where(repelled, 0.0, c_new)


def _step(value: Array, after: Array, slope: Array, scale: Array) -> Array:
    eps = float(jnp.finfo(value.dtype).eps)
    step = (after - value) / lax.stop_gradient(jnp.maximum(jnp.abs(1 - slope), eps))
    rounding = jnp.abs(after - value) <= 16 * eps * scale
    return value + step - lax.stop_gradient(jnp.where(rounding, step, 0.0))


def _clipped(value: Array, lower: Array | float, upper: Array | float) -> Array:
    """The value clipped to the bounds, with the derivative of the unclipped value."""
    return value + lax.stop_gradient(jnp.clip(value, lower, upper) - value)


def _growth(
    block: Layer, start: Kernel[PairMatrix], q: Float[Array, ""], c: Float[Array, ""]
) -> Float[Array, ""]:
    """The largest eigenvalue of the block's map of tangents, a non-negative matrix."""

    def tangents(tangent: Moments) -> Moments:
        covariance = start.covariance.replaced(q, q * c)
        kernel = start.replace(covariance=covariance, tangent=covariance.replaced(*tangent))
        found = block.propagate(kernel)[0].effective_tangent
        return Moments(found.same, found.other)

    # the map is affine: the block's own parameters add to the incoming tangent
    (a, b), (d, e) = jax.jacfwd(tangents)(Moments(jnp.zeros_like(q), jnp.zeros_like(q)))
    return (a + e) / 2 + safe.sqrt((a - e) ** 2 / 4 + b * d)
