"""Variants of a network, with other scales, variances, widths, depth or norms."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from jax import Array

from meanfield_jax.checks import whole
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.layers import Layer, Sequential
from meanfield_jax.layers.combine import placed
from meanfield_jax.limits import within
from meanfield_jax.network import Network, normalizes_over_batch, walk

VANILLA = "vanilla"


def has_norm(network: Network) -> bool:
    """Whether any layer normalizes."""
    return any(inner.is_norm for _, inner in walk(network.body))


def has_batch_norm(network: Network) -> bool:
    """Whether any layer normalizes with statistics of the batch."""
    return normalizes_over_batch(network.body)


def with_gamma(network: Network, gamma: float | Array) -> Network:
    """The network with this scale in every norm."""
    return with_norms(network, gamma=gamma)


def with_norms(network: Network, **changes: Any) -> Network:
    """The network with these fields changed in every norm."""

    def change(inner: Layer) -> Layer:
        return inner.replace(**changes) if inner.is_norm else inner

    return _changed(network, change)


def with_norm(network: Network, norm: Layer | None) -> Network:
    """The network with every norm replaced by this one; None removes them.

    The new norm stands between the weights before it and the activation after it, as in the
    presets; if no activation follows, it takes the place of the old norm.

    Returns:
        A new specification with the inputs, weights and activations of the old one.
    """
    return Network(network.input_shape, placed(network.layers, norm))


def with_weight_var(network: Network, weight_var: float | Array) -> Network:
    """The network with this variance in every layer of weights."""

    def change(inner: Layer) -> Layer:
        return inner.replace(weight_var=weight_var) if inner.is_weights else inner

    return _changed(network, change)


def without_norms(network: Network) -> Network:
    """The network with its norms removed ("vanilla")."""
    return with_norm(network, None)


def with_width(network: Network, width: int) -> Network:
    """The network with this number of units or channels in all layers of weights but the last."""
    *hidden, last = network.layers

    def change(inner: Layer) -> Layer:
        return inner.replace(width=width) if inner.is_weights else inner

    return network.replace(layers=(*Sequential(tuple(hidden)).changed(change).layers, last))


def with_depth(network: Network, depth: int) -> Network:
    """The network with this number of identical hidden blocks (weights and what follows them).

    Returns:
        A new specification: the hidden block ``depth`` times, then the last layer.

    Raises:
        SpecError: if the hidden layers are not repetitions of one block.
    """
    depth = whole("depth", depth, 1)
    *hidden, last = network.layers
    starts = [i for i, inner in enumerate(hidden) if inner.is_weights]
    blocks = [tuple(hidden[a:b]) for a, b in itertools.pairwise([*starts, len(hidden)])]
    if not blocks or starts[0] > 0 or any(block != blocks[0] for block in blocks):
        cause = "the network's hidden blocks are not all alike"
        remedy = "use a network such as mlp([100] * 3, ...)"
        raise problem(SpecError, "depth", depth, cause, remedy)
    within("OPERATIONS", "depth", depth, depth * len(blocks[0]))
    return Network(network.input_shape, (*blocks[0] * depth, last))


def _changed(network: Network, change: Callable[[Layer], Layer]) -> Network:
    return network.replace(layers=network.body.changed(change).layers)


def variants_of(network: Network, gammas: Iterable[float]) -> dict[str, Network]:
    """By label, the network as it is, or without its norms and with each of the scales."""
    gammas = list(gammas)
    if not gammas:
        return {"network": network}
    if not has_norm(network):
        remedy = "use a network with BatchNorm or another norm, or leave gammas out"
        raise problem(SpecError, "gammas", gammas, "the network has no norm", remedy)
    variants = {VANILLA: without_norms(network)}
    return variants | {f"gamma={gamma:g}": with_gamma(network, gamma) for gamma in gammas}
