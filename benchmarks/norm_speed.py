"""Forward and backward through each normalization layer, as a ratio to Flax's BatchNorm.

One call is the value and the gradients with respect to inputs and parameters, with the running
statistics moved on, jitted, float32 and bfloat16. Calls of both sides alternate, so that a ratio
comes from two calls side by side; compile time is outside. A layer that contains more than the
normalization stands against as much with Flax's BatchNorm: proxy norm against [BatchNorm, ReLU],
cross-iteration BatchNorm against [weights, BatchNorm].

Run: ``python norm_speed.py [--rounds 30]``. The exit status is 1 when a claim is false.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from common import Claim, console, write_rows
from rich.table import Table

BOUND = 1.5
SHAPES = {"vectors": (256, 4096), "maps": (32, 32, 32, 64)}
NAMES = ("batch", "layer", "group", "instance", "batch_group", "cross_iteration")
NAMES = (*NAMES, "instance_enhancement", "proxy")


def blocks(name: str, shape: tuple[int, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Ours and Flax's module as functions of the random streams."""
    import jax
    from flax import nnx

    import meanfield_jax as mf
    from meanfield_jax.experiments.compare import norm_of

    features = shape[-1]
    spec = mf.mlp([features], inputs=features, outputs=1)
    norm = norm_of(name, spec)
    weights = mf.Dense(features) if len(shape) == 2 else mf.Conv(features, stride=1)
    with_weights = name == "cross_iteration"
    layers = norm.around(weights if with_weights else None, mf.Activation("relu"))
    if name != "proxy":
        layers = layers[:-1]
    block = mf.Sequential(layers)

    def ours(rngs):
        return block.build(shape[1:], rngs)

    def flax(rngs):
        parts = [weights.build(shape[1:], rngs)] if with_weights else []
        parts.append(nnx.BatchNorm(features, rngs=rngs))
        return nnx.Sequential(*parts, *([jax.nn.relu] if name == "proxy" else []))

    return ours, flax


def step(build: Callable[..., Any], shape: tuple[int, ...], dtype) -> Callable[[], None]:
    """A compiled call: value, gradients and new statistics."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    graph, params, state = nnx.split(build(nnx.Rngs(0)), nnx.Param, nnx.Variable)
    x, cotangent = jax.random.normal(jax.random.key(0), (2, *shape)).astype(dtype)

    def value(params, x, state):
        model = nnx.merge(graph, params, state, copy=True)
        y = model(x)
        return jnp.vdot(y, cotangent).astype(jnp.float32), nnx.split(model, nnx.Param, ...)[2]

    compiled = jax.jit(jax.value_and_grad(value, (0, 1), has_aux=True))
    holder = [state]

    def call() -> None:
        (_, holder[0]), gradients = compiled(params, x, holder[0])
        jax.block_until_ready(gradients)

    call()
    call()
    return call


def ratio(name: str, kind: str, dtype: str, rounds: int) -> dict[str, Any]:
    """Our seconds over Flax's: the median over pairs of calls side by side."""
    ours, flax = (step(build, SHAPES[kind], dtype) for build in blocks(name, SHAPES[kind]))
    ratios = []
    for index in range(rounds):
        pair = [ours, flax] if index % 2 == 0 else [flax, ours]
        seconds = {}
        for call in pair:
            start = time.perf_counter()
            call()
            seconds[call] = time.perf_counter() - start
        ratios.append(seconds[ours] / seconds[flax])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return dict(norm=name, shape=kind, dtype=dtype, ratio=middle, low=low, high=high)


def main() -> int:
    """Measures, prints, writes the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=30, help="pairs of calls")
    rounds = parser.parse_args().rounds
    rows = []
    for kind in SHAPES:
        for name in NAMES:
            if (name, kind) == ("instance", "vectors"):
                continue  # for maps only
            rows += [ratio(name, kind, dtype, rounds) for dtype in ("float32", "bfloat16")]
            single, half = (f"{row['ratio']:.2f}" for row in rows[-2:])
            console.print(f"{name}, {kind}: {single}, bfloat16 {half}", highlight=False)
    table = Table(title="seconds over those with Flax's BatchNorm (quartiles)")
    for column in ("norm", "shape", "dtype", "ratio", "low", "high"):
        table.add_column(column)
    for row in rows:
        numbers = (f"{row[key]:.2f}" for key in ("ratio", "low", "high"))
        table.add_row(row["norm"], row["shape"], row["dtype"], *numbers)
    console.print(table)
    claims = [
        Claim(
            f"{row['norm']}, {row['shape']}, {row['dtype']}: at most {BOUND}",
            row["ratio"],
            BOUND,
            at_least=False,
        )
        for row in rows
    ]
    for claim in claims:
        console.print("holds" if claim.holds else "FALSE", claim.text, f"{claim.value:.2f}")
    write_rows("norm_speed", rows, claims=[claim.record() for claim in claims])
    return int(not all(claim.holds for claim in claims))


if __name__ == "__main__":
    sys.exit(main())
