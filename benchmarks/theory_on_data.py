"""Theory of a batch: FC 784-1000x4-10 with BatchNorm in training mode, over the size of the batch.

Beside it the same network without BatchNorm, its kernel by the published recursion written out by
hand and jitted (as Neural Tangents computes it: no shares, no spectrum), and the measured tangent
kernel of one output of one random network. Inputs are Gaussian; their values do not matter to time.

Run: ``python theory_on_data.py``. The exit status is 1 when a claim is false. About 7 minutes.
"""

import argparse
import math
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from common import Claim, Peer, compare, median
from summary import finish

WIDTHS, INPUTS = (1000,) * 4, 784
SIZES = (250, 500, 2000, 4000)
OURS = "theory of the batch, n = {}"
VANILLA, BY_HAND = "the same, vanilla, n = 1000", "vanilla recursion by hand, n = 1000"
MEASURED = "measured kernel of one output, n = 250"


def network(norm: Any, outputs: int = 10) -> Any:
    """The specification."""
    import meanfield_jax as mf

    return mf.mlp(list(WIDTHS), inputs=INPUTS, outputs=outputs, norm=norm)


def inputs(num_samples: int) -> Any:
    """Gaussian inputs, (n, 784)."""
    import jax

    return jax.random.normal(jax.random.key(0), (num_samples, INPUTS))


def theory(num_samples: int, normalized: bool) -> Callable[[], dict[str, Any]]:
    """The package."""
    import jax

    import meanfield_jax as mf

    net, x = network(mf.BatchNorm() if normalized else None), inputs(num_samples)

    def solve() -> dict[str, Any]:
        fisher = jax.block_until_ready(mf.analyze(net, data=x)).fisher
        return dict(answer=float(fisher.outlier))

    return solve


def by_hand(num_samples: int) -> Callable[[], dict[str, Any]]:
    """Covariance and tangent kernel of a ReLU network, layer by layer."""
    import jax
    import jax.numpy as jnp

    x = inputs(num_samples)

    @jax.jit
    def tangent(x):
        moment, kernel, fan_in = x @ x.T / INPUTS, jnp.zeros((len(x),) * 2), INPUTS
        for width in (*WIDTHS, 10):
            kernel = fan_in * moment + 1 + 2.0 * kernel
            cov = 0.5 + 2.0 * moment
            scale = jnp.sqrt(jnp.diag(cov))
            c = jnp.clip(cov / jnp.outer(scale, scale), -1, 1)
            angle = math.pi / 2 + jnp.arcsin(c)
            moment = jnp.outer(scale, scale) * (jnp.sqrt(1 - c**2) + c * angle) / (2 * math.pi)
            fan_in, last = width, kernel
            kernel = kernel * angle / (2 * math.pi)
        return last

    def solve() -> dict[str, Any]:
        kernel = jax.block_until_ready(tangent(x))
        return dict(answer=float(np.linalg.eigvalsh(kernel)[-1] / num_samples))

    return solve


def measured(num_samples: int) -> Callable[[], dict[str, Any]]:
    """The n x n kernel of a random network with one output, by n products."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    import meanfield_jax as mf

    x = inputs(num_samples)
    op = mf.fisher_operator(mf.build(network(mf.BatchNorm(), 1), rngs=nnx.Rngs(0)), x)

    @jax.jit
    def kernel(op):
        units = jnp.eye(num_samples, dtype=x.dtype)
        return jax.lax.map(op.dual.linearize(), units, batch_size=10)

    def solve() -> dict[str, Any]:
        return dict(answer=float(np.linalg.eigvalsh(kernel(op))[-1]))

    return solve


def main() -> int:
    """Measures, prints, writes results/theory_on_data.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    def peer(name: str, setup: str, num_samples: int, rounds: int = 99, **rest) -> Peer:
        arguments = dict(num_samples=num_samples, **rest)
        return Peer(name, f"theory_on_data:{setup}", arguments, rounds, timeout=600)

    peers = [peer(OURS.format(1000), "theory", 1000, normalized=True)]
    peers += [peer(OURS.format(n), "theory", n, 1 + (n < 1000), normalized=True) for n in SIZES]
    peers += [
        peer(VANILLA, "theory", 1000, normalized=False),
        peer(BY_HAND, "by_hand", 1000),
        peer(MEASURED, "measured", 250, 1),
    ]
    compare(peers, {}, options.rounds)
    return finish("theory_on_data", dict(peers=[p.record() for p in peers]), claims(peers))


def claims(peers: list[Peer]) -> list[Claim]:
    """What is claimed."""
    named = {peer.name: peer for peer in peers}
    answers = [named[name].result["answer"] for name in (VANILLA, BY_HAND)]
    large = named[OURS.format(4000)]
    return [
        Claim("seconds at n = 1000, warm", median(peers[0].warm), 3, at_least=False),
        Claim("peak MB at n = 4000", large.megabytes, 8000, at_least=False),
        Claim(
            "outlier differs from the recursion by hand by",
            abs(answers[0] / answers[1] - 1),
            1e-4,
            at_least=False,
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
