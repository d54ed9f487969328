"""How far the statistics used by a normalization are from those of all data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_data, whole
from meanfield_jax.diagnostics.capture import blocks_around, check_module, repeated_paths, unrolled
from meanfield_jax.empirical.model import batch_statistics
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.limits import within

if TYPE_CHECKING:
    import xarray as xr


class StatisticsError(NamedTuple):
    """The errors of means and variances, as :func:`statistics_error` returns them.

    Attributes:
        mean: Error of the means, in units of the standard deviation over all data.
        var: Relative error of the variances.
        mean_standard_error: Standard error of ``mean``.
        var_standard_error: Standard error of ``var``.
    """

    mean: Array
    var: Array
    mean_standard_error: Array
    var_standard_error: Array


@checked()
def statistics_error(used: tuple[Array, Array], full: tuple[Array, Array]) -> StatisticsError:
    r"""The error of means and variances, such as those a layer uses, relative to those of all data.

    It is taken over the channels c and averaged over batches b:

    .. math::
        E_b \sqrt{\frac{E_c (\mu_{bc} - \mu_c)^2}{E_c \sigma_c^2}}, \quad
        E_b \sqrt{\frac{E_c (\sigma_{bc}^2 - \sigma_c^2)^2}{E_c \sigma_c^4}}

    Args:
        used: Means and variances of batches, (batches, *channels) each.
        full: Mean and variance of all data, (*channels) each.

    Returns:
        Scalars with their standard errors over the batches, which are NaN for a single batch.

    Raises:
        DataError: if the shapes do not fit each other.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> batches = jax.random.normal(jax.random.key(0), (1000, 16, 50))  # batches of 16
        >>> used = batches.mean(1), batches.var(1)
        >>> full = batches.mean((0, 1)), batches.var((0, 1))
        >>> print(f"{mf.diagnostics.statistics_error(used, full).mean:.2f}")  # 16^(-1/2)
        0.25

    Source:
        Yao et al. 2020 (arXiv:2002.05712), section 3.

        Departure: the error of the mean is relative to the standard deviation, not to the mean,
        which may be 0; this is the error of the normalized values.
    """
    (mean, var), (full_mean, full_var) = (
        [jnp.asarray(one) for one in pair] for pair in (used, full)
    )
    if not (mean.shape == var.shape and full_mean.shape == full_var.shape == mean.shape[1:]):
        shapes = [one.shape for one in (mean, var, full_mean, full_var)]
        remedy = "pass (batches, *channels) twice and (*channels) twice"
        raise problem(DataError, "shapes", shapes, "they do not fit each other", remedy)
    channels = tuple(range(1, mean.ndim))

    def over_channels(difference: Array, scale: Array) -> Array:
        return jnp.sqrt(jnp.mean(difference**2, channels) / jnp.mean(scale))

    errors = (
        over_channels(mean - full_mean[None], full_var),
        over_channels(var - full_var[None], full_var**2),
    )
    by_chance = math.sqrt(len(mean))
    standard_errors = (error.std(ddof=1) / by_chance for error in errors)
    return StatisticsError(*(error.mean() for error in errors), *standard_errors)


@checked()
def batch_statistics_error(
    model: nnx.Module,
    x: Array,
    *,
    batch_size: int,
    num_batches: int = 20,
    layers: Sequence[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """The error of the statistics of batches, for each normalization over the batch.

    A layer's statistics are those that it would average in training. They are read from its running
    statistics after one call, in which all layers before it normalize by statistics of the same
    batch.

    Args:
        model: A Flax NNX module with BatchNorm layers, from this package or from Flax, or with any
            other layers with the attributes ``mean``, ``var``, ``momentum`` and
            ``use_running_average``.
        x: All data, (n, ...), in one call.
        batch_size: Number of samples in a batch, drawn without replacement.
        num_batches: Number of batches drawn.
        layers: Paths of layers; None: all layers.
        seed: Seed of the batches.

    Returns:
        A dataset over ``layer`` with the fields of :class:`StatisticsError`. The model is not
        changed.

    Raises:
        SpecError, DataError: if an argument cannot be used.

    Accuracy:
        In the first layer on Gaussian inputs, 1/sqrt(batch_size) and sqrt(2/batch_size) within 4
        standard errors (tests/test_diagnostics.py).

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> net = mf.mlp([64], inputs=8, outputs=3, norm=mf.BatchNorm())
        >>> model = mf.build(net, rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (400, 8))
        >>> error = lambda size: mf.diagnostics.batch_statistics_error(model, x, batch_size=size)
        >>> bool((error(8)["mean"] > error(64)["mean"]).all())
        True
    """
    import xarray as xr

    check_module(model)
    x = check_data(x)
    if not 2 <= batch_size <= len(x):
        cause = f"must be between 2 and the number of samples, {len(x)}"
        raise problem(SpecError, "batch_size", batch_size, cause, "pass a size in this range")
    num_batches = whole("num_batches", num_batches, 2)
    within("MEMORY", "num_batches", num_batches, 8 * num_batches * batch_size)
    full = _by_layer(model, x)
    known = list(full) if layers is None else list(layers)
    if not full or not set(known) <= set(full):
        cause = f"layers with running mean and variance are {', '.join(full) or 'none'}"
        raise problem(SpecError, "layers", layers, cause, "select from these")
    keys = jax.random.split(jax.random.key(seed), num_batches)
    rows = [jax.random.choice(key, len(x), (batch_size,), replace=False) for key in keys]
    drawn = [_by_layer(model, x[row]) for row in rows]
    errors = []
    for name in known:
        mean, var = (jnp.stack([batch[name][part] for batch in drawn]) for part in range(2))
        errors.append(statistics_error((mean, var), full[name]))
    columns = {
        field: ("layer", np.array([float(getattr(error, field)) for error in errors]))
        for field in StatisticsError._fields
    }
    return xr.Dataset(columns, dict(layer=known))


def _by_layer(model: nnx.Module, x: Array) -> dict[str, tuple[Array, Array]]:
    """Mean and variance of one batch at each normalization over the batch, by path."""
    copy = nnx.clone(model)
    nnx.update(copy, batch_statistics(model, x))
    blocks, means, variances = repeated_paths(model), {}, {}
    modules: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
    for path, module in modules:
        if isinstance(getattr(module, "mean", None), nnx.BatchStat) and hasattr(module, "var"):
            name = "/".join(map(str, path))
            extra = len(blocks_around(name, blocks))
            means[name], variances[name] = (module.mean[...], extra), (module.var[...], extra)
    means, variances = unrolled(means, blocks), unrolled(variances, blocks)
    return {name: (means[name], variances[name]) for name in means}
