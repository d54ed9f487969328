"""The networks, data and seeds on which predicted learning rates are judged.

Chosen before any constant of the rule was fixed. Constants are fitted on the cases with an even
number and judged on those with an odd one. ``measure`` trains every draw at many rates and records
the boundaries of three events; it knows nothing of any prediction but a place to start.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import meanfield_jax as mf

STEPS = 200
BLOW_UP = 1e3
SPIKE = 2.0
TOLERANCE = 1.06


@dataclasses.dataclass(frozen=True)
class Case:
    """One network on one batch."""

    name: str
    network: mf.Network
    data: str
    num_samples: int


def images(data: str, num_samples: int) -> tuple[jax.Array, jax.Array]:
    """Standardized images and one-hot labels; ``-half`` halves the sides and makes vectors."""
    name, _, half = data.partition("-")
    x, labels = mf.data.load(name, num_samples=num_samples)
    x = np.asarray(x)
    if half:
        _, height, width, channels = x.shape
        x = x.reshape(num_samples, height // 2, 2, width // 2, 2, channels).mean((2, 4))
    x = (x - x.mean()) / x.std()
    x = x.reshape(num_samples, -1) if half else x
    return jnp.asarray(x, jnp.float32), jax.nn.one_hot(labels, 10)


def residual(depth: int, width: int, inputs: int, norm: mf.layers.Norm, final: bool) -> mf.Network:
    """Dense, then blocks x + Dense(phi(norm(x))), then [norm, phi,] Dense(10)."""
    block = mf.Residual(mf.Sequential((norm, mf.Activation("relu"), mf.Dense(width, 2.0, 0.0))))
    end = (norm, mf.Activation("relu")) if final else ()
    layers = (mf.Dense(width, 1.0, 0.0), *[block] * depth, *end, mf.Dense(10, 1.0, 0.0))
    return mf.Network((inputs,), layers)


SIZES = {"mnist-half": 196, "cifar10-half": 768}


def cases() -> list[Case]:
    """All cases, in a fixed order."""
    found: list[Case] = []

    def add(kind: str, network: mf.Network, data: str, num_samples: int) -> None:
        found.append(Case(f"{kind} {data}", network, data, num_samples))

    def dense(depth, width, norm, activation, data, kind, n=200, **numbers) -> None:
        net = mf.mlp(
            [width] * depth,
            inputs=SIZES[data],
            outputs=10,
            norm=norm,
            activation=activation,
            **numbers,
        )
        add(f"{depth}x{width} {kind} {activation}", net, data, n)

    datas = ("mnist-half", "cifar10-half")
    for row, depth in enumerate((2, 3, 5, 10, 20, 30)):
        for column, gamma in enumerate((0.5, 1.0, 2.0)):
            data = datas[(row + column) % 2]
            width = (200, 100)[column % 2] if depth < 10 else (100, 64)[column % 2]
            dense(depth, width, mf.BatchNorm(gamma), "relu", data, f"BN {gamma:g}")
    for depth in (3, 10):
        for column, gamma in enumerate((0.5, 1.0, 2.0)):
            dense(depth, 150, mf.BatchNorm(gamma), "gelu", datas[column % 2], f"BN {gamma:g}")
        for gamma in (1.0, 2.0):
            dense(depth, 150, mf.BatchNorm(gamma), "tanh", "mnist-half", f"BN {gamma:g}")
        for gamma in (0.1, 0.25, 4.0):
            dense(depth, 100, mf.BatchNorm(gamma), "relu", "mnist-half", f"BN {gamma:g}")
    for row, depth in enumerate((3, 10, 20)):
        for column, gamma in enumerate((0.5, 1.0, 2.0)):
            data = datas[(row + column) % 2]
            dense(depth, 100, mf.LayerNorm(gamma), "relu", data, f"LN {gamma:g}")
    dense(5, 150, mf.LayerNorm(1.0), "gelu", "mnist-half", "LN 1")
    dense(
        4, 200, mf.BatchNorm(1.0), "relu", "mnist-half", "BN 1 flax", weight_var=1.0, bias_var=0.0
    )
    dense(8, 100, mf.BatchNorm(0.7), "relu", "mnist-half", "BN .7 n=400", 400)
    dense(6, 300, mf.BatchNorm(1.5), "relu", "mnist-half", "BN 1.5 n=100", 100)
    for depth in (3, 10):
        dense(depth, 160, mf.GroupNorm(num_groups=4), "relu", "mnist-half", "GN 1")
        dense(depth, 160, mf.ProxyNorm(mf.LayerNorm()), "relu", "mnist-half", "PN 1")
    for depth, activation in ((2, "relu"), (3, "relu"), (5, "relu"), (3, "tanh"), (3, "gelu")):
        dense(depth, 150, None, activation, "mnist-half", "none", weight_var=2.0, bias_var=0.0)
    for depth in (5, 10):
        for gamma in (0.5, 1.0, 2.0):
            for final in (True, False):
                norm = mf.BatchNorm(gamma)
                kind = f"residual {depth}x150 BN {gamma:g} {'final' if final else 'open'}"
                add(kind, residual(depth, 150, 196, norm, final), "mnist-half", 200)
    add(
        "residual 6x150 LN 1 final",
        residual(6, 150, 196, mf.LayerNorm(1.0), True),
        "mnist-half",
        200,
    )
    conv = dict(inputs=(32, 32, 3), kernel_size=3)
    gray = dict(inputs=(28, 28, 1), kernel_size=3)
    for gamma in (0.5, 1.0, 2.0):
        norm = mf.BatchNorm(gamma)
        add(f"conv 16-32 BN {gamma:g}", mf.cnn([16, 32], norm=norm, **gray), "mnist", 100)
        add(f"conv 16-32-48 BN {gamma:g}", mf.cnn([16, 32, 48], norm=norm, **conv), "cifar10", 100)
    norm = mf.BatchNorm(1.0)
    add(
        "conv 8-16-16-32-32 mean BN 1",
        mf.cnn([8, 16, 16, 32, 32], norm=norm, head="mean", **gray),
        "mnist",
        100,
    )
    add("conv 16-32 GN 1", mf.cnn([16, 32], norm=mf.GroupNorm(num_groups=4), **gray), "mnist", 100)
    add("conv 16-32-48 LN 1", mf.cnn([16, 32, 48], norm=mf.LayerNorm(), **conv), "cifar10", 100)
    add("conv 16-32 IN 1", mf.cnn([16, 32], norm=mf.InstanceNorm(), **gray), "mnist", 100)
    add(
        "conv 16-32 IEBN",
        mf.cnn([16, 32], norm=mf.InstanceEnhancementBatchNorm(), **gray),
        "mnist",
        100,
    )
    add(
        "preact 8-16 BN 1",
        mf.preact_resnet([8, 16], blocks=1, inputs=(28, 28, 1), norm=norm),
        "mnist",
        100,
    )
    return found


def runner(apply: Callable, x: jax.Array, y: jax.Array, momentum: float) -> Callable:
    """A function from parameters and a rate to the largest loss, in units of the first."""

    def loss(params: Any) -> jax.Array:
        return jnp.sum((apply(params, x) - y) ** 2) / (2 * len(x))

    @jax.jit
    def step(params, momenta, rate):
        value, gradient = jax.value_and_grad(loss)(params)
        momenta = jax.tree.map(lambda m, g: momentum * m + g, momenta, gradient)
        return jax.tree.map(lambda p, m: p - rate * m, params, momenta), momenta, value

    def run(params: Any, rate: float) -> float:
        momenta, losses = jax.tree.map(jnp.zeros_like, params), []
        for count in range(STEPS):
            params, momenta, value = step(params, momenta, rate)
            losses.append(value)
            if count % 10 == 9 and not float(value) < 1e6 * BLOW_UP * float(losses[0]):
                break
        values = np.array(losses, float)
        values = np.where(np.isfinite(values), values, np.inf)
        return float(values.max() / values[0])

    return run


def search(outcome: Callable[[float], bool], start: float) -> float:
    """The largest rate with a good outcome, by bisection to ``TOLERANCE``; NaN if none is found."""
    low = high = None
    rate, factor = start, 1.25
    for _ in range(40):
        if outcome(rate):
            low = rate
        else:
            high = rate
        if low and high:
            if high / low < TOLERANCE:
                return low
            rate = float(np.sqrt(low * high))
        else:
            rate = rate * factor if high is None else rate / factor
            factor = min(factor * 1.3, 4.0)
    return float("nan")


def boundaries(run: Callable, params: Any, unit: float) -> dict[str, float]:
    """The largest rates without a spike and with a bounded loss; ``unit``: where to start."""
    known: dict[float, float] = {}

    def largest(rate: float) -> float:
        if rate not in known:
            known[rate] = run(params, rate)
        return known[rate]

    return dict(
        no_spike=search(lambda rate: largest(rate) < SPIKE, 0.75 * unit),
        bounded=search(lambda rate: largest(rate) < BLOW_UP, 1.2 * unit),
        runs=len(known),
    )
