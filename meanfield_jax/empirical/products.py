"""Products with the Jacobian of a network: on the whole batch, in parts, or layer by layer."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from meanfield_jax import precise
from meanfield_jax.empirical.linearized import Product
from meanfield_jax.empirical.model import Functional, path_name

if TYPE_CHECKING:
    from meanfield_jax.empirical.fisher import FisherOperator


class Jacobian(NamedTuple):
    """The Jacobian J of all outputs with respect to all parameters, linearized once.

    Attributes:
        outputs: The outputs, (n, ..., C).
        forward: v -> J v, from a pytree like the parameters to the outputs' shape.
        backward: u -> J^T u, from the outputs' shape to a pytree like the parameters.
    """

    outputs: Float[Array, "n ..."]
    forward: Callable[[Any], Float[Array, "n ..."]]
    backward: Callable[[Float[Array, "n ..."]], Any]


def jacobian(op: "FisherOperator") -> Jacobian:
    """The Jacobian of the operator's function; its columns are multiplied by ``op.mask``."""
    of_all = _whole(op) if op.batch_size is None else _in_batches(op, op.batch_size)
    mask = op.mask
    if mask is None:
        return of_all

    def masked(tree: Any) -> Any:
        def scaled(path: tuple[Any, ...], leaf: Array) -> Array:
            return leaf * mask[path_name(path)].astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(scaled, tree)

    return Jacobian(
        of_all.outputs,
        lambda vector: of_all.forward(masked(vector)),
        lambda u: masked(of_all.backward(u)),
    )


def _whole(op: "FisherOperator") -> Jacobian:
    outputs, forward = jax.linearize(_lean(lambda params: op.evaluate(params, op.x)), op.params)
    transposed = jax.linear_transpose(forward, op.params)
    return Jacobian(outputs, forward, lambda u: transposed(u)[0])


def _lean(function: Callable[..., Array]) -> Callable[..., Array]:
    """The function, whose linearization keeps products, convolutions and their patches only.

    All else is computed again in every product. For a ResNet-18 this takes a third of the memory
    and two thirds of the time, because reading what is kept takes longer than computing it.

    Returns:
        A function with the same values and derivatives.
    """

    def kept(primitive: Any, *_: Any, **__: Any) -> bool:
        return primitive.name in ("dot_general", "conv_general_dilated", "concatenate")

    return jax.checkpoint(function, policy=kept)


def _in_batches(op: "FisherOperator", batch_size: int) -> Jacobian:
    """The Jacobian in batches, for which the network is evaluated again in every product.

    The last batch is padded with copies of the last sample, which do not count; zeros are not used,
    because a network may not be defined there.

    Returns:
        The Jacobian.
    """
    num_samples, params = op.num_samples, op.params
    missing = -num_samples % batch_size

    def split(array: Array, last: Array) -> Array:
        filling = jnp.broadcast_to(last, (missing, *array.shape[1:]))
        return jnp.concatenate([array, filling]).reshape(-1, batch_size, *array.shape[1:])

    def join(batches: Array) -> Array:
        return batches.reshape(-1, *batches.shape[2:])[:num_samples]

    batches = jax.tree.map(lambda leaf: split(leaf, leaf[-1:]), op.x)

    def forward(vector: Any) -> Array:
        def one(x: Any) -> Array:
            return jax.jvp(lambda p: op.evaluate(p, x), (params,), (vector,))[1]

        return join(jax.lax.map(one, batches))

    def backward(u: Array) -> Any:
        def add(total: Any, batch: tuple[Any, Array]) -> tuple[Any, None]:
            x, part = batch
            (gradient,) = jax.vjp(lambda p: op.evaluate(p, x), params)[1](part)
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, gradient), None

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, op.dtype), params)
        parts = split(u, jnp.zeros_like(u[:1]))
        total, _ = jax.lax.scan(add, zeros, (batches, parts))
        return jax.tree.map(lambda sum, leaf: sum.astype(leaf.dtype), total, params)

    outputs = join(jax.lax.map(lambda x: op.evaluate(params, x), batches))
    return Jacobian(outputs, forward, backward)


def outer(op: "FisherOperator") -> tuple[Float[Array, "n ..."], Product]:
    """The product with J J^T, in which the layers ``op.dense`` contribute (H H^T + 1) delta.

    H are the inputs of such a layer and delta the derivatives with respect to its outputs. The
    gradient of its weights, which is larger, is never formed.

    Returns:
        The outputs, and the function u -> J J^T u.
    """
    if not op.dense:
        outputs, forward, backward = jacobian(op)
        return outputs, lambda u: forward(backward(u))
    named, treedef = jax.tree_util.tree_flatten_with_path(op.params)
    params = {path_name(path): value for path, value in named}
    apart = [f"{layer}/{kind}" for layer in op.dense for kind in ("kernel", "bias")]
    others = {name: value for name, value in params.items() if name not in apart}
    zeros, grams = _dense_layers(op, params)

    def outputs_of(others: dict[str, Array], added: dict[str, Array]) -> Array:
        full = jax.tree.unflatten(treedef, (params | others).values())
        return op.evaluate(full, op.x, added)

    outputs, forward = jax.linearize(_lean(outputs_of), others, zeros)
    backward = jax.linear_transpose(forward, others, zeros)

    def product(u: Array) -> Array:
        gradient, deltas = backward(u)
        gradient = {name: _scale(op, name) * value for name, value in gradient.items()}
        moved = {name: precise.matmul(grams[name], deltas[name]) for name in deltas}
        return forward(gradient, moved)

    return outputs, product


def _dense_layers(
    op: "FisherOperator", params: dict[str, Array]
) -> tuple[dict[str, Float[Array, "n width"]], dict[str, Float[Array, "n n"]]]:
    """By layer, zeros to add to its outputs, and H H^T + 1 for its inputs H, (n, n)."""
    assert isinstance(op.apply, Functional)
    with precise.by_default():
        _, inputs = op.apply.with_added(op.params, {}, op.x)
    zeros: dict[str, Array] = {}
    grams: dict[str, Array] = {}
    for layer in op.dense:
        values, kernel = inputs[layer], params[f"{layer}/kernel"]
        gram = _scale(op, f"{layer}/kernel") * precise.matmul(values, values.T)
        if f"{layer}/bias" in params:
            gram += _scale(op, f"{layer}/bias")
        grams[layer] = gram
        zeros[layer] = jnp.zeros((values.shape[0], kernel.shape[1]), values.dtype)
    return zeros, grams


def _scale(op: "FisherOperator", name: str) -> Array | np.float32 | float:
    """The factor of a parameter's contribution to J J^T."""
    return 1.0 if op.mask is None else op.mask[name] ** 2
