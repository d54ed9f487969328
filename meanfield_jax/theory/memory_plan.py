"""Which pairs of positions the theory of a batch keeps, depending on the device's memory."""

import contextlib
import functools
import math
from collections.abc import Generator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import Tracer
from jaxtyping import Float

from meanfield_jax.errors import DataError, problem
from meanfield_jax.kernel.kernel import batch_inputs
from meanfield_jax.layers.base import Layer, map_records
from meanfield_jax.layers.combine import Sequential
from meanfield_jax.limits import how_to_raise, limit_set, within
from meanfield_jax.memory import memory_of
from meanfield_jax.network import walk
from meanfield_jax.theory.compiled import with_widths

MAX_ENTRIES = 2**28
"""Largest number of entries of a matrix over a batch and the pairs of its positions."""

LIVE = {1: 75, 3: 35}
"""Peak memory in units of the largest matrix (measured), for vectors and for images."""

ROOM: ContextVar[float] = ContextVar("ROOM", default=0.5)
"""Fraction of the memory above which a sample of the positions is taken instead of all pairs."""


@contextlib.contextmanager
def room(fraction: float) -> Generator[None]:
    """Sets this fraction for theories that are computed beside something larger."""
    before = ROOM.set(fraction)
    try:
        yield
    finally:
        ROOM.reset(before)


def modulus_for(
    body: Layer, widths: tuple[float, ...], x: Float[Array, "n ..."], statistics: str
) -> int:
    """The pairs of positions to keep: all that count if there is room for them, else a sample.

    Args:
        body: The layers, without widths.
        widths: Their widths.
        x: The batch.
        statistics: How the BatchNorms are differentiated.

    Returns:
        The modulus of :class:`Positions`; 1 keeps every pair.

    Raises:
        DataError: if not even the pairs of equal positions fit, or if the device's memory is too
            small.
    """
    layers = [inner for _, inner in walk(body)]
    pools = any(inner.pools for inner in layers)
    strides = stride_before_pool(body)
    # a pooling layer can do without no pair, other layers average over those that are kept
    largest = strides * (1 if pools else max(x.shape[1:]))

    def entries(modulus: int) -> int:
        """Numbers in the largest covariance that a pass over this network and batch keeps."""
        records = records_on_data(body, widths, x, statistics, modulus)
        kept = map_records(lambda record: record.after.covariance, records)
        return max(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept))

    bytes_each = LIVE[x.ndim - 1] * x.dtype.itemsize
    devices = jax.local_devices()[:1] if isinstance(x, Tracer) else x.devices()
    memory = limit_set("MEMORY") or memory_of(devices)
    most = min(MAX_ENTRIES, memory / bytes_each)
    modulus = strides if couples_positions(body, on_data=True) else largest
    if any(inner.within_sample for inner in layers):
        modulus = 1
    comfortable = min(MAX_ENTRIES, ROOM.get() * memory / bytes_each)
    while (size := entries(modulus)) > comfortable and modulus < largest:
        modulus *= 2
    if size > MAX_ENTRIES:
        cause = (
            f"{x.shape[0]} samples take {size:.1e} numbers per layer, above the {MAX_ENTRIES:.1e}"
            " allowed"
        )
        remedy = f"pass at most {int(x.shape[0] * math.sqrt(MAX_ENTRIES / size))} samples"
        raise problem(DataError, "data.shape", x.shape, cause, remedy)
    if size > most:
        needed = bytes_each * size
        cause = f"needs {needed / 2**30:.1f} GiB, above the {memory / 2**30:.1f} on this device"
        count = int(x.shape[0] * math.sqrt(memory / needed))
        remedy = f"pass at most {count} samples, or {how_to_raise('MEMORY')}"
        raise problem(DataError, "data.shape", x.shape, cause, remedy)
    return modulus


def stride_before_pool(layer: Layer) -> int:
    """The factor by which the sides of a map shrink before the first pooling layer, or in all."""
    if not any(inner.pools for _, inner in walk(layer)):
        return layer.total_stride
    if isinstance(layer, Sequential):
        place = next(i for i, la in enumerate(layer.layers) if any(p.pools for _, p in walk(la)))
        before = math.prod(inner.total_stride for inner in layer.layers[:place])
        return before * stride_before_pool(layer.layers[place])
    return min(map(stride_before_pool, layer.children().values()), default=1)


def check_iid(body: Layer, input_shape: tuple[int, ...], num_outputs: int) -> None:
    """Raises SpecError if the theory of i.i.d. inputs does not fit the memory."""
    positions = math.prod(input_shape[:-1])
    entries = positions ** (2 if couples_positions(body) else 1)
    bytes_each = jnp.zeros(()).dtype.itemsize
    within("MEMORY", "input_shape", input_shape, LIVE[3] * bytes_each * entries)
    within("MEMORY", "outputs", num_outputs, bytes_each * num_outputs)


def records_on_data(
    body: Layer,
    widths: tuple[Array | float, ...],
    x: Float[Array, "n ..."],
    statistics: str,
    modulus: int,
) -> Any:
    """The records of a pass over this network and batch, as shapes and dtypes."""
    given = jax.eval_shape(lambda *arrays: arrays, body, widths, x)
    shapes, structure = jax.tree.flatten(given)
    return _traced_records(structure, tuple(shapes), jnp.zeros(()).dtype, statistics, modulus)


@functools.cache  # tracing the pass takes longer than many a pass
def _traced_records(
    structure: Any, shapes: tuple[Any, ...], dtype: jnp.dtype, statistics: str, modulus: int
) -> Any:
    """The same, traced once for each structure, shapes and default dtype."""

    def records(body: Layer, widths: tuple[Array, ...], x: Array) -> Any:
        return with_widths(body, widths).propagate(batch_inputs(x, statistics, modulus))[1]

    return jax.eval_shape(records, *jax.tree.unflatten(structure, shapes))


def couples_positions(body: Layer, on_data: bool = False) -> bool:
    """Whether pairs of distinct positions count, because a head or norm averages over positions.

    They count only where values vary over positions: images do, and zero padding makes i.i.d. maps
    vary. Leaving the pairs out then costs 5 % of lambda_max (32x32x3, 3x3 stride 2, 30-60-90
    channels).

    Returns:
        True if such a head or norm is among the layers.
    """
    layers = [inner for _, inner in walk(body)]
    vary = any(inner.varies_positions(on_data) for inner in layers)
    return any(inner.couples_positions(vary) for inner in layers)
