"""Moving windows over arrays of positions."""

import math

import jax.numpy as jnp
from jax import Array, lax


def windows(
    x: Array,
    axes: tuple[int, ...],
    kernel: int,
    stride: int,
    padding: str | int,
    dilation: int = 1,
) -> list[Array]:
    """The parts of an array under each place of a one-dimensional window, as strided slices.

    Args:
        x: Any array.
        axes: Axes along which the window moves, on all of them at once.
        kernel: Length of the window.
        stride: Step of the window.
        padding: One of ``"SAME"``, ``"VALID"``, ``"CIRCULAR"``, or the zeros on each side.
        dilation: Step between neighbors within the window.

    Returns:
        ``kernel`` arrays, each with the output's size along ``axes``.
    """
    length = (kernel - 1) * dilation + 1
    pads = [(0, 0)] * x.ndim
    for axis in axes:
        pads[axis] = pad_width(x.shape[axis], length, stride, padding)
    padded = jnp.pad(x, pads, mode="wrap" if padding == "CIRCULAR" else "constant")
    slices = []
    for offset in range(0, length, dilation):
        part = padded
        for axis in axes:
            stop = offset + padded.shape[axis] - length + 1
            part = lax.slice_in_dim(part, offset, stop, stride, axis)
        slices.append(part)
    return slices


def pad_width(size: int, kernel: int, stride: int, padding: str | int) -> tuple[int, int]:
    """The padding before and after an axis of this size."""
    if not isinstance(padding, str):
        return padding, padding
    if padding == "VALID":
        return 0, 0
    if padding == "CIRCULAR":
        return (kernel - 1) // 2, kernel // 2
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
