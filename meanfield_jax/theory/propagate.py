"""The one pass over a network, and everything read off it: ``analyze`` and its result."""

import dataclasses
import functools
import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax import Array
from jax.core import Tracer

from meanfield_jax.errors import DataError, SpecError, check_choice, check_data, problem
from meanfield_jax.kernel.gram import batch_kernel
from meanfield_jax.kernel.state import LOSS, STATISTICS, Pair, input_kernel, worse
from meanfield_jax.layers import Conv, Dense, GlobalMeanPool, Norm
from meanfield_jax.layers.base import Kernel, Layer, Matrix, Record, Rows, Tap
from meanfield_jax.memory import memory_of
from meanfield_jax.network import Network, normalizes_over_batch, walk
from meanfield_jax.precise import matmul
from meanfield_jax.status import Status, first_failure
from meanfield_jax.theory.fisher import Fisher, Shares
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.likelihood import class_information, mean_information, of_outputs

Spec = TypeVar("Spec", Network, Layer)

MAX_ENTRIES = 2**28
"""Most numbers of one matrix over a batch and the pairs of its positions."""

LIVE = {1: 75, 3: 35}
"""How many of the largest matrix live at a time, measured: for vectors, for images."""


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


CAUSES = {
    Status.NOT_FINITE: "numbers overflow; compute in float64, or use smaller scales and variances",
    Status.FEW_DIRECTIONS: (
        "the batch varies in too few directions for a normalization over it, and the mean of 1 / "
        "variance over random weights is infinite; give more features and samples, none of which "
        "outweighs all others, or measure a draw with fisher_operator"
    ),
    Status.CANCELLATION: (
        "the batch is so nearly constant that its variance is lost to rounding; "
        "compute in float64, or subtract the mean from the data"
    ),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Theory:
    """What mean-field theory says of a network; a pytree, made by :func:`analyze`.

    Attributes:
        fisher: Statistics of the Fisher information matrix.
        order_parameters: q, q_xy, ... by layer.
        kernel: Covariance and tangent of the outputs.
        network: The specification.
        status: A :class:`Status` as integer: CONVERGED, NOT_FINITE (overflow), FEW_DIRECTIONS or
            CANCELLATION. Unless it is CONVERGED the numbers of ``fisher`` are NaN.
    """

    fisher: Fisher
    order_parameters: OrderParameters
    kernel: Kernel
    network: Network
    status: Array

    def raise_if_failed(self) -> "Theory":
        """Returns itself, or raises for the first network that failed (host only).

        Raises:
            RuntimeError: the status is not CONVERGED.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        raise RuntimeError(f"analyze: {CAUSES[failed.status]}{failed.where}")

    def eta_max(self, momentum: float | Array = 0.9) -> Array:
        """The largest stable learning rate of heavy-ball gradient descent on the squared loss.

        Args:
            momentum: mu, in [0, 1).

        Returns:
            2 (1 + mu) / lambda_max, see :func:`meanfield_jax.theory.learning_rate.eta_max`.
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
            status=Status(int(self.status)).label,
            statistics=self.kernel.statistics,
            momentum=momentum,
        )
        coords = dict(layer=list(order.layers), block=list(fisher.shares.layers))
        return xr.Dataset(data, coords, attributes)


def analyze(
    network: Network,
    *,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | Array | None = None,
    likelihood: str = "gaussian",
    probabilities: Array | None = None,
    throw: bool = True,
) -> Theory:
    """Mean-field theory of a network, in one pass, on i.i.d. inputs or on a batch of data.

    For a network f: inputs -> C outputs and n inputs it predicts the Fisher information matrix
    F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T of the squared loss (1/2n) sum ||f - y||^2:
    C outliers T_same/n + (n-1)/n T_other, a bulk (T_same - T_other)/n, the trace C T_same.
    Compiled once for each structure; the numbers of the network (gamma, weight_var, ...) can be
    vmapped over and differentiated in, twice. Put large grids into ``jax.jit``, and deep networks
    into :class:`Repeat`, which compiles in the time of one block.

    Args:
        network: The specification.
        data: A batch, (n, *input_shape): theory of these very inputs in place of i.i.d. ones, with
            the whole spectrum in ``theory.fisher.eigenvalues``. Costs O(n^2) memory (n = 4000
            vectors: 5.1 GB) and O(n^3) time; sharded along n over a mesh with automatic axes
            (``jax.sharding.AxisType.Auto``), it is computed on all devices.
        statistics: What is differentiated through a BatchNorm: ``"batch"`` (a network in training,
            what decides stability), ``"frozen"`` (in evaluation), ``"wei2019"`` (as published).
        num_samples: For i.i.d. inputs (of unit variance) n, the batch; None for the limit
            n -> infinity, where the bulk vanishes.
        likelihood: ``"gaussian"``, as above, or ``"categorical"``, F of softmax outputs p and the
            cross-entropy: (1/n) sum_i J_i^T (diag p_i - p_i p_i^T) J_i.
        probabilities: The p of a categorical likelihood, (n, C): those of a draw,
            ``jax.nn.softmax(model(x))``. None: flat, 1/C.
        throw: Whether a batch that cannot be normalized is an error. Under jit, or if False, only
            ``status`` says so, and the numbers are NaN.

    Returns:
        The theory; float64 under ``jax.enable_x64()``, else float32. Overflow is told by
        ``theory.status`` and raised by ``theory.raise_if_failed()``.

    Raises:
        SpecError: for numbers or options that make no sense.
        DataError: for data that does not fit the network or the memory, varies in two directions
            or fewer where a BatchNorm normalizes it, or is too nearly constant for its dtype.

    Accuracy:
        On Gaussian inputs, FC 784-1000x3-10 with BatchNorm, n = 1000, train mode: mean of the C
        outliers within 0.3 % (benchmarks/accuracy.py). Corrections are O(1/width); a vanilla
        network's draws scatter by about sqrt(depth C / width). On data (FC 784-1000x3-10 on 400
        MNIST images, conv 30-60-90 on 128 of CIFAR-10, benchmarks/real_data.py): outliers within
        1 % in training and 4 % in evaluation, the trace within 2 %. The wide limit leaves out that
        eigenvalues repel each other by about n C / width: eigenvalues 2-6 come out 4-12 % low (FC)
        and up to 31 % (narrow conv), and see ``Fisher.outlier_limited`` for deep networks.
        On small or very correlated batches ReLU-like functions behind a BatchNorm are exact to
        O(1/PR^2), others to O(1/PR), PR the participation ratio of the batch's covariance.
        Conv with BatchNorm over channels averages over positions by an even sample of them where
        memory is short (strides), see ``Positions``.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm(gamma=0.5))
        >>> round(float(mf.analyze(net, num_samples=200).eta_max(momentum=0.9)), 4)
        0.0894

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606); Karakida, Akaho & Amari 2019
        (arXiv:1806.01316) for the spectrum's statistics.
    """
    network.validate()
    check_choice("statistics", statistics, STATISTICS)
    known = known_numbers(network)
    if data is not None:
        x = _checked_data(network, data, num_samples)
        classes = class_information(network, likelihood, probabilities, len(x))
        theory = _on_data(known, statistics, x, classes, _modulus(known, x, statistics))
    else:
        check_num_samples(network.body, num_samples)
        classes = class_information(network, likelihood, probabilities, None)
        theory = _iid(known, statistics, num_samples, classes)
    if throw:
        _check_domain(network, theory.status, data)
    return dataclasses.replace(theory, network=network)


def _check_domain(network: Network, status: Array, data: Any) -> None:
    """Raises where a batch, or a network, cannot be normalized, if that is known."""
    if isinstance(status, Tracer):
        return
    if data is not None and normalizes_over_batch(network.body):
        values = np.asarray(data)
        if (values == values[:1]).all():
            cause = "all samples are equal, which leaves a BatchNorm nothing to divide by"
            raise problem(DataError, "data.shape", values.shape, cause, "give samples that differ")
    failed = first_failure(status, Status.CONVERGED, Status.NOT_FINITE)
    if failed is None:
        return
    cause, _, remedy = CAUSES[failed.status].rpartition("; ")
    if data is None:
        raise problem(SpecError, "network", failed.status.label, cause, remedy)
    raise problem(DataError, "data.shape", np.shape(data), cause, remedy)


def _checked_data(network: Network, data: Any, num_samples) -> Array:
    """The batch in the dtype of the theory; errors name what does not fit."""
    if num_samples is not None:
        cause, remedy = "data has its own number of samples", "leave it out"
        raise problem(SpecError, "num_samples", num_samples, cause, remedy)
    x = check_data(data)
    if x.shape[1:] != network.input_shape:
        remedy = f"give (samples, {', '.join(map(str, network.input_shape))})"
        raise problem(DataError, "data.shape", x.shape, "not the network's inputs", remedy)
    least = least_samples(network.body)
    if len(x) < least:
        cause = f"theory needs {least} samples or more for this network"
        raise problem(DataError, "data.shape", x.shape, cause, "give more samples")
    return x.astype(jnp.result_type(float, *jax.tree.leaves(network)))


def least_samples(layer: Layer) -> int:
    """With BatchNorm 4: the inverse variance of fewer Gaussian values has no expectation."""
    return 4 if normalizes_over_batch(layer) else 1


def known_numbers(network: Spec) -> Spec:
    """The network in the form that is compiled for.

    Offsets that are known to be 0 become None, and with them the need for quadrature. Whole numbers
    and NumPy's become floats, so that 1, 1.0 and ``np.float64(1)`` share a program.

    Returns:
        A specification of the same structure and the same theory.
    """

    def known(path, leaf):
        if isinstance(leaf, Tracer):
            return leaf
        if path[-1].name == "beta" and np.all(np.asarray(leaf) == 0):
            return None
        return float(leaf) if isinstance(leaf, (int, float, np.integer)) else leaf

    return jax.tree_util.tree_map_with_path(known, network)


def check_num_samples(layer: Layer, num_samples) -> None:
    """Raises SpecError where a known number of samples is too small for the layer."""
    if num_samples is None or isinstance(num_samples, Tracer):
        return
    if not np.all(np.asarray(num_samples) >= 1):
        remedy = "give a whole number >= 1, or None for the limit"
        raise problem(SpecError, "num_samples", num_samples, "not a number of samples", remedy)
    least = least_samples(layer)
    if not np.all(np.asarray(num_samples) >= least):
        cause = "a BatchNorm's inverse variance has no expectation on so few samples"
        raise problem(SpecError, "num_samples", num_samples, cause, f"give at least {least}")


def _iid_pass(network: Network, statistics: str, num_samples, classes: Array | None) -> Theory:
    dtype = jnp.result_type(float, *jax.tree.leaves(network))
    start = input_kernel(
        network.input_shape, num_samples, statistics, _positions_meet(network), dtype
    )
    shapes = jax.eval_shape(lambda: network.body.propagate(start, None)[1])
    kernel, tangent, records, backward = _forward(network, start, shapes)
    share = kernel.inverse_samples
    same_and_other = jax.vmap(backward)(Pair(*jnp.eye(2, dtype=dtype)))
    backs = {
        name: jnp.stack([same, other, share * same + (1 - share) * other])
        for name, (same, other) in same_and_other.items()
    }
    fisher = dict(
        tangent_same=tangent.same,
        tangent_other=tangent.other,
        inverse_samples=kernel.inverse_samples,
        **mean_information(network, classes, kernel.dtype),
    )
    outlier = share * tangent.same + (1 - share) * tangent.other
    return _theory(network, kernel, records, backs, fisher, outlier)


def _data_pass(
    network: Network, statistics: str, x: Array, classes: Array | None, modulus: int
) -> Theory:
    start = batch_kernel(x, statistics, modulus)
    shapes = _records_on_data(network, x, statistics, modulus)
    kernel, tangent, records, backward = _forward(network, start, shapes)
    num_samples = x.shape[0]
    eigenvalues, vectors = jnp.linalg.eigh(tangent / num_samples)
    top = _top_vector(tangent, eigenvalues * num_samples, vectors)
    same = jnp.eye(num_samples, dtype=x.dtype) / num_samples
    other = (1 - jnp.eye(num_samples, dtype=x.dtype)) / max(num_samples * (num_samples - 1), 1)
    outlier = jnp.outer(top, top) / num_samples
    # one after the other: each takes the memory of dozens of matrices
    backs = jax.lax.map(backward, jnp.stack([same, other, outlier]))
    fisher = dict(
        tangent_same=jnp.sum(same * tangent),
        tangent_other=jnp.sum(other * tangent),
        inverse_samples=jnp.asarray(1 / num_samples, x.dtype),
        eigenvalues=of_outputs(eigenvalues, vectors, classes)[::-1],
        **mean_information(network, classes, kernel.dtype),
    )
    return _theory(network, kernel, records, backs, fisher, eigenvalues[-1])


def _top_vector(matrix: Array, eigenvalues: Array, vectors: Array) -> Array:
    """The last eigenvector, with its derivative by first-order perturbation.

    That of ``eigh`` is NaN where any two eigenvalues are equal.

    Returns:
        The unit vector, (n,).
    """
    eigenvalues, vectors = jax.lax.stop_gradient((eigenvalues, vectors))
    top, rest = vectors[:, -1], vectors[:, :-1]
    gap = eigenvalues[-1] - eigenvalues[:-1]
    separate = gap > jnp.finfo(gap.dtype).eps * len(vectors) * eigenvalues[-1]
    change = matmul(rest.T, matmul(matrix, top)) / jnp.where(separate, gap, jnp.inf)
    # the products vanish; only their derivatives do not
    return top + matmul(rest, change - jax.lax.stop_gradient(change))


def _modulus(network: Network, x: Array, statistics: str) -> int:
    """Which pairs of positions to keep: all that count if memory allows, else an even sample.

    Returns:
        The modulus of :class:`Positions`; 1 keeps every pair.

    Raises:
        DataError: not even the pairs of equal positions fit, or the device's memory is too small.
    """
    layers = [inner for _, inner in walk(network.body)]
    strides = math.prod(inner.stride for inner in layers if isinstance(inner, Conv))
    largest = strides * max(network.input_shape)

    def entries(modulus: int) -> int:
        """Numbers in the largest covariance that a pass over this network and batch keeps."""
        records = _records_on_data(network, x, statistics, modulus)
        kept = _map_records(lambda record: record.after.cov, records)
        return max(math.prod(leaf.shape) for leaf in jax.tree.leaves(kept))

    bytes_each = LIVE[len(network.input_shape)] * x.dtype.itemsize
    memory = memory_of(jax.local_devices()[:1] if isinstance(x, Tracer) else x.devices())
    most = min(MAX_ENTRIES, memory / bytes_each)
    modulus = strides if _positions_meet(network, on_data=True) else largest
    if any(isinstance(inner, Norm) and inner.within_sample for inner in layers):
        modulus = 1
    while (size := entries(modulus)) > most and modulus < largest:
        modulus *= 2
    if size > MAX_ENTRIES:
        cause = (
            f"{x.shape[0]} samples take {size:.1e} numbers a layer, of at most {MAX_ENTRIES:.1e}"
        )
        remedy = f"pass at most {int(x.shape[0] * math.sqrt(MAX_ENTRIES / size))} samples"
        raise problem(DataError, "data.shape", x.shape, cause, remedy)
    if size > most:
        needed = bytes_each * size
        cause = f"it takes {needed / 2**30:.1f} GiB, of {memory / 2**30:.1f} on this device"
        remedy = f"pass at most {int(x.shape[0] * math.sqrt(memory / needed))} samples"
        raise problem(DataError, "data.shape", x.shape, cause, remedy)
    return modulus


def _records_on_data(network: Network, x: Array, statistics: str, modulus: int):
    """The records of a pass over this network and batch, as shapes and dtypes."""
    given = jax.eval_shape(lambda *arrays: arrays, network, x)
    shapes, structure = jax.tree.flatten(given)
    return _traced_records(structure, tuple(shapes), jnp.zeros(()).dtype, statistics, modulus)


@functools.cache  # tracing the pass takes longer than many a pass
def _traced_records(structure, shapes: tuple, dtype: jnp.dtype, statistics: str, modulus: int):
    """The same, once for each structure, shapes and default dtype."""

    def records(network, x):
        return network.body.propagate(batch_kernel(x, statistics, modulus), None)[1]

    return jax.eval_shape(records, *jax.tree.unflatten(structure, shapes))


def _forward(network: Network, start: Kernel, shapes):
    """Kernel and tangent of the outputs, records, and what the layers do to the tangent.

    Args:
        network: The specification.
        start: The kernel of the inputs.
        shapes: The records, as shapes and dtypes.

    Returns:
        These four; the last is a function that maps a matrix M to rows of the derivatives of
        sum(M * tangent).
    """
    if len(network.output_shape) != 1:
        remedy = "end with Flatten() or GlobalMeanPool() and Dense(outputs)"
        raise problem(SpecError, "output shape", network.output_shape, "not a vector", remedy)

    def tangent_behind(taps):
        kernel, records = network.body.propagate(start, taps)
        return kernel.settled_tangent, (kernel, records)

    taps = _zero_taps(shapes)
    tangent, pull, (kernel, records) = jax.vjp(tangent_behind, taps, has_aux=True)

    def backward(matrix: Matrix) -> Rows:
        back = _map_records(
            lambda record, tap: dataclasses.replace(record, back=tap), records, pull(matrix)[0]
        )
        return network.body.rows(back, _read_back)

    return kernel, tangent, records, backward


def _theory(
    network: Network,
    kernel: Kernel,
    records,
    backs: Rows,
    fisher: dict[str, Any],
    outlier: Array,
) -> Theory:
    """The result; ``backs``: of (T_same, T_other, outlier) the derivatives at every record."""
    rows = network.body.rows(records, _read)
    rows["q_tilde"] = backs["same"][0]
    rows["q_tilde_xy"], rows["q_tilde_ab"] = backs["other"][1], backs["unequal"][1]
    labels = network.body.labels(records, "")
    linear = np.array([isinstance(inner, (Dense, Conv)) for _, inner in labels])
    paths = np.array([path for path, _ in labels])
    behind = jnp.cumsum(rows["inverse_width"][::-1])[::-1] - rows["inverse_width"]
    information = fisher["information"]
    num_met = information.sum() ** 2 / jnp.sum(information**2)
    kinds = {name: information[-1] * backs[name][2] for name in ("weights", "biases", "norm")}
    # of (T_same - outlier) / (n - 1)
    share = fisher["inverse_samples"]
    small = information.mean() * share / jnp.where(share < 1, 1 - share, 1)
    total = backs["weights"] + backs["biases"] + backs["norm"]
    order = OrderParameters(
        **{name: rows[name][linear] for name in rows if name.startswith("q")},
        layers=tuple(paths[linear].tolist()),
    )
    sums = total.sum(-1)[jnp.array([0, 2])]
    status = _status(kernel, sums, jnp.stack([fisher["tangent_same"], outlier]))
    hole = jnp.where(status == Status.CONVERGED, 1.0, jnp.nan).astype(kernel.dtype)
    kinds = {name: hole * value for name, value in kinds.items()}
    shares = Shares(**kinds, layers=tuple(paths.tolist()))
    for name in ("tangent_same", "tangent_other", "eigenvalues"):
        if name in fisher:
            fisher[name] = hole * fisher[name]
    statistics = Fisher(
        **fisher,
        variance_scatter=kernel.scattered.get("scatter", 1.0),
        shares=shares,
        bulk_shares=small * (total[0] - total[2]),
        draw_spread=jnp.sqrt(num_met * jnp.maximum(behind, 0)),
        num_parameters=network.num_parameters,
    )
    return Theory(statistics, order, kernel, network, status)


def _status(kernel: Kernel, sums: Array, wholes: Array) -> Array:
    """The theory's status.

    Args:
        kernel: Of the outputs, with the status of all normalizations before.
        sums: What all layers contribute to T_same and to the outlier: the backward pass.
        wholes: The two themselves: the forward pass. Where they differ, rounding has won.

    Returns:
        A :class:`Status` as integer, ().
    """
    finite = jnp.isfinite(sums).all() & jnp.isfinite(wholes).all()
    equal = jnp.all(jnp.abs(sums - wholes) <= LOSS * jnp.abs(wholes))
    own = jnp.where(equal, Status.CONVERGED, Status.CANCELLATION)
    return worse(kernel.status, jnp.where(finite, own, Status.NOT_FINITE))


def compiled(function, static: tuple[str, ...] = ()):
    """The function under jit, on CPU without fusion.

    XLA fuses every number there with all layers before it: 15 layers compile in 30 s instead of
    1 s, and a batch takes three times as long. Many networks under one vmap gain from fusion.

    Returns:
        A function of the same arguments, given by position.
    """
    plain = jax.jit(function, static_argnames=static)
    options = {"xla_disable_hlo_passes": "fusion"}
    unfused = jax.jit(function, static_argnames=static, compiler_options=options)

    def call(*args):
        traced = any(isinstance(value, Tracer) for value in (*jax.tree.leaves(args), jnp.zeros(())))
        return (plain if traced or jax.default_backend() != "cpu" else unfused)(*args)

    return call


_iid = compiled(_iid_pass, ("statistics",))
_on_data = compiled(_data_pass, ("statistics", "modulus"))


def _positions_meet(network: Network, on_data: bool = False) -> bool:
    """Whether pairs of distinct positions count: in a mean over positions, by a head or a norm.

    Images do, and zero padding makes i.i.d. maps vary. Leaving the pairs out then costs 5 % of
    lambda_max (32x32x3, 3x3 stride 2, 30-60-90 channels).

    Returns:
        True if such a head or norm is among the layers.
    """
    layers = [inner for _, inner in walk(network.body)]
    convs = [inner for inner in layers if isinstance(inner, Conv)]
    pooled = any(isinstance(inner, GlobalMeanPool) for inner in layers)
    vary = any(inner.padding == "SAME" for inner in convs) or (on_data and bool(convs))
    return pooled or any(
        isinstance(inner, Norm) and inner.meets_positions(vary) for inner in layers
    )


def _map_records(function, records, *rest):
    return jax.tree.map(function, records, *rest, is_leaf=lambda node: isinstance(node, Record))


def _zero_taps(records):
    def zeros(matrix):
        return jax.tree.map(lambda entry: jnp.zeros(entry.shape, entry.dtype), matrix)

    def taps(record):
        after = record.after
        return Tap(*map(zeros, (after.tangent, after.scale, after.tangent_deviation)))

    return _map_records(taps, records)


def _read(record: Record) -> Rows:
    """One layer's order parameters, (1,) each."""
    before, after = record.before, record.after
    linear = record.injection.weights is not None
    values = dict(
        **dict(zip(("q", "q_xy", "q_ab"), after.averages(), strict=True)),
        **dict(zip(("q_hat", "q_hat_xy", "q_hat_ab"), before.averages(), strict=True)),
        inverse_width=jnp.asarray(1 / before.channels if linear else 0.0),
    )
    return {name: value[None] for name, value in values.items()}


def _read_back(record: Record) -> Rows:
    """The derivative at one layer: its sums, and its products with what the layer adds."""
    assert record.back is not None
    back, injection = record.back, record.injection
    whole = back.tangent
    if back.deviation is not None:  # all that a layer sees that centres
        whole = jax.tree.map(jnp.add, whole, back.deviation)
    values = dict(
        **dict(zip(("same", "other", "unequal"), record.after.totals(whole), strict=True)),
        weights=_dot(back.tangent, injection.weights) + _dot(back.deviation, injection.deviation),
        biases=_dot(back.tangent, injection.biases),
        norm=_dot(back.tangent, injection.offset) + _dot(back.scale, injection.scale),
    )
    return {name: value[None] for name, value in values.items()}


def _dot(derivative: Matrix | None, injection: Matrix | None) -> Array:
    """Sum over the products of all entries; 0 where a layer has no such parameters."""
    if injection is None:
        return jnp.zeros(())
    parts = jax.tree.map(lambda a, b: jnp.sum(a * b), derivative, injection)
    return functools.reduce(jnp.add, jax.tree.leaves(parts))
