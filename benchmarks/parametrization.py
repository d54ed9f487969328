"""The largest stable learning rate over the width: standard against maximal update, measured too.

An MLP and a CNN with BatchNorm and without, 64 to 4096 units, 64 Gaussian inputs, C = 4: eta_max =
2 / lambda_max by theory, and by Lanczos for three draws (the CNN up to 1024 channels). Goal: in the
maximal update parametrization within 10 % of its value at the largest width.

Run: python benchmarks/parametrization.py   (about ten minutes on two cores)
"""

import sys

import jax
import numpy as np
from common import write_rows

import meanfield_jax as mf

WIDTHS, MOST_CHANNELS, DRAWS, NUM_SAMPLES, GOAL = (64, 256, 1024, 4096), 1024, 3, 64, 0.10


def mlp(width: int) -> mf.Network:
    return mf.mlp([width] * 3, inputs=16, outputs=4)


def normed(width: int) -> mf.Network:
    return mf.mlp([width] * 3, inputs=16, outputs=4, norm=mf.BatchNorm())


def cnn(width: int) -> mf.Network:
    return mf.cnn([width] * 2, inputs=(8, 8, 3), outputs=4, head="mean")


def measured(network: mf.Network) -> float:
    """2 / lambda_max, the mean over draws."""
    x = jax.random.normal(jax.random.key(0), (NUM_SAMPLES, *network.input_shape))
    found = [
        mf.top_eigenvalues(mf.fisher_operator(mf.build(network, rngs=seed), x), k=1).eigenvalues[0]
        for seed in range(DRAWS)
    ]
    return float(2 / np.mean(found))


def row(name: str, make, width: int, kind: str) -> dict:
    """Prediction and measurement of one network."""
    network = make(width)
    if kind != "standard":
        network = network.in_parametrization(kind, make(WIDTHS[0]))
    predicted = float(mf.analyze(network, num_samples=NUM_SAMPLES).eta_max(0.0))
    by_lanczos = name != "cnn" or width <= MOST_CHANNELS
    return dict(
        network=name,
        parametrization=kind,
        width=width,
        predicted=predicted,
        measured=measured(network) if by_lanczos else None,
    )


def main() -> int:
    """Prints a table; returns 1 if a maximal update rate changes by more than the goal."""
    rows = []
    for name, make in dict(mlp=mlp, normed=normed, cnn=cnn).items():
        for kind in ("standard", "mup"):
            for width in WIDTHS:
                rows.append(row(name, make, width, kind))
                found = rows[-1]
                print(
                    f"{name:8} {kind:10} {width:5} predicted {found['predicted']:.4g}"
                    f" measured {found['measured'] or float('nan'):.4g}",
                    flush=True,
                )
    write_rows("parametrization", rows)
    missed = False
    for name in ("mlp", "normed", "cnn"):
        for source in ("predicted", "measured"):
            of = [r for r in rows if (r["network"], r["parametrization"]) == (name, "mup")]
            values = np.array([r[source] for r in of if r[source] is not None])
            ratios = values / values[-1]
            print(f"{name} {source}: {np.round(ratios, 3).tolist()} of the widest")
            missed |= bool(np.any(np.abs(ratios - 1) > GOAL))
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
