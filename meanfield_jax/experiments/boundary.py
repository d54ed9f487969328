"""The measured limit of stable training: the largest learning rate with a bounded loss."""

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

from meanfield_jax.arguments import checked
from meanfield_jax.checks import check_choice, check_data, targets
from meanfield_jax.empirical.model import Functional, Params, build, functional
from meanfield_jax.errors import SpecError, problem
from meanfield_jax.experiments.in_turn import each
from meanfield_jax.experiments.train import BLOW_UP
from meanfield_jax.limits import within
from meanfield_jax.network import Network
from meanfield_jax.theory.analyze import analyze
from meanfield_jax.theory.rates import SPIKE
from meanfield_jax.variants import variants_of

if TYPE_CHECKING:
    import xarray as xr

WIDEST = 2.0**24
"""The search for a boundary covers this factor above and below the prediction."""

EVENTS = dict(bounded=BLOW_UP, no_spike=SPIKE)
"""By event, the multiple of the first loss that must not be exceeded."""

LONGEST = 8.0
"""The largest factor between two rates of the search."""

Draw = tuple[Functional, Params]


@checked()
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
    event: str = "bounded",
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Finds by bisection the largest learning rate at which the training loss stays bounded.

    Random draws are trained in training mode by full-batch heavy-ball descent on the squared loss
    (1/2n) sum ||f(x) - y||^2, and compared with ``analyze(network, data=x).eta_max(momentum)``.

    Args:
        network: The specification.
        x: Inputs, (n, *input_shape).
        y: Integer labels (n,), or targets (n, C).
        gammas: Scales to use in every norm; the network without its norms is included as well.
            Empty: the network as it is.
        draws: Number of random draws of each network.
        momentum: Momentum of the heavy ball.
        num_steps: Steps over which the loss is followed.
        tol: Relative accuracy of the boundary.
        residual: Fraction of y - f(x) that is left to learn: y is moved towards the initial
            outputs. If it is small, the loss stays quadratic during training, as the theory
            assumes. If it is 1, the loss rises sharply above eta_max, the curvature falls, and
            training continues; :func:`learning_rate` predicts where that ends.
        event: ``"bounded"``: the loss stays below 1000 times the first one; ``"no_spike"``: below
            twice the first one.
        seed: Seed of the first draw.
        progress: Whether to show a progress bar on stderr.

    Returns:
        A data set over ``network`` (its label) and ``draw``: ``boundary``, the largest rate at
        which the loss stayed bounded (NaN if it did at no rate, or at all rates, within a factor of
        1e7 around the prediction), ``predicted``, and ``ratio``, the median over draws of
        boundary / predicted.

    Raises:
        SpecError, DataError: if an option or the data are not valid.

    Example:
        >>> import jax, meanfield_jax as mf
        >>> x, labels = mf.data.load("digits", num_samples=100, flatten=True)
        >>> net = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
        >>> y = jax.nn.one_hot(labels, 10)
        >>> bool(0.5 < mf.measured_boundary(net, x, y, draws=1).ratio < 2)
        True
    """
    import xarray as xr

    x = check_data(x)
    y = targets("y", y, len(x), network.num_outputs, x.dtype)
    check_choice("event", event, tuple(EVENTS))
    for name, value in dict(draws=draws, num_steps=num_steps).items():
        if value < 1:
            raise problem(SpecError, name, value, "must be at least 1", "pass a positive integer")
    # floats, because the theory would be compiled again for an integer
    variants = variants_of(network, map(float, gammas))
    # a draw and its momenta, gradients and trial parameters
    within("MEMORY", "draws", draws, 16 * draws * len(variants) * network.num_parameters)
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
                # in the dtype of the parameters, also under x64
                given = jnp.asarray(rates, jnp.float32)
                options = (momentum, residual, num_steps, EVENTS[event])
                return np.asarray(_stay_bounded(models, given, x, y, *options))

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
    options = dict(momentum=momentum, num_steps=num_steps, event=event)
    attributes = dict(num_samples=len(x), **options, spec=spec)
    return xr.Dataset(data, dict(network=list(variants)), attributes)


def _alike(networks: Iterable[Network], seeds: Sequence[int]) -> Iterator[tuple[list[int], Draw]]:
    """Draws of all networks, grouped by structure.

    Yields:
        The positions of a group's networks in the sequence, and their draws as one draw whose
        arrays are stacked, (networks * seeds, ...); the seed varies fastest.
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
    """The largest bounded rate, up to a factor, by bisection in all cells at once; NaN if none.

    Args:
        bounded: Tells which of the rates are bounded; called repeatedly, with all cells at once.
        guess: The rates to start from, (cells,).
        factor: The search ends when the smallest unbounded rate is within this factor of the
            largest bounded one.
        finished: Called with the number of cells whose search has ended.

    Returns:
        The rate of each cell, (cells,); NaN if no rate, or every rate, was bounded within a factor
        of ``WIDEST`` of the guess.
    """
    rate, searching = guess, np.full(guess.shape, True)
    # the largest rate known to be bounded and the smallest known not to be; NaN: none yet
    low = high = np.full(guess.shape, np.nan)
    stride = 1.25
    while searching.any():
        # cells that are done get an infinite rate, whose run ends at once
        stays = bounded(np.where(searching, rate, np.inf))
        low = np.where(searching & stays, rate, low)
        high = np.where(searching & ~stays, rate, high)
        open_ends = [np.isnan(high), np.isnan(low)]
        rate = np.select(open_ends, [stride * low, high / stride], np.sqrt(low * high))
        stride = min(stride**1.25, LONGEST)
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
    most: Array | float = BLOW_UP,
) -> Array:
    """Which networks keep a bounded loss at their rates; each is trained until it ends.

    Returns:
        One boolean for each network, (cells,).
    """

    def one(cell: tuple[Draw, Array]) -> Array:
        return _stays_bounded(*cell, x, y, momentum, residual, num_steps, most)

    return each(one, (models, rates))


def _stays_bounded(
    model: Draw,
    rate: Array,
    x: Array,
    y: Array,
    momentum: Array | float,
    residual: Array | float,
    num_steps: Array | int,
    most: Array | float = BLOW_UP,
) -> Array:
    """Whether the loss stays below a multiple of the first one; stops as soon as it does not."""
    apply, params = model
    first = apply(params, x)
    target = first + residual * (y - first)
    optimizer = optax.sgd(rate, momentum)

    def loss(params: Params) -> Array:
        return jnp.sum((apply(params, x) - target) ** 2) / (2 * len(x))

    limit = most * loss(params)

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
