"""Moments of activations by layer, and the decomposition of their power."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import array
from meanfield_jax.errors import DataError, problem
from meanfield_jax.kernel import safe

if TYPE_CHECKING:
    import xarray as xr


@checked()
def moments(activations: Mapping[str, Array]) -> xr.Dataset:
    r"""Mean and variance of each layer's activations, over samples, positions and channels.

    The variance is the sum of the mean variance within a channel and the variance of the channels'
    means:

    .. math:: Var(y) = E_c Var_x(y_c) + Var_c(E_x y_c)

    Args:
        activations: By layer, (samples, *positions, channels), as :func:`activations` returns them.

    Returns:
        A dataset over ``layer``: ``mean``, ``variance`` and ``channel_variance``, the first term.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> from flax import nnx
        >>> model = mf.build(mf.mlp([64], inputs=8, outputs=3), rngs=nnx.Rngs(0))
        >>> x = jax.random.normal(jax.random.key(0), (100, 8))
        >>> found = mf.diagnostics.moments(mf.diagnostics.activations(model, x))
        >>> bool(found.variance.sel(layer="layers/1") > found.channel_variance[1])
        True
    """
    import xarray as xr

    rows = {path: _moments(_checked(value)) for path, value in activations.items()}
    table = np.array([[float(number) for number in row] for row in rows.values()]).reshape(-1, 3)
    names = ("mean", "variance", "channel_variance")
    columns = {name: ("layer", table[:, column]) for column, name in enumerate(names)}
    return xr.Dataset(columns, dict(layer=list(rows)))


def _moments(value: Array) -> tuple[Array, Array, Array]:
    by_channel = value.reshape(-1, value.shape[-1])
    return value.mean(), value.var(), by_channel.var(0).mean()


class Power(NamedTuple):
    """The power of activations in four parts, as fractions of E_c E_x[y^2] that sum to 1.

    Attributes:
        P1: Constants of the channels, E_c[(E mu)^2]: the same for all samples and positions.
        P2: Differences between the means of samples, E_c[Var mu].
        P3: The mean standard deviation over positions, E_c[(E sigma)^2].
        P4: Differences between the standard deviations of samples, E_c[Var sigma].
    """

    P1: Array
    P2: Array
    P3: Array
    P4: Array


@checked(activation=array)
def power(activation: Array) -> Power:
    r"""Splits the power of activations into four parts.

    mu and sigma are the mean and standard deviation of one channel of one sample over positions; E
    and Var are taken over samples:

    .. math:: E_{c,x}[y^2] = E_c[(E\mu)^2 + Var(\mu) + (E\sigma)^2 + Var(\sigma)]

    P1 near 1 is collapse: the layer returns the same whatever its input. For vectors sigma = 0. For
    all layers of a model use
    ``{path: power(value) for path, value in activations(...).items()}``.

    Args:
        activation: Activations of a layer, (samples, *positions, channels).

    Returns:
        The parts as fractions; NaN where all activations are 0. Works under jit, vmap and grad.

    Raises:
        DataError: if the array is not a batch.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> y = jax.nn.relu(jax.random.normal(jax.random.key(0), (10_000, 8)))
        >>> print(f"{mf.diagnostics.power(y).P1:.2f}")  # E[y]^2 / E[y^2] = 1/pi
        0.32

    Source:
        Labatie, Masters, Eaton-Rosen & Luschi 2021 (arXiv:2106.03743), section 3.
    """
    activation = _checked(activation)
    by_position = activation.reshape(len(activation), -1, activation.shape[-1])
    mean, std = by_position.mean(1), safe.sqrt(by_position.var(1))
    parts = (mean.mean(0) ** 2, mean.var(0), std.mean(0) ** 2, std.var(0))
    total = jnp.square(activation).mean()
    return Power(*(part.mean() / total for part in parts))


def _checked(activation: Array) -> Array:
    if jnp.ndim(activation) < 2 or jnp.size(activation) == 0:
        remedy = "pass (samples, channels) or (samples, *positions, channels)"
        shape = jnp.shape(activation)
        raise problem(DataError, "activation.shape", shape, "not a batch of channels", remedy)
    return jnp.asarray(activation)
