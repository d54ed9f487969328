"""Where training really stops being stable: the largest learning rate that stays bounded."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import xarray as xr
from flax import nnx
from jax import Array
from rich.console import Console
from rich.progress import track

from meanfield_jax.empirical.model import Functional, Params, build, functional
from meanfield_jax.errors import DataError, SpecError, check_data, problem
from meanfield_jax.experiments.train import BLOW_UP
from meanfield_jax.network import Network
from meanfield_jax.theory.propagate import analyze
from meanfield_jax.variants import variants_of

WIDEST = 64.0
"""How far from the prediction a boundary is looked for, as a factor."""


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
        >>> net = mf.mlp([100] * 2, inputs=50, outputs=3, norm=mf.BatchNorm())
        >>> x = jax.random.normal(jax.random.key(0), (60, 50))
        >>> y = jax.nn.one_hot(jax.random.randint(jax.random.key(1), 60, 0, 3), 3)
        >>> bool(0.5 < mf.measured_boundary(net, x, y, draws=1).ratio < 2)
        True
    """
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
    variants = variants_of(network, gammas)
    predicted = np.array(
        [float(analyze(variant, data=x).eta_max(momentum)) for variant in variants.values()]
    )
    boundary = np.empty((len(variants), draws))
    jobs = [(row, draw) for row in range(len(variants)) for draw in range(draws)]
    console = Console(stderr=True)
    for row, draw in track(jobs, "Training", console=console, disable=not progress, transient=True):
        model = build(list(variants.values())[row], rngs=nnx.Rngs(seed + draw))
        apply, params = functional(model)
        first = apply(params, x)
        target = first + residual * (y - first)

        def bounded(rate: float, apply=apply, params=params, target=target) -> bool:
            return bool(_stays_bounded(apply, params, x, target, rate, momentum, num_steps))

        boundary[row, draw] = _bisect(bounded, predicted[row], 1 + tol)
    data = dict(
        boundary=(("network", "draw"), boundary),
        predicted=("network", predicted),
        ratio=("network", np.median(boundary, -1) / predicted),
    )
    spec = network.to_json(indent=None)
    attributes = dict(num_samples=len(x), momentum=momentum, num_steps=num_steps, spec=spec)
    return xr.Dataset(data, dict(network=list(variants)), attributes)


def _bisect(bounded, guess: float, factor: float) -> float:
    """The largest rate that is bounded, where the next one, up to a factor, is not; NaN if none."""
    low = high = guess
    if bounded(guess):
        while bounded(high := 1.25 * low):
            low = high
            if low > WIDEST * guess:
                return math.nan
    else:
        while not bounded(low := high / 1.25):
            high = low
            if high < guess / WIDEST:
                return math.nan
    while high > factor * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if bounded(middle) else (low, middle)
    return low


@partial(jax.jit, static_argnames="num_steps")
def _stays_bounded(
    apply: Functional,
    params: Params,
    x: Array,
    y: Array,
    rate: Array | float,
    momentum: Array | float,
    num_steps: int,
) -> Array:
    """Whether the loss stays below a multiple of the first one; stops at once where it does not."""
    optimizer = optax.sgd(rate, momentum)

    def loss(params: Params) -> Array:
        return jnp.sum((apply(params, x) - y) ** 2) / (2 * len(x))

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

    start = (params, optimizer.init(params), 0, jnp.zeros(()))
    after, _, _, last = jax.lax.while_loop(goes_on, step, start)
    return (last <= limit) & (loss(after) <= limit)
