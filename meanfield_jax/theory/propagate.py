"""The one pass over a network, and everything read off it: ``analyze`` and its result."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from jax.core import Tracer

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.kernel.state import STATISTICS, EnsembleKernel, Pair, input_kernel
from meanfield_jax.layers import BatchNorm, Conv, GlobalMeanPool
from meanfield_jax.layers.base import Record, Rows, Tap
from meanfield_jax.network import Network, walk
from meanfield_jax.theory.fisher import Fisher, Shares
from meanfield_jax.theory.learning_rate import eta_max


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OrderParameters:
    """The published order parameters, one entry for each Dense or Conv layer, (layers,) each.

    Second moments per unit: ``q`` of one input, ``q_xy`` of two inputs, ``q_ab`` of two inputs at
    two positions of a map (equal to ``q_xy`` for vectors); averaged over positions. Plain: of the
    pre-activations leaving the layer. Hat: of the values entering it. Tilde: of the gradients
    df/dz, summed over units and positions (as a tangent: dT_out/dT(z)).

    Attributes:
        layers: The layers' paths.

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606), sections 3 and 4. Departure: tildes of maps
        are summed over positions (a strided layer's factor |K_{l+1}|/|K_l| drops out), and they
        come from differentiating the forward pass, not from a recursion of their own.
    """

    q: Array
    q_xy: Array
    q_ab: Array
    q_hat: Array
    q_hat_xy: Array
    q_hat_ab: Array
    q_tilde: Array
    q_tilde_xy: Array
    q_tilde_ab: Array
    layers: tuple[str, ...] = dataclasses.field(metadata=dict(static=True))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Theory:
    """What mean-field theory says of a network; a pytree, made by :func:`analyze`.

    Attributes:
        fisher: Statistics of the Fisher information matrix.
        order_parameters: q, q_xy, ... by layer.
        kernel: Covariance and tangent of the outputs.
        network: The specification.
    """

    fisher: Fisher
    order_parameters: OrderParameters
    kernel: EnsembleKernel
    network: Network

    def eta_max(self, momentum: float | Array = 0.9) -> Array:
        """The largest stable learning rate of heavy-ball gradient descent on the squared loss.

        See :func:`meanfield_jax.theory.learning_rate.eta_max`.
        """
        return eta_max(self.fisher.lambda_max, momentum)

    def to_xarray(self, momentum: float = 0.9) -> xr.Dataset:
        """All numbers as a labelled data set; units and symbols in the attributes.

        Args:
            momentum: Momentum of ``eta_max``.

        Returns:
            A data set with the dimensions ``layer`` (Dense and Conv) and ``block`` (every layer
            with parameters), ready for ``to_netcdf``.
        """
        order, fisher = self.order_parameters, self.fisher
        data: dict[str, Any] = {
            field.name: ("layer", np.asarray(getattr(order, field.name)))
            for field in dataclasses.fields(order)
            if field.name != "layers"
        }
        for kind in ("weights", "biases", "norm"):
            data[f"share_{kind}"] = ("block", np.asarray(getattr(fisher.shares, kind)))
        for name in Fisher.STATISTICS:
            data[name] = xr.Variable((), np.asarray(getattr(fisher, name)))
        data["eta_max"] = xr.Variable((), np.asarray(self.eta_max(momentum)))
        attributes = dict(
            network=self.network.to_json(indent=None),
            statistics=self.kernel.statistics,
            momentum=momentum,
        )
        coords = dict(layer=list(order.layers), block=list(fisher.shares.layers))
        return xr.Dataset(data, coords, attributes)


def analyze(
    network: Network,
    *,
    statistics: str = "batch",
    num_samples: int | Array | None = None,
) -> Theory:
    """Mean-field theory of a network on i.i.d. inputs with unit variance, in one pass.

    For a network f: inputs -> C outputs and n inputs it predicts the Fisher information matrix
    F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T of the squared loss (1/2n) sum ||f - y||^2:
    C outliers T_same/n + (n-1)/n T_other, a bulk (T_same - T_other)/n, the trace C T_same.
    Compiled once for each structure; the numbers of the network (gamma, weight_var, ...) can be
    vmapped over and differentiated in, twice. Put large grids into ``jax.jit``, and deep networks
    into :class:`Repeat`, which compiles in the time of one block.

    Args:
        network: The specification.
        statistics: What is differentiated through a BatchNorm: ``"batch"`` (a network in training,
            what decides stability), ``"frozen"`` (in evaluation), ``"wei2019"`` (as published).
        num_samples: n, the batch; None for the limit n -> infinity, where the bulk vanishes.

    Returns:
        The theory; float64 under ``jax.enable_x64()``, else float32.

    Raises:
        SpecError: for numbers or options that make no sense.

    Accuracy:
        On Gaussian inputs, FC 784-1000x3-10 with BatchNorm, n = 1000, train mode: mean of the C
        outliers within 0.2 % (tests/test_theory_meets_network.py). Corrections are O(1/width);
        a vanilla network's draws scatter by about sqrt(depth C / width).

    Example:
        >>> import jax, meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm(gamma=0.5))
        >>> round(float(mf.analyze(net).eta_max(momentum=0.9)), 4)
        0.0913

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606); Karakida, Akaho & Amari 2019
        (arXiv:1806.01316) for the spectrum's statistics.
    """
    network.validate()
    if statistics not in STATISTICS:
        remedy = f"use one of {', '.join(STATISTICS)}"
        raise problem(SpecError, "statistics", statistics, "unknown", remedy)
    _check_num_samples(network, num_samples)
    values = (*jax.tree.leaves((network, num_samples)), jnp.zeros(()))
    traced = any(isinstance(value, Tracer) for value in values)
    pass_over = _analyze if traced or jax.default_backend() != "cpu" else _analyze_at_once
    theory = pass_over(_drop_zero_offsets(network), statistics, num_samples)
    return dataclasses.replace(theory, network=network)


def _drop_zero_offsets(network: Network) -> Network:
    """Offsets that are known to be 0 become None, and with them the need for quadrature."""

    def drop(path, leaf):
        known = not isinstance(leaf, Tracer)
        return None if known and path[-1].name == "beta" and np.all(np.asarray(leaf) == 0) else leaf

    return jax.tree_util.tree_map_with_path(drop, network)


def _check_num_samples(network: Network, num_samples) -> None:
    if num_samples is None or isinstance(num_samples, Tracer):
        return
    if not np.all(np.asarray(num_samples) >= 1):
        remedy = "give a whole number >= 1, or None for the limit"
        raise problem(SpecError, "num_samples", num_samples, "not a number of samples", remedy)
    batch_norm = any(isinstance(inner, BatchNorm) for _, inner in walk(network.body))
    if batch_norm and not np.all(np.asarray(num_samples) >= 2):
        cause = "a BatchNorm on one sample has no variance"
        raise problem(SpecError, "num_samples", num_samples, cause, "give at least 2")


def _whole_pass(network: Network, statistics: str, num_samples) -> Theory:
    body = network.body
    if len(network.output_shape) != 1:
        remedy = "end with Flatten() or GlobalMeanPool() and Dense(outputs)"
        raise problem(SpecError, "output shape", network.output_shape, "not a vector", remedy)
    dtype = jnp.result_type(float, *jax.tree.leaves(network))
    start = input_kernel(
        network.input_shape, num_samples, statistics, _positions_meet(network), dtype
    )

    def tangent_behind(taps):
        kernel, records = body.propagate(start, taps)
        return kernel.settled_tangent, (kernel, records)

    taps = _zero_taps(jax.eval_shape(tangent_behind, None)[1][1])
    tangent, pull, (kernel, records) = jax.vjp(tangent_behind, taps, has_aux=True)
    one_each = Pair(*jnp.eye(2, dtype=tangent.same.dtype))
    (back,) = jax.vmap(pull, out_axes=-1)(one_each)
    records = _map_records(lambda r, b: dataclasses.replace(r, back=b), records, back)

    rows = body.rows(records, _read)
    labels = body.labels(records, "")
    linear = np.array([not isinstance(inner, BatchNorm) for _, inner in labels])
    paths = np.array([path for path, _ in labels])
    shares = Shares(rows["weights"], rows["biases"], rows["norm"], tuple(paths.tolist()))
    order = OrderParameters(
        **{name: rows[name][linear] for name in rows if name.startswith("q")},
        layers=tuple(paths[linear].tolist()),
    )
    fisher = Fisher(
        tangent_same=tangent.same,
        tangent_other=tangent.other,
        inverse_samples=kernel.inverse_samples,
        shares=shares,
        num_outputs=network.output_shape[0],
        num_parameters=network.num_parameters,
    )
    return Theory(fisher, order, kernel, network)


_analyze = jax.jit(_whole_pass, static_argnames="statistics")

_analyze_at_once = jax.jit(
    _whole_pass,
    static_argnames="statistics",
    # On CPU, XLA fuses every number with all layers before it: 15 layers compile in 30 s instead of
    # 1 s. One network alone gains nothing from fusion.
    compiler_options={"xla_disable_hlo_passes": "fusion"},
)


def _positions_meet(network: Network) -> bool:
    """Whether pairs of distinct positions count: a mean over positions of maps that vary.

    Zero padding makes them vary. Leaving the pairs out then costs 5 % of lambda_max (32x32x3, 3x3
    stride 2, 30-60-90 channels).
    """
    layers = [inner for _, inner in walk(network.body)]
    pooled = any(isinstance(inner, GlobalMeanPool) for inner in layers)
    averaged = any(isinstance(inner, BatchNorm) and inner.axes == "channel" for inner in layers)
    padded = any(isinstance(inner, Conv) and inner.padding == "SAME" for inner in layers)
    return pooled or (averaged and padded)


def _map_records(function, records, *rest):
    return jax.tree.map(function, records, *rest, is_leaf=lambda node: isinstance(node, Record))


def _zero_taps(records):
    def zeros(matrix: Pair) -> Pair:
        return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), matrix)

    return _map_records(lambda r: Tap(zeros(r.after.tangent), zeros(r.after.scale)), records)


def _read(record: Record) -> Rows:
    """One layer's order parameters and shares of the outlier, (1,) each."""
    assert record.back is not None
    before, after, injection = record.before, record.after, record.injection
    share = after.inverse_samples
    tangent, scale = (
        jax.tree.map(lambda entry: share * entry[..., 0] + (1 - share) * entry[..., 1], back)
        for back in (record.back.tangent, record.back.scale)
    )
    values = dict(
        weights=_dot(tangent, injection.weights),
        biases=_dot(tangent, injection.biases),
        norm=_dot(tangent, injection.offset) + _dot(scale, injection.scale),
        **_positions_mean("q", after),
        **_positions_mean("q_hat", before),
        **_positions_sum("q_tilde", after, record.back.tangent),
    )
    return {name: value[None] for name, value in values.items()}


def _dot(derivative: Pair, injection: Pair | None) -> Array:
    if injection is None:
        return jnp.zeros((), derivative.same.dtype)
    return jnp.sum(derivative.same * injection.same) + jnp.sum(derivative.other * injection.other)


def _positions_mean(name: str, kernel: EnsembleKernel) -> Rows:
    same, other = kernel.moment
    own = kernel.same_positions(other)
    pairs = other.size - own.size
    unequal = (other.sum() - own.sum()) / pairs if pairs else own.mean()
    return {
        name: kernel.same_positions(same).mean(),
        f"{name}_xy": own.mean(),
        f"{name}_ab": unequal,
    }


def _positions_sum(name: str, kernel: EnsembleKernel, back: Pair) -> Rows:
    same, other = back.same[..., 0], back.other[..., 1]
    own = kernel.same_positions(other).sum()
    return {
        name: kernel.same_positions(same).sum(),
        f"{name}_xy": own,
        f"{name}_ab": other.sum() - own,
    }
