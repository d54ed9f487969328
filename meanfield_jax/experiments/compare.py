"""The normalization layers side by side: predicted and measured stability, and training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice, check_data, pair
from meanfield_jax.empirical.lanczos import top_eigenvalues
from meanfield_jax.empirical.model import build
from meanfield_jax.empirical.nnx_model import fisher_operator
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.progress import PRODUCTS, STEP, Stages, seconds_of
from meanfield_jax.experiments.train import Samples, train
from meanfield_jax.experiments.validate import PROGRAMS, standard_error
from meanfield_jax.layers.base import Layer, norm_layers
from meanfield_jax.limits import within
from meanfield_jax.network import Network, normalizes_over_batch, walk
from meanfield_jax.theory.analyze import analyze, least_samples
from meanfield_jax.theory.learning_rate import stable_rate
from meanfield_jax.variants import has_norm, with_norm

if TYPE_CHECKING:
    import xarray as xr

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
TOL = 1e-3


def norm_names() -> tuple[str, ...]:
    """Names of the normalization layers, and ``"none"``."""
    return ("none", *norm_layers())


def norm_of(name: str, network: Network) -> Layer | None:
    """A normalization layer by its name, with groups that divide the network's channels.

    Args:
        name: One of :func:`norm_names`.
        network: The network in which it is to be used.

    Returns:
        The layer with its default numbers; None for ``"none"``.
    """
    check_choice("norms", name, norm_names())
    *hidden, _ = (inner.width for _, inner in walk(network.body) if inner.is_weights)
    return None if name == "none" else norm_layers()[name].fitting(hidden)


@checked(data=pair)
def compare(
    network: Network,
    data: Samples,
    *,
    test: Samples,
    norms: Sequence[str] | Mapping[str, Layer | None] | None = None,
    batch_sizes: Sequence[int] = (4, 32, 256),
    learning_rates: Sequence[float] = RATES,
    momentum: float = 0.9,
    epochs: int = 2,
    seeds: int = 2,
    draws: int = 2,
    loss: str = "cross_entropy",
    progress: bool = False,
) -> xr.Dataset:
    """Predicts, measures and trains one network with each of several normalization layers.

    For every norm and batch size n, lambda_max of the Fisher matrix of the first n samples, with
    ``"batch"`` statistics, is predicted by the theory for these inputs and measured on random
    draws. Then the network is trained with batches of n for the same number of epochs at every
    learning rate.

    Args:
        network: The specification, with norms in the places where they are to be replaced.
        data: Training inputs (n, ...), and labels (n,) or targets (n, C).
        test: Test inputs and labels.
        norms: Names of norms, or a mapping from any names to layers (None for no norm); None: all
            that fit the network. Instance norm needs maps of at least four positions.
        batch_sizes: Samples per batch.
        learning_rates: The learning rates to try. The best one of each norm is that of the smallest
            training loss, so that the test samples do not influence it.
        momentum: Momentum of the heavy ball.
        epochs: Passes over the data, the same budget for every norm and batch size.
        seeds: Number of training runs for each norm, batch size and learning rate.
        draws: Number of random networks to measure for each norm and batch size.
        loss: Training loss, ``"cross_entropy"`` or ``"squared"``; lambda_max is that of the squared
            loss.
        progress: Whether to show a progress bar on stderr.

    Returns:
        A data set over ``norm``, ``batch_size``, ``learning_rate``, ``seed`` and ``draw``:
        ``predicted`` and ``measured`` (lambda_max; NaN where the theory needs more samples or
        Lanczos failed), ``within_domain`` (whether the network is in the theory's domain, see
        :class:`Fisher`), ``standard_error``, ``ratio`` (predicted / measured), ``eta_max``,
        ``eta_max_measured``; ``loss``, ``test_loss``, ``test_accuracy`` after the last epoch (NaN
        where a run diverged); ``best_rate`` and, at this rate, ``best_loss``, ``best_test_loss``,
        ``best_test_accuracy``, means over seeds.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Example:
        >>> import meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=200, flatten=True)
        >>> test = mf.data.load("digits", split="test", num_samples=200, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> options = dict(batch_sizes=[100], learning_rates=[0.01, 0.1], epochs=1)
        >>> found = mf.compare(net, (x, labels), test=test, norms=["none", "batch"], **options)
        >>> bool((abs(found.ratio - 1) < 0.5).all())
        True
    """
    import xarray as xr

    variants = _variants(network, norms)
    for name, values in dict(batch_sizes=batch_sizes, learning_rates=learning_rates).items():
        if len(values) == 0:
            raise problem(SpecError, name, values, "empty", "pass at least one")
    for name, value in dict(seeds=seeds, draws=draws).items():
        if value < 1:
            raise problem(SpecError, name, value, "must be at least 1", "pass a positive integer")
    within("MEMORY", "seeds", seeds, 16 * seeds * len(learning_rates) * network.num_parameters)
    within("MEMORY", "draws", draws, 100 * draws * len(variants) * len(batch_sizes))
    x = check_data(data[0], "data[0]")
    if not 1 <= min(batch_sizes) <= max(batch_sizes) <= len(x):
        cause = f"there are {len(x)} training samples"
        remedy = f"pass sizes from 1 to {len(x)}"
        raise problem(SpecError, "batch_sizes", list(batch_sizes), cause, remedy)
    jobs = [(variant, size) for variant in variants.values() for size in batch_sizes]
    num_runs = len(learning_rates) * seeds
    seconds = (
        part
        for variant, size in jobs
        for part in _seconds(variant, size, epochs * (len(x) // size), num_runs, draws)
    )
    cells = []
    with Stages("Comparing", seconds, progress) as stages:
        for variant, size in jobs:
            runs = train(
                variant,
                data,
                test=test,
                learning_rate=jnp.asarray(learning_rates)[:, None],
                momentum=momentum,
                epochs=epochs,
                batch_size=size,
                seed=jnp.arange(seeds),
                loss=loss,
            )
            stages.finished()
            last = runs.to_xarray(("learning_rate", "seed")).isel(epoch=-1, drop=True)
            last = last.where(last.diverged_at < 0).drop_vars("diverged_at")
            cells.append(last.assign(_stability(variant, x[:size], draws, stages.finished)))
    coords = dict(learning_rate=list(learning_rates), seed=np.arange(seeds), draw=np.arange(draws))
    rows = [
        xr.concat(cells[start : start + len(batch_sizes)], "batch_size")
        for start in range(0, len(cells), len(batch_sizes))
    ]
    found = xr.concat(rows, "norm").assign_coords(
        norm=list(variants), batch_size=list(batch_sizes), **coords
    )
    attributes = dict(momentum=momentum, epochs=epochs, num_samples=len(x), loss=loss)
    attributes["spec"] = network.to_json(indent=None)
    return _summarized(found, momentum).assign_attrs(attributes)


def _variants(
    network: Network, norms: Sequence[str] | Mapping[str, Layer | None] | None
) -> dict[str, Network]:
    """The network with each norm, by name; if no norms are given, with all that fit."""
    if not has_norm(network):
        cause, remedy = "it has no norm to replace", "insert BatchNorm wherever norms are to be"
        raise problem(SpecError, "network", network.layers[-1], cause, remedy)
    if norms is not None and not norms:
        raise problem(SpecError, "norms", norms, "empty", f"use {', '.join(norm_names())}")
    if isinstance(norms, Mapping):
        return {name: with_norm(network, norm) for name, norm in norms.items()}
    variants = {}
    for name in norms or norm_names():
        try:
            variants[name] = with_norm(network, norm_of(name, network))
        except SpecError:
            if norms is not None:
                raise
    return variants


def _seconds(
    network: Network, size: int, num_steps: int, num_runs: int, draws: int
) -> Iterator[float]:
    """Yields estimates of the time of training, of the theory, and of each measurement."""
    # forward, and backward with respect to values and weights
    yield STEP * num_steps + seconds_of(network, size * num_runs, 3 * num_steps, programs=1)
    yield seconds_of(network, size, 1, programs=2)
    for draw in range(draws):
        yield seconds_of(network, size, PRODUCTS, programs=PROGRAMS * (draw == 0))


def _stability(network: Network, x: Array, draws: int, done: Callable[[], None]) -> dict[str, Any]:
    """Lambda_max by the theory of this batch, and measured in training mode for each draw."""
    predicted, inside = np.nan, False
    if len(x) >= least_samples(network.body):
        fisher = analyze(network, data=x, throw=False).fisher
        predicted, inside = float(fisher.lambda_max), bool(fisher.within_domain)
    done()
    measured = np.full(draws, np.nan)
    for seed in range(draws):
        if len(x) > 1 or not normalizes_over_batch(network.body):
            measured[seed] = _largest(network, x, seed)
        done()
    found = dict(predicted=((), predicted), within_domain=((), inside))
    return dict(**found, measured=(("draw",), measured))


def _largest(network: Network, x: Array, seed: int) -> float:
    """The largest eigenvalue of one draw in training mode; NaN if Lanczos failed."""
    operator = fisher_operator(build(network, rngs=nnx.Rngs(seed)), x, statistics="batch")
    found = top_eigenvalues(operator, 1, tol=TOL, key=jax.random.key(seed))
    return float(np.where(found.status == 0, found.eigenvalues, np.nan)[0])


def _summarized(found: xr.Dataset, momentum: float) -> xr.Dataset:
    mean = found.measured.mean("draw")
    error = standard_error(found.measured.values, found.measured.dims.index("draw"))
    # a rate at which any seed diverged is not chosen
    train_loss = found.loss.mean("seed", skipna=False)
    learns = train_loss.notnull().any("learning_rate")
    best = train_loss.fillna(np.inf).idxmin("learning_rate")
    at_best = found[["loss", "test_loss", "test_accuracy"]].mean("seed", skipna=False)
    at_best = at_best.sel(learning_rate=best).drop_vars("learning_rate").where(learns)
    return found.merge(at_best.rename({name: f"best_{name}" for name in at_best})).assign(
        standard_error=(mean.dims, error),
        ratio=found.predicted / mean,
        eta_max=(found.predicted.dims, stable_rate(found.predicted.values, momentum)),
        eta_max_measured=(mean.dims, stable_rate(mean.values, momentum)),
        best_rate=best.where(learns),
    )
