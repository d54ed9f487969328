"""Where training really stops being stable: the largest learning rate that stays bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import Progress

from meanfield_jax.empirical.model import Functional, Params, build, functional
from meanfield_jax.errors import DataError, SpecError, check_data, problem
from meanfield_jax.experiments.train import BLOW_UP
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze
from meanfield_jax.variants import variants_of

if TYPE_CHECKING:
    import xarray as xr

WIDEST = 64.0
"""How far from the prediction a boundary is looked for, as a factor."""

Draw = tuple[Functional, Params]


def measured_boundary(
    network: Network,
    x: Array,
    y: Array,
    *,
    gammas: Sequence[float] = (),
    draws: int = 3,
    momentum: float = 0.9,
    num_steps: int = 200,
    tol: float = 0.05,
    residual: float = 1.0,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Trains at many learning rates and finds by bisection the largest that stays bounded.

    Full-batch heavy ball on the squared loss (1/2n) sum ||f(x) - y||^2, in training mode, from
    random draws; held against ``analyze(network, data=x).eta_max(momentum)``.

    Args:
        network: The specification.
        x: Inputs, (n, *input_shape).
        y: Targets, (n, C).
        gammas: Scales to put into every BatchNorm, beside the network without its BatchNorms.
            Empty: the network as it is.
        draws: Networks drawn at random for each.
        momentum: Momentum of the heavy ball.
        num_steps: Steps over which the loss must stay below 1000 times the first one.
        tol: Relative accuracy of the boundary.
        residual: Share of y - f(x) that is left to learn: y is moved towards the first outputs.
            Small: the loss is quadratic as far as training goes, and theory speaks of just that.
            1: above eta_max the loss is thrown up, the curvature falls, and training goes on: real
            blow-up comes 1.25 to 3 times later (benchmarks/training_boundary.py).
        seed: Seed of the first draw.
        progress: Whether to show a progress bar on stderr.

    Returns:
        A data set over ``network`` (its label) and ``draw``: ``boundary``, the largest rate seen to
        stay bounded (NaN where none within a factor of 64 around the prediction was, or all were),
        ``predicted`` and ``ratio``, the median over draws of boundary / predicted.

    Raises:
        SpecError, DataError: for inputs that make no sense.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=100, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> y = jax.nn.one_hot(labels, 10)
        >>> bool(0.5 < mf.measured_boundary(net, x, y, draws=1).ratio < 2)
        True
    """
    import xarray as xr

    x, y = check_data(x), jnp.asarray(y)
    if y.shape != (len(x), *network.output_shape):
        remedy = f"give ({len(x)}, {network.output_shape[0]}), such as jax.nn.one_hot(labels, C)"
        raise problem(DataError, "y.shape", y.shape, "not the network's outputs", remedy)
    for name, value in dict(draws=draws, num_steps=num_steps).items():
        if value < 1:
            raise problem(SpecError, name, value, "not a number of them", "give at least 1")
    for name, value in dict(tol=tol, residual=residual).items():
        if not value > 0:
            raise problem(SpecError, name, value, "not above 0", "give a number above 0")
    # floats, as theory would be compiled anew for an integer
    variants = variants_of(network, map(float, gammas))
    predicted = np.array(
        [float(analyze(variant, data=x).eta_max(momentum)) for variant in variants.values()]
    )
    boundary = np.empty((len(variants), draws))
    seeds = range(seed, seed + draws)
    console = Console(stderr=True)
    with Progress(console=console, disable=not progress, transient=True) as bar:
        task = bar.add_task("Training", total=boundary.size)
        for rows, models in _alike(variants.values(), seeds):

            def bounded(rates: np.ndarray, models=models) -> np.ndarray:
                # of the parameters' dtype, under x64 too
                given = jnp.asarray(rates, jnp.float32)
                return np.asarray(_stay_bounded(models, given, x, y, momentum, residual, num_steps))

            found = _bisect(
                bounded,
                np.repeat(predicted[rows], draws),
                1 + tol,
                lambda count: bar.advance(task, count),
            )
            boundary[rows] = found.reshape(len(rows), draws)
    data = dict(
        boundary=(("network", "draw"), boundary),
        predicted=("network", predicted),
        ratio=("network", np.median(boundary, -1) / predicted),
    )
    spec = network.to_json(indent=None)
    attributes = dict(num_samples=len(x), momentum=momentum, num_steps=num_steps, spec=spec)
    return xr.Dataset(data, dict(network=list(variants)), attributes)


def _alike(networks: Iterable[Network], seeds: Sequence[int]) -> Iterator[tuple[list[int], Draw]]:
    """Draws of all networks, those of one structure together.

    Yields:
        The places of these networks in the sequence, and their draws as one draw whose arrays are
        stacked, (networks * seeds, ...); the seed varies fastest.
    """
    groups: dict[Any, list[tuple[int, list[Draw]]]] = {}
    for row, network in enumerate(networks):
        draws = [functional(build(network, rngs=nnx.Rngs(seed))) for seed in seeds]
        groups.setdefault(jax.tree.structure(draws[0]), []).append((row, draws))
    for group in groups.values():
        models = [model for _, draws in group for model in draws]
        yield [row for row, _ in group], jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)


def _bisect(
    bounded: Callable[[np.ndarray], np.ndarray],
    guess: np.ndarray,
    factor: float,
    finished: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """The largest rate that is bounded, where the next one, up to a factor, is not; NaN if none.

    Args:
        bounded: Whether each of the rates is; all are asked for at once, again and again.
        guess: Where to begin, (cells,).
        factor: How far apart a bounded rate and one that is not may be.
        finished: Told how many cells have come to their end.

    Returns:
        The rate of each cell, (cells,); NaN where none was bounded, or all were, within a factor of
        ``WIDEST`` of the guess.
    """
    rate, searching = guess, np.full(guess.shape, True)
    # the largest known to be bounded and the smallest known not to be; NaN: none yet
    low = high = np.full(guess.shape, np.nan)
    while searching.any():
        # where nothing is sought any more, a run that ends at once
        stays = bounded(np.where(searching, rate, np.inf))
        low = np.where(searching & stays, rate, low)
        high = np.where(searching & ~stays, rate, high)
        open_ends = [np.isnan(high), np.isnan(low)]
        rate = np.select(open_ends, [1.25 * low, high / 1.25], np.sqrt(low * high))
        within = [low < WIDEST * guess, high > guess / WIDEST]
        before, searching = searching, searching & np.select(open_ends, within, high > factor * low)
        finished(int(before.sum() - searching.sum()))
    return np.where(np.isnan(high), np.nan, low)


@jax.jit
def _stay_bounded(
    models: Draw,
    rates: Array,
    x: Array,
    y: Array,
    momentum: Array | float,
    residual: Array | float,
    num_steps: Array | int,
) -> Array:
    """Which networks stay bounded at their rates.

    Under vmap in one loop until all have ended; on CPU one after the other, each until it ends,
    which takes 0.6 (dense) to 0.75 (conv) of the time there.

    Returns:
        One boolean for each network, (cells,).
    """

    def one(model: Draw, rate: Array) -> Array:
        return _stays_bounded(model, rate, x, y, momentum, residual, num_steps)

    def in_turn(models: Draw, rates: Array) -> Array:
        return jax.lax.map(lambda cell: one(*cell), (models, rates))

    return jax.lax.platform_dependent(models, rates, cpu=in_turn, default=jax.vmap(one))


def _stays_bounded(
    model: Draw,
    rate: Array,
    x: Array,
    y: Array,
    momentum: Array | float,
    residual: Array | float,
    num_steps: Array | int,
) -> Array:
    """Whether the loss stays below a multiple of the first one; stops at once where it does not."""
    apply, params = model
    first = apply(params, x)
    target = first + residual * (y - first)
    optimizer = optax.sgd(rate, momentum)

    def loss(params: Params) -> Array:
        return jnp.sum((apply(params, x) - target) ** 2) / (2 * len(x))

    limit = BLOW_UP * loss(params)

    def goes_on(state) -> Array:
        _, _, count, last = state
        return (count < num_steps) & (last <= limit)

    def step(state):
        params, momenta, count, _ = state
        value, gradient = jax.value_and_grad(loss)(params)
        updates, momenta = optimizer.update(gradient, momenta)
        params = jax.tree.map(jnp.add, params, updates)
        return params, momenta, count + 1, value

    start = (params, optimizer.init(params), 0, jnp.zeros_like(limit))
    after, _, _, last = jax.lax.while_loop(goes_on, step, start)
    return (last <= limit) & (loss(after) <= limit)
