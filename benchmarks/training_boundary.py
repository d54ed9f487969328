"""The largest learning rate at which training stays bounded, against theory.

Full-batch heavy ball (momentum 0.9) on the squared loss with one-hot targets, 200 steps below 1000
times the first loss, BatchNorm with gamma .5, 1, 2, three random draws each, bisection to 5 %:
MNIST and CIFAR-10 in FC (width 500) and conv (30-60-90). Once near the targets (a thousandth of the
distance left), where the loss is quadratic, once from the random network itself. Goal: the median
within 10 % of the prediction; exits with 1 where one misses. About 40 minutes on two cores.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
from common import console, write_rows
from summary import boundary_tables

import meanfield_jax as mf
from meanfield_jax.variants import with_gamma

GAMMAS = (0.5, 1.0, 2.0)
RESIDUALS = (1e-3, 1.0)
GOAL = 0.1


def cases(data_dir: str | None) -> list[tuple[str, mf.Network, jax.Array, jax.Array]]:
    """Name, network, images and one-hot labels of every case."""
    rows = []
    for label, name in (("MNIST", "mnist"), ("CIFAR-10 subset", "cifar10")):
        for kind, num_samples in (("FC 500x3", 400), ("conv 30-60-90", 128)):
            flat = kind.startswith("FC")
            x, labels = mf.data.load(name, num_samples=num_samples, flatten=flat, data_dir=data_dir)
            options = dict(outputs=10, norm=mf.BatchNorm())
            if flat:
                network = mf.mlp([500] * 3, inputs=x.shape[1], **options)
            else:
                network = mf.cnn([30, 60, 90], inputs=x.shape[1:], **options)
            y = jax.nn.one_hot(jnp.asarray(labels), 10)
            rows.append((f"{label}, {kind}, n = {num_samples}", network, jnp.asarray(x), y))
    return rows


def main() -> int:
    """Runs all cases, writes JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    rows = []
    for name, network, x, y in cases(options.data_dir):
        for gamma, residual in itertools.product(GAMMAS, RESIDUALS):
            found = mf.measured_boundary(with_gamma(network, gamma), x, y, residual=residual)
            at = found.isel(network=0)
            ratio = float(at.ratio)
            rows.append(
                dict(
                    case=name,
                    gamma=gamma,
                    residual=residual,
                    predicted=float(at.predicted),
                    measured=at.boundary.values.tolist(),
                    ratio=ratio,
                    holds=abs(ratio - 1) <= GOAL,
                )
            )
            console.print(rows[-1])
    write_rows("training_boundary", rows)
    console.print(boundary_tables(dict(rows=rows))[0].printed())
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
