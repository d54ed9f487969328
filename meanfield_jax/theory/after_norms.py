"""The Fisher matrix of the parameters after the norms: those that no normalization follows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from meanfield_jax.kernel.kernel import Kernel, M, batch_inputs, iid_inputs
from meanfield_jax.layers.base import PARTS, Layer, Perturbation, Record, Rows, map_records, total
from meanfield_jax.network import Network
from meanfield_jax.pytree import pytree, static
from meanfield_jax.theory.compiled import (
    compiled,
    known_numbers,
    number_of_samples,
    with_widths,
    without_widths,
)
from meanfield_jax.theory.memory_plan import couples_positions, modulus_for
from meanfield_jax.theory.passes import top_vector, zeros


@pytree
class AfterNorms:
    """What :func:`after_norms` returns.

    Attributes:
        lambda_max: The largest eigenvalue of F restricted to these parameters, ().
        tangent_same: <grad f_k(x), grad f_k(x)> over these parameters, the mean over samples, ().
        followed: By layer, 1 where a normalization follows its parameters, else 0, (layers,).
        layers: Paths of all layers with parameters.
    """

    lambda_max: Array
    tangent_same: Array
    followed: Array
    layers: tuple[str, ...] = static()

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers whose parameters no normalization follows, each once (host only)."""
        open_ends = np.asarray(self.followed).reshape(-1, len(self.layers))[0] == 0
        last = (path for path, is_last in zip(self.layers, open_ends, strict=True) if is_last)
        return tuple(dict.fromkeys(path.partition(PARTS)[0] for path in last))


def after_norms(
    network: Network, x: Array | None, statistics: str, num_samples: Array | float | None
) -> AfterNorms:
    """The largest eigenvalue of F restricted to the parameters that no normalization follows.

    On every path from them to the outputs there is no layer that normalizes: the last layer, the
    scale and offset of the last norm, and in a residual network without a final norm the last layer
    of every branch. Without any norm they are all parameters.

    Args:
        network: The specification, which ``analyze`` accepted for the same options.
        x: The batch in the dtype of the theory; None for i.i.d. inputs.
        statistics: As in ``analyze``; only ``"batch"`` makes BatchNorm a normalization.
        num_samples: As in ``analyze``.

    Returns:
        The eigenvalue, in the wide limit that of each of C outliers, and the layers.
    """
    body, widths = without_widths(known_numbers(network.body))
    if x is None:
        *positions, channels = network.input_shape
        samples = number_of_samples(num_samples)
        return _iid(body, widths, samples, float(channels), tuple(positions), statistics)
    modulus = modulus_for(body, widths, x, statistics)
    return _on_data(body, widths, x, statistics, modulus)


def _restricted(body: Layer, start: Kernel[M], statistics: str) -> tuple[M, dict[str, Any]]:
    """The tangent of these parameters alone, and the other fields of the result.

    The tangent is linear in what layers add to it, so it is the derivative in the direction of what
    these layers add. The difference of two tangents would be lost to rounding.

    Returns:
        The tangent of the outputs, and ``followed`` and ``layers``.
    """
    records = body.propagate(start)[1]
    followed, _ = body.normalized(records, False, statistics)
    shapes = zeros(records)
    direction = map_records(_direction, records, followed, shapes)

    def tangent(perturbations: Any) -> M:
        return body.propagate(start, perturbations)[0].effective_tangent

    found = jax.jvp(tangent, (shapes,), (direction,))[1]
    marked: Any = map_records(
        lambda record, mask: dataclasses.replace(record, back=jnp.asarray(mask)), records, followed
    )

    def read(record: Any) -> Rows:
        return dict(followed=jnp.atleast_1d(record.back))

    rows = body.rows(marked, read)
    paths = tuple(path for path, _ in body.labels(records, ""))
    return found, dict(followed=rows["followed"], layers=paths)


def _direction(record: Record, followed: Any, zeros: Perturbation) -> Perturbation:
    """What the layer adds to the tangent, or 0 if a normalization follows."""
    own = record.injection
    added = total(own.weights, own.biases, own.offset), own.scale, own.deviation, own.shared
    keep = 1 - jnp.asarray(followed, record.after.dtype)

    def kept(zero: Array, entry: Array) -> Array:
        mask = keep.reshape(keep.shape + (1,) * (zero.ndim - keep.ndim))
        return jnp.broadcast_to(entry * mask, zero.shape)

    parts = []
    known = zeros.tangent, zeros.scale, zeros.deviation, zeros.shared
    for part, matrix in zip(known, added, strict=True):
        same = part is None or matrix is None
        parts.append(part if same else jax.tree.map(kept, part, matrix))
    return Perturbation(*parts)


def _of_iid(
    body: Layer,
    widths: tuple[float, ...],
    num_samples: Array | float,
    channels: Array | float,
    positions: tuple[int, ...],
    statistics: str,
) -> AfterNorms:
    dtype = jnp.result_type(float, *jax.tree.leaves(body))
    body, coupled = with_widths(body, widths), couples_positions(body)
    start = iid_inputs(positions, channels, num_samples, statistics, coupled, dtype)
    tangent, fields = _restricted(body, start, statistics)
    fraction = start.covariance.inverse_samples
    outlier = fraction * tangent.same + (1 - fraction) * tangent.other
    return AfterNorms(outlier, tangent.same, **fields)


def _of_batch(
    body: Layer, widths: tuple[float, ...], x: Array, statistics: str, modulus: int
) -> AfterNorms:
    body = with_widths(body, widths)
    tangent, fields = _restricted(body, batch_inputs(x, statistics, modulus), statistics)
    matrix = tangent.entries
    top = top_vector(matrix, *jnp.linalg.eigh(matrix))
    same = jnp.diagonal(matrix).mean()
    return AfterNorms(top @ (matrix @ top) / len(x), same, **fields)


_iid = compiled(_of_iid, ("positions", "statistics"))
_on_data = compiled(_of_batch, ("statistics", "modulus"), small=2**13)
