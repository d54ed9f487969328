"""Order and chaos: the fixed points of a block over a grid of its variances."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from meanfield_jax.arguments import checked
from meanfield_jax.checks import scalar
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.table import is_smooth, tabulated
from meanfield_jax.layers import Activation, Layer
from meanfield_jax.limits import within
from meanfield_jax.status import Status
from meanfield_jax.theory.compiled import known_numbers
from meanfield_jax.theory.fixed_point import FixedPoint, fixed_point, solve

if TYPE_CHECKING:
    import xarray as xr

STATUSES = (Status.CONVERGED, Status.MARGINAL, Status.NO_FIXED_POINT)

CHUNK = 1024
"""Cells solved together; each batch runs until its slowest cell is done."""

NAMES = {
    "q": "second moment of a pre-activation q*",
    "c": "correlation of two inputs c*",
    "chi_q": "slope of the map of q",
    "chi_c": "slope of the map of correlations at c*",
    "chi_1": "slope of the map of correlations at c = 1",
    "growth": "growth of squared gradients per block",
    "status": "how the search ended",
    "xi_q": "depth scale of q",
    "xi_c": "depth scale of correlations",
    "xi_gradient": "depth scale of squared gradients",
}


BYTES_OF_CELL = 1000.0
"""Memory of a cell of a phase diagram."""


@checked(num_samples=scalar)
def phase_diagram(
    block: Layer,
    *,
    weight_var: Array | np.ndarray,
    bias_var: Array | np.ndarray,
    statistics: str = "batch",
    num_samples: int | None = None,
) -> xr.Dataset:
    """The fixed point and its depth scales on a grid, with the critical line chi_1 = 1.

    Args:
        block: As in :func:`fixed_point`; every Dense inside it gets the variances of the grid.
        weight_var: sigma_w^2, (rows,), ascending.
        bias_var: sigma_b^2, (columns,), ascending.
        statistics: As in :func:`fixed_point`.
        num_samples: As in :func:`fixed_point`.

    Returns:
        A dataset. Over (weight_var, bias_var): q, c, chi_q, chi_c, chi_1, growth, xi_q, xi_c,
        xi_gradient (in blocks) and status, a :class:`Status`; NaN where there is no fixed point.
        Over bias_var: critical_weight_var, the smallest weight_var within the grid at which
        chi_1 = 1, to 1e-8 (tanh); NaN where there is none.

    Raises:
        SpecError: if an axis is not an ascending list of variances, and as for
            :func:`fixed_point`.

    Accuracy:
        That of :func:`fixed_point` in every cell; 1e-8 for smooth functions
        (tests/test_fixed_point.py). 512 x 512 cells take seconds on two cores
        (benchmarks/phase_speed.py).

    Example:
        >>> import numpy as np, meanfield_jax as mf
        >>> block = mf.Sequential((mf.Dense(100), mf.Activation("erf")))
        >>> grid = mf.phase_diagram(
        ...     block, weight_var=np.linspace(0.5, 3, 26), bias_var=np.array([0.05, 0.5])
        ... )
        >>> grid.critical_weight_var.values.round(3)
        array([1.376, 2.234], ...)

    Source:
        Poole et al. 2016 (arXiv:1606.05340), figure 1; Schoenholz et al. 2017 (arXiv:1611.01232),
        figure 1.
    """
    import xarray as xr

    dtype = jnp.result_type(float)
    weight_var, bias_var = (
        _checked_axis(name, axis).astype(dtype)
        for name, axis in (("weight_var", weight_var), ("bias_var", bias_var))
    )
    cells = weight_var.size * bias_var.size
    within("MEMORY", "weight_var.shape", weight_var.shape, BYTES_OF_CELL * cells)
    options: dict[str, Any] = dict(statistics=statistics, num_samples=num_samples)
    # checks the block and its numbers before they are traced
    jax.eval_shape(lambda: fixed_point(block, **options))
    fast = known_numbers(block.changed(_with_table))
    grid, critical = _solved(fast, weight_var, bias_var, **options)
    values = dict(vars(grid), **grid.depth_scales._asdict())
    data: dict[str, Any] = {
        name: (("weight_var", "bias_var"), np.asarray(value), dict(long_name=NAMES[name]))
        for name, value in values.items()
    }
    meaning = dict(long_name="weight_var at which chi_1 = 1")
    data["critical_weight_var"] = (("bias_var",), np.asarray(critical), meaning)
    names = dict(weight_var="variance of the weights", bias_var="variance of the biases")
    coords = {
        name: (name, np.asarray(axis), dict(long_name=names[name]))
        for name, axis in (("weight_var", weight_var), ("bias_var", bias_var))
    }
    attributes = dict(
        block=repr(block),
        units="variances in units of the pre-activations', depth scales in blocks",
        status=", ".join(f"{status.value}: {status.name}" for status in STATUSES),
        statistics=statistics,
        num_samples=num_samples or np.inf,
    )
    return xr.Dataset(data, coords, attributes)


def _checked_axis(name: str, axis: Any) -> Float[Array, " values"]:
    values = np.asarray(axis, float)
    good = values.ndim == 1 and values.size > 0 and np.isfinite(values).all()
    if not good or values.min() < 0 or np.any(np.diff(values) <= 0):
        remedy = "pass a one-dimensional array of numbers >= 0"
        raise problem(SpecError, name, axis, "variances must be an ascending list", remedy)
    return jnp.asarray(values)


def _with_table(inner: Layer) -> Layer:
    """The layer, with expectations that would need quadrature interpolated from a table."""
    if isinstance(inner, Activation) and is_smooth(inner.nonlinearity):
        return inner.replace(function=tabulated(inner.nonlinearity))
    return inner


@functools.partial(jax.jit, static_argnames=("statistics", "num_samples"))
def _solved(
    block: Layer,
    weight_var: Float[Array, " rows"],
    bias_var: Float[Array, " columns"],
    **options: Any,
) -> tuple[FixedPoint, Float[Array, " columns"]]:
    """The fixed points of the grid, and the critical weight_var for each bias_var."""

    def at(weight_var: Array, bias_var: Array) -> FixedPoint:
        def change(inner: Layer) -> Layer:
            if inner.is_weights:
                return inner.replace(weight_var=weight_var, bias_var=bias_var)
            return inner

        return solve(block.changed(change), **options)

    cells = jnp.meshgrid(weight_var, bias_var, indexing="ij")
    flat = tuple(axis.ravel() for axis in cells)
    grid = jax.lax.map(lambda cell: at(*cell), flat, batch_size=min(CHUNK, flat[0].size))
    grid = jax.tree.map(lambda value: value.reshape(cells[0].shape), grid)

    def critical(bias_var: Array, chi_1: Array) -> Array:
        """The critical weight_var, by bisection between the rows where chi_1 first passes 1."""
        import optimistix as optx

        above = chi_1 >= 1
        passes = jnp.concatenate([above[:1], above[1:] & (chi_1[:-1] < 1)])
        row = jnp.argmax(passes)
        lower, upper = weight_var[jnp.maximum(row - 1, 0)], weight_var[row]
        found = passes.any() & ((row > 0) | (chi_1[0] == 1))
        eps = float(jnp.finfo(weight_var.dtype).eps)
        solution = optx.root_find(
            lambda value, _: at(value, bias_var).chi_1 - 1,
            optx.Bisection(rtol=4 * eps, atol=4 * eps, flip=False),
            upper,
            options=dict(lower=lower, upper=upper),
            max_steps=40,
            throw=False,
        )
        return jnp.where(found, solution.value, jnp.nan)

    return grid, jax.vmap(critical, (0, 1))(bias_var, grid.chi_1)
