"""The mean-field theory of a network: the function ``analyze`` and its result."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.numpy import result_type
from jaxtyping import Float, Int

from meanfield_jax.arguments import checked, network_or_model
from meanfield_jax.checks import check_choice, check_data
from meanfield_jax.empirical.draws import check_draws, drawn_eigenvalues
from meanfield_jax.errors import DataError, SpecError, problem
from meanfield_jax.kernel.kernel import STATISTICS, Kernel
from meanfield_jax.kernel.sphere import LEAST_VALUES
from meanfield_jax.layers.base import Layer, Signal
from meanfield_jax.network import Network, normalizes_over_batch
from meanfield_jax.pytree import pytree
from meanfield_jax.status import Status, first_failure
from meanfield_jax.theory.compiled import known_numbers, number_of_samples, without_widths
from meanfield_jax.theory.fisher import Fisher
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.likelihood import check_likelihood, of_outputs
from meanfield_jax.theory.memory_plan import check_iid, modulus_for
from meanfield_jax.theory.order_parameters import OrderParameters
from meanfield_jax.theory.passes import iid, on_data

if TYPE_CHECKING:
    import xarray as xr

CAUSES = {
    Status.NOT_FINITE: "numbers overflow; compute in float64, or use smaller scales and variances",
    Status.FEW_DIRECTIONS: (
        "the batch varies in too few directions to be normalized over, so the mean of 1 / variance "
        "over random weights is infinite; pass more features and samples, none of which outweighs "
        "all others, or draw networks with drawn_eigenvalues"
    ),
    Status.CANCELLATION: (
        "the batch is so nearly constant that its variance is lost to rounding; "
        "compute in float64, or subtract the mean from the data"
    ),
}


@pytree
class Theory:
    """What mean-field theory predicts for a network; a pytree, returned by :func:`analyze`.

    Attributes:
        fisher: Statistics of the Fisher information matrix.
        order_parameters: q, q_xy, ... by layer.
        kernel: Covariance and tangent of the outputs.
        network: The specification.
        status: A :class:`Status` as an integer: CONVERGED, NOT_FINITE (overflow), FEW_DIRECTIONS or
            CANCELLATION. Unless it is CONVERGED, the numbers in ``fisher`` are NaN.
    """

    fisher: Fisher
    order_parameters: OrderParameters
    kernel: Kernel[Any]
    network: Network
    status: Int[Array, "*batch"]

    def raise_if_failed(self) -> Theory:
        """Returns itself, or raises for the first network that failed (host only).

        Raises:
            RuntimeError: if the status is not CONVERGED.
        """
        failed = first_failure(self.status)
        if failed is None:
            return self
        raise RuntimeError(f"analyze: {CAUSES[failed.status]}{failed.where}")

    def eta_max(self, momentum: float | Array = 0.9) -> Float[Array, "*batch"]:
        """The largest stable learning rate of heavy-ball gradient descent on the squared loss.

        Args:
            momentum: The momentum mu, in [0, 1).

        Returns:
            2 (1 + mu) / lambda_max, see :func:`meanfield_jax.eta_max`.
        """
        return eta_max(self.fisher.lambda_max, momentum)

    def to_xarray(self, momentum: float = 0.9) -> xr.Dataset:
        """All numbers as a labelled dataset, with the specification in its attributes.

        Args:
            momentum: Momentum used for ``eta_max``.

        Returns:
            A dataset with the dimensions ``layer`` (Dense and Conv) and ``block`` (every layer with
            parameters), ready for ``to_netcdf``.
        """
        import xarray as xr

        order, fisher = self.order_parameters, self.fisher
        data: dict[str, Any] = {
            field.name: ("layer", np.asarray(getattr(order, field.name)))
            for field in dataclasses.fields(order)
            if field.name != "layers"
        }
        for kind in ("weights", "biases", "norm"):
            data[f"contribution_{kind}"] = (
                "block",
                np.asarray(getattr(fisher.contributions, kind)),
            )
        for name in Fisher.STATISTICS:
            data[name] = xr.Variable((), np.asarray(getattr(fisher, name)))
        data["eta_max"] = xr.Variable((), np.asarray(self.eta_max(momentum)))
        if fisher.drawn is not None:
            low, high = map(np.asarray, fisher.drawn.interval)
            data["lambda_max_interval"] = ("bound", np.stack([low, high]))
            data["lambda_max_drawn"] = ("draw", np.asarray(fisher.drawn.eigenvalues[:, 0]))
        attributes = dict(
            network=self.network.to_json(indent=None),
            status=Status(int(self.status)).label,
            domain=fisher.domain_reason() or "within",
            statistics=self.kernel.statistics,
            momentum=momentum,
        )
        coords = dict(layer=list(order.layers), block=list(fisher.contributions.layers))
        return xr.Dataset(data, coords, attributes)


@checked(network=network_or_model)
def analyze(
    network: Network | Any,
    *,
    data: Array | None = None,
    statistics: str = "batch",
    num_samples: int | Array | None = None,
    likelihood: str = "gaussian",
    probabilities: Array | None = None,
    draws: int | None = None,
    throw: bool = True,
) -> Theory:
    """Mean-field theory of a network, in one pass, on i.i.d. inputs or on a batch of data.

    For a network f with C outputs and for n inputs, it predicts the Fisher information matrix
    F = (1/n) sum_i sum_k grad f_k(x_i) grad f_k(x_i)^T of the squared loss (1/2n) sum ||f - y||^2:
    C outliers T_same/n + (n-1)/n T_other, a bulk (T_same - T_other)/n, and the trace C T_same. The
    theory is compiled once for each structure; it can be vmapped over the numbers of the network
    (gamma, weight_var, ...) and differentiated in them, twice. Put large grids into ``jax.jit``,
    and deep networks into :class:`Repeat`, which compiles in the time of one block.

    Args:
        network: The specification, or with ``data`` a Flax model that ``from_flax`` can read.
        data: A batch, (n, *input_shape). The theory is then that of these inputs instead of i.i.d.
            ones, with the whole spectrum in ``theory.fisher.eigenvalues``. It takes O(n^2) memory
            (n = 4000 vectors: 5.1 GB) and O(n^3) time. Data sharded along n over a mesh with
            automatic axes (``jax.sharding.AxisType.Auto``) are processed on all devices.
        statistics: How a BatchNorm is differentiated: ``"batch"`` (as in training, which determines
            stability), ``"frozen"`` (as in evaluation), ``"wei2019"`` (as published).
        num_samples: The batch size n for i.i.d. inputs (of unit variance); None for the limit
            n -> infinity, where the bulk vanishes.
        likelihood: ``"gaussian"``, as above, or ``"categorical"``, the F of softmax outputs p and
            the cross-entropy: (1/n) sum_i J_i^T (diag p_i - p_i p_i^T) J_i.
        probabilities: The p of a categorical likelihood, (n, C), such as those of a draw,
            ``jax.nn.softmax(model(x))``. None: those of random networks, whose logits are Gaussian
            with the covariance that the theory predicts; spectra are averaged over 16 such networks
            with fixed random numbers (on data over 4).
        draws: The number of networks to draw: ``theory.fisher.lambda_max``, and ``eta_max``, are
            then those of the median draw, by :func:`drawn_eigenvalues`, which holds for narrow,
            deep and convolutional networks and takes seconds. All else is theory. None: those of
            the wide limit.
        throw: Whether a batch that cannot be normalized raises an error. Under jit, or if False,
            only ``status`` reports it, and the numbers are NaN.

    Returns:
        The theory, in float64 under ``jax.enable_x64()``, else in float32. Overflow is reported by
        ``theory.status`` and raised by ``theory.raise_if_failed()``.

    Raises:
        SpecError: if a number or an option cannot be used.
        DataError: if the data do not fit the network or the memory, vary in two directions or
            fewer where a BatchNorm normalizes them, or are too nearly constant for their dtype.

    Accuracy:
        On Gaussian inputs, FC 784-1000x3-10 with BatchNorm, n = 1000, train mode: the mean of the C
        outliers is within 0.3 % (benchmarks/accuracy.py). Corrections are O(1/width); the draws of
        a vanilla network scatter by about sqrt(depth C / width). On data (FC 784-1000x3-10 on 400
        MNIST images, conv 30-60-90 on 128 CIFAR-10 images, benchmarks/real_data.py): outliers are
        within 1 % in training and 4 % in evaluation, the trace within 2 %. The wide limit neglects
        that eigenvalues repel each other by about n C / width: eigenvalues 2-6 come out 4-12 % low
        (FC) and up to 31 % low (narrow conv). For deep networks see ``Fisher.within_domain``.
        On small or very correlated batches, ReLU-like functions after a BatchNorm are exact to
        O(1/PR^2) and others to O(1/PR), where PR is the participation ratio of the batch's
        covariance. If memory is short, Conv with BatchNorm over channels averages over an even
        sample of the positions (strides), see ``Positions``.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> net = mf.mlp([1000] * 3, inputs=784, outputs=10, norm=mf.BatchNorm(gamma=0.5))
        >>> round(float(mf.analyze(net, num_samples=200).eta_max(momentum=0.9)), 4)
        0.0894

    Source:
        Wei, Stokes & Schwab 2019 (arXiv:1903.02606); Karakida, Akaho & Amari 2019
        (arXiv:1806.01316) for the spectrum's statistics.
    """
    if not isinstance(network, Network):
        network = _specification(network, data)
    network.validate()
    check_choice("statistics", statistics, STATISTICS)
    if draws is not None:
        check_draws(draws, data, num_samples)
    num_outputs = network.num_outputs
    if network.num_parameters == 0:
        cause, remedy = "it has no parameters, and so no Fisher matrix", "add a Dense or a Conv"
        raise problem(SpecError, "network", network.layers, cause, remedy)
    if parts := network.body.output(Signal(network.input_shape)).parts:
        cause, remedy = "outputs of several branches have variances of their own", "end with Dense"
        raise problem(SpecError, "outputs", parts, cause, remedy)
    network.body.check_theory(network.input_shape)
    body, widths = without_widths(known_numbers(network.body))
    dtype = result_type(float, *jax.tree.leaves(network))
    if data is not None:
        x = _checked_data(network, data, num_samples).astype(dtype)
        check_likelihood(network, likelihood, probabilities, len(x))
        modulus = modulus_for(body, widths, x, statistics)
        found = on_data(body, widths, x, statistics, modulus)
    else:
        check_num_samples(network.body, num_samples)
        check_iid(network.body, network.input_shape, num_outputs)
        check_likelihood(network, likelihood, probabilities, None)
        *positions, channels = network.input_shape
        samples, inputs = number_of_samples(num_samples), float(channels)
        found = iid(body, widths, samples, inputs, tuple(positions), statistics)
    if throw:
        _check_status(network, found.status, data)
    drawn = None
    if draws is not None:
        options: dict[str, Any] = dict(statistics=statistics, likelihood=likelihood)
        drawn = drawn_eigenvalues(network, data, num_samples=num_samples, draws=draws, **options)
        if throw and not isinstance(drawn.status, Tracer):
            drawn.raise_if_failed()
    fisher = of_outputs(found, num_outputs, likelihood, probabilities)
    fisher = dataclasses.replace(fisher, num_parameters=network.num_parameters, drawn=drawn)
    return Theory(fisher, found.order_parameters, found.kernel, network, found.status)


def _specification(model: Any, data: Any) -> Network:
    """The specification of a Flax model; raises SpecError without a batch."""
    if data is None:
        cause = "a model is read from its run on a batch"
        remedy = "pass data=x, or a specification for i.i.d. inputs"
        raise problem(SpecError, "data", None, cause, remedy)
    return Network.from_flax(model, data)


def _check_status(network: Network, status: Array, data: Any) -> None:
    """Raises if a batch, or a network, cannot be normalized, unless the status is being traced."""
    if isinstance(status, Tracer):
        return
    if data is not None and normalizes_over_batch(network.body):
        values = np.asarray(data)
        if (values == values[:1]).all():
            cause = "all samples are equal, so the variance that BatchNorm divides by is 0"
            raise problem(DataError, "data.shape", values.shape, cause, "pass samples that differ")
    failed = first_failure(status, Status.CONVERGED, Status.NOT_FINITE)
    if failed is None:
        return
    cause, _, remedy = CAUSES[failed.status].rpartition("; ")
    if data is None:
        raise problem(SpecError, "network", failed.status.label, cause, remedy)
    raise problem(DataError, "data.shape", np.shape(data), cause, remedy)


def _checked_data(network: Network, data: Any, num_samples: Any) -> Float[Array, "n ..."]:
    """The batch in the dtype of the theory; raises if it does not fit."""
    if num_samples is not None:
        cause, remedy = "data determines the number of samples", "leave it out"
        raise problem(SpecError, "num_samples", num_samples, cause, remedy)
    x = check_data(data)
    if x.shape[1:] != network.input_shape:
        remedy = f"pass (samples, {', '.join(map(str, network.input_shape))})"
        raise problem(DataError, "data.shape", x.shape, "does not fit the network", remedy)
    least = least_samples(network.body)
    if len(x) < least:
        cause = f"the theory of this network needs {least} samples or more"
        raise problem(DataError, "data.shape", x.shape, cause, "pass more samples")
    return x


def least_samples(layer: Layer) -> int:
    """The smallest number of samples that the theory allows: 4 with BatchNorm, else 1."""
    return LEAST_VALUES if normalizes_over_batch(layer) else 1


def check_num_samples(layer: Layer, num_samples: Any) -> None:
    """Raises SpecError if the number of samples is known and too small for the layer."""
    if num_samples is None or isinstance(num_samples, Tracer):
        return
    given = np.asarray(num_samples)
    if given.size == 0 or not np.all((given >= 1) & (np.floor(given) == given)):
        remedy = "pass a positive integer, or None for the limit"
        raise problem(SpecError, "num_samples", num_samples, "must be at least 1", remedy)
    least = least_samples(layer)
    if not np.all(np.asarray(num_samples) >= least):
        cause = "the inverse variance in a BatchNorm has no expectation for so few samples"
        raise problem(SpecError, "num_samples", num_samples, cause, f"pass at least {least}")
