"""The forward and the backward pass over a network, and all results computed from them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from meanfield_jax.kernel.kernel import (
    LOSS,
    Kernel,
    M,
    batch_inputs,
    first_failure_of,
    iid_inputs,
)
from meanfield_jax.kernel.matrix import Matrix
from meanfield_jax.layers.base import Layer, Perturbation, Record, Rows, map_records
from meanfield_jax.precise import matmul
from meanfield_jax.status import Status
from meanfield_jax.theory.compiled import compiled, with_widths
from meanfield_jax.theory.fisher import Contributions, Fisher
from meanfield_jax.theory.memory_plan import couples_positions, records_on_data
from meanfield_jax.theory.order_parameters import OrderParameters


class Found(NamedTuple):
    """The results of a pass for one output.

    Attributes:
        fisher: Statistics for one output, without what depends on sizes alone.
        order_parameters: By layer.
        kernel: Kernel of the outputs.
        status: A :class:`Status` as an integer.
        vectors: On data, the eigenvectors of T in the order of ascending eigenvalues, as columns.
    """

    fisher: Fisher
    order_parameters: OrderParameters
    kernel: Kernel[Any]
    status: Int[Array, ""]
    vectors: Float[Array, "n n"] | None = None


class Pass(NamedTuple, Generic[M]):
    """A forward pass, and the backward pass from it.

    Attributes:
        kernel: Kernel of the outputs.
        tangent: Tangent of the outputs, with all averages taken.
        records: Records of every layer with parameters.
        backward: Function from a matrix M to the rows of the derivatives of sum(M * tangent).
    """

    kernel: Kernel[M]
    tangent: M
    records: Any
    backward: Callable[[M], Rows]


def _iid(
    body: Layer,
    widths: tuple[Array | float, ...],
    num_samples: Array | float,
    channels: Array | float,
    positions: tuple[int, ...],
    statistics: str,
) -> Found:
    dtype = jnp.result_type(float, *jax.tree.leaves(body))
    body, coupled = with_widths(body, widths), couples_positions(body)
    start = iid_inputs(positions, channels, num_samples, statistics, coupled, dtype)
    kernel, tangent, records, backward = forward(
        body, start, jax.eval_shape(lambda: body.propagate(start)[1])
    )
    fraction = tangent.inverse_samples
    same, other, none = *jnp.eye(2, dtype=dtype), jnp.zeros(2, dtype)
    directions = dataclasses.replace(tangent, same=same, other=other, inverse_samples=none)
    backs = {
        name: jnp.stack([same, other, fraction * same + (1 - fraction) * other])
        for name, (same, other) in jax.vmap(backward)(directions).items()
    }
    fisher = dict(
        tangent_same=tangent.same,
        tangent_other=tangent.other,
        inverse_samples=fraction,
    )
    outlier = fraction * tangent.same + (1 - fraction) * tangent.other
    return _found(body, kernel, records, backs, fisher, outlier)


def _on_data(
    body: Layer,
    widths: tuple[Array | float, ...],
    x: Float[Array, "n ..."],
    statistics: str,
    modulus: int,
) -> Found:
    shapes = records_on_data(body, widths, x, statistics, modulus)
    body = with_widths(body, widths)
    kernel, tangent, records, backward = forward(body, batch_inputs(x, statistics, modulus), shapes)
    num_samples, matrix = x.shape[0], tangent.entries
    eigenvalues, vectors = jnp.linalg.eigh(matrix / num_samples)
    top = top_vector(matrix, eigenvalues * num_samples, vectors)
    same = jnp.eye(num_samples, dtype=x.dtype) / num_samples
    other = (1 - jnp.eye(num_samples, dtype=x.dtype)) / max(num_samples * (num_samples - 1), 1)
    outlier = jnp.outer(top, top) / num_samples
    # one after the other, because each takes the memory of dozens of matrices
    backs = jax.lax.map(
        lambda entries: backward(tangent.replaced(entries)), jnp.stack([same, other, outlier])
    )
    fisher = dict(
        tangent_same=jnp.sum(same * matrix),
        tangent_other=jnp.sum(other * matrix),
        inverse_samples=jnp.asarray(1 / num_samples, x.dtype),
        eigenvalues=eigenvalues[::-1],
    )
    found = _found(body, kernel, records, backs, fisher, eigenvalues[-1])
    return found._replace(vectors=vectors)


iid = compiled(_iid, ("positions", "statistics"))
on_data = compiled(_on_data, ("statistics", "modulus"), small=2**13)


def top_vector(
    matrix: Float[Array, "n n"], eigenvalues: Float[Array, " n"], vectors: Float[Array, "n n"]
) -> Float[Array, " n"]:
    """The last eigenvector, with its derivative from first-order perturbation theory.

    The derivative of ``eigh`` is NaN where any two eigenvalues are equal.

    Returns:
        The unit vector.
    """
    eigenvalues, vectors = jax.lax.stop_gradient((eigenvalues, vectors))
    top, rest = vectors[:, -1], vectors[:, :-1]
    gap = eigenvalues[-1] - eigenvalues[:-1]
    separate = gap > jnp.finfo(gap.dtype).eps * len(vectors) * eigenvalues[-1]
    change = matmul(rest.T, matmul(matrix, top)) / jnp.where(separate, gap, jnp.inf)
    # the products vanish; only their derivatives do not
    return top + matmul(rest, change - jax.lax.stop_gradient(change))


def forward(body: Layer, start: Kernel[M], shapes: Any) -> Pass[M]:
    """The forward pass, from which the backward pass can start.

    Args:
        body: The layers.
        start: The kernel of the inputs.
        shapes: The records, as shapes and dtypes.

    Returns:
        See :class:`Pass`.
    """

    def perturbed(perturbations: Any) -> tuple[M, Any]:
        kernel, records = body.propagate(start, perturbations)
        return kernel.effective_tangent, (kernel, records)

    tangent, pull, (kernel, records) = jax.vjp(perturbed, zeros(shapes), has_aux=True)

    def backward(matrix: M) -> Rows:
        back = map_records(
            lambda record, found: dataclasses.replace(record, back=found), records, pull(matrix)[0]
        )
        return body.rows(back, _read_back)

    return Pass(kernel, tangent, records, backward)


def zeros(records: Any) -> Any:
    """Perturbations that are all 0."""

    def zeros(record: Record) -> Perturbation:
        after = record.after
        parts = (after.tangent, after.scale, after.tangent_deviation, after.shared_tangent)
        return Perturbation(*jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), parts))

    return map_records(zeros, records)


def _found(
    body: Layer,
    kernel: Kernel[Any],
    records: Any,
    backs: Rows,
    fisher: dict[str, Any],
    outlier: Float[Array, ""],
) -> Found:
    """The results of the passes; ``backs`` are the derivatives of T_same, T_other, outlier."""
    rows = body.rows(records, _read)
    rows["q_tilde"] = backs["same"][0]
    rows["q_tilde_xy"] = backs["other"][1]
    labels = body.labels(records, "")
    linear = np.array([inner.is_weights for _, inner in labels])
    paths = np.array([path for path, _ in labels])
    after = _widths_after(body, records, kernel.dtype)
    kinds = {name: backs[name][2] for name in ("weights", "biases", "norm")}
    # the factor of the derivatives of (T_same - outlier) / (n - 1)
    fraction = fisher["inverse_samples"]
    small = fraction / jnp.where(fraction < 1, 1 - fraction, 1)
    total = backs["weights"] + backs["biases"] + backs["norm"]
    order = OrderParameters(
        **{name: rows[name][linear] for name in rows if name.startswith("q")},
        layers=tuple(paths[linear].tolist()),
    )
    sums = total.sum(-1)[jnp.array([0, 2])]
    status = _status(kernel, sums, jnp.stack([fisher["tangent_same"], outlier]))
    hole = jnp.where(status == Status.CONVERGED, 1.0, jnp.nan).astype(kernel.dtype)
    kinds = {name: hole * value for name, value in kinds.items()}
    for name in ("tangent_same", "tangent_other", "eigenvalues"):
        if name in fisher:
            fisher[name] = hole * fisher[name]
    statistics = Fisher(
        **fisher,
        variance_fluctuation=kernel.fluctuation,
        contributions=Contributions(**kinds, layers=tuple(paths.tolist())),
        bulk_contributions=small * (total[0] - total[2]),
        draw_width=jnp.sqrt(jnp.maximum(after, 0)),
        information=jnp.zeros(1),
        num_parameters=0,
        multiplicity=0,
    )
    return Found(statistics, order, kernel, status)


def _widths_after(body: Layer, records: Any, dtype: jnp.dtype) -> Float[Array, " layers"]:
    """The sum of 1/width over the layers after each."""
    sums, _ = body.widths_after(records, jnp.zeros((), dtype))
    marked = map_records(lambda record, own: dataclasses.replace(record, back=own), records, sums)

    def read(record: Any) -> Rows:
        return dict(after=jnp.atleast_1d(record.back))

    return body.rows(marked, read)["after"]


def _status(
    kernel: Kernel[Any], sums: Float[Array, "2"], wholes: Float[Array, "2"]
) -> Int[Array, ""]:
    """The theory's status.

    Args:
        kernel: Kernel of the outputs, with the status of all normalizations before.
        sums: Sums of all layers' contributions to T_same and to the outlier, from the backward
            pass.
        wholes: T_same and the outlier themselves, from the forward pass. Where the two differ,
            rounding errors dominate.

    Returns:
        A :class:`Status` as an integer.
    """
    finite = jnp.isfinite(sums).all() & jnp.isfinite(wholes).all()
    equal = jnp.all(jnp.abs(sums - wholes) <= LOSS * jnp.abs(wholes))
    own = jnp.where(equal, Status.CONVERGED, Status.CANCELLATION)
    return first_failure_of(kernel.status, jnp.where(finite, own, Status.NOT_FINITE))


def _read(record: Record) -> Rows:
    """One layer's order parameters, (1,) each."""
    before, after = record.before, record.after
    values = dict(
        **dict(zip(("q", "q_xy"), after.moment.averages(), strict=True)),
        **dict(zip(("q_hat", "q_hat_xy"), before.moment.averages(), strict=True)),
    )
    return {name: value[None] for name, value in values.items()}


def _read_back(record: Record) -> Rows:
    """The derivative at one layer: its sums, and its products with the layer's contributions."""
    back, injection = record.back, record.injection
    assert back is not None
    assert back.tangent is not None
    whole = back.tangent
    if back.deviation is not None:  # what layers that subtract a mean depend on
        whole = whole + back.deviation
    values = dict(
        **dict(zip(("same", "other"), whole.totals(), strict=True)),
        weights=_dot(back.tangent, injection.weights)
        + _dot(back.deviation, injection.deviation)
        + _dot(back.shared, injection.shared),
        biases=_dot(back.tangent, injection.biases),
        norm=_dot(back.tangent, injection.offset) + _dot(back.scale, injection.scale),
    )
    return {name: value[None] for name, value in values.items()}


def _dot(derivative: Matrix | None, injection: Matrix | None) -> Float[Array, ""]:
    """Sum of the products of all entries; 0 if the layer has no such parameters."""
    if derivative is None or injection is None:
        return jnp.zeros(())
    return (derivative * injection).sum()
