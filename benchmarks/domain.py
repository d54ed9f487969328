"""Where theory's lambda_max holds: FC networks with BatchNorm, by depth, width, n and outputs.

Gaussian inputs by theory of i.i.d. inputs, and MNIST images by theory of these images; training
mode, three draws each. Claim, on either: where ``fisher.within_domain`` is True, every draw's
largest eigenvalue is within 5 % of ``fisher.lambda_max``. Where it is False the excess is reported.
Exits with 1 when the claim is false. About eight minutes on two cores.
"""

import argparse
import itertools

import jax
import numpy as np
from common import write_rows
from flax import nnx

import meanfield_jax as mf

GRIDS = {
    "gaussian": itertools.product((2, 4, 8, 12), (100, 200, 400), (50, 100), (1, 10)),
    "mnist": itertools.product((1, 3), (64, 256, 512, 1024, 2048), (64, 128), (1, 10)),
}
"""Depth, width, n, outputs."""
DRAWS, BOUND = 3, 0.05


def measure(
    inputs: str, depth: int, width: int, num_samples: int, outputs: int, data_dir: str | None
) -> dict:
    """Predicted and measured largest eigenvalue of one network."""
    size = width if inputs == "gaussian" else 784
    network = mf.mlp([width] * depth, inputs=size, outputs=outputs, norm=mf.BatchNorm())
    if inputs == "gaussian":
        x = jax.random.normal(jax.random.key(1), (num_samples, width))
        fisher = mf.analyze(network, num_samples=num_samples).fisher
    else:
        x, _ = mf.data.load(inputs, num_samples=num_samples, data_dir=data_dir, flatten=True)
        fisher = mf.analyze(network, data=x).fisher
    tops = []
    for seed in range(DRAWS):
        op = mf.fisher_operator(mf.build(network, rngs=nnx.Rngs(seed)), x)
        found = mf.top_eigenvalues(op, 1, tol=3e-3, key=jax.random.key(seed)).raise_if_failed()
        tops.append(float(found.eigenvalues[0]))
    jax.clear_caches()
    return dict(
        inputs=inputs,
        depth=depth,
        width=width,
        num_samples=num_samples,
        outputs=outputs,
        lambda_max=float(fisher.lambda_max),
        within_domain=bool(fisher.within_domain),
        excess=[top / float(fisher.lambda_max) for top in tops],
    )


def summarize(inputs: str, rows: list[dict]) -> bool:
    """Prints how far draws are from theory inside and outside its domain; whether all hold."""
    inside, outside = (
        np.array([row["excess"] for row in rows if row["within_domain"] == limited])
        for limited in (True, False)
    )
    medians = np.median(outside, -1)
    print(
        f"{inputs}: {len(inside)} networks inside, {inside.min():.3f} to {inside.max():.3f};"
        f" {len(outside)} outside, medians {medians.min():.2f} to {medians.max():.2f}"
    )
    return bool(np.all(np.abs(inside - 1) <= BOUND))


def main() -> int:
    """Measures the grids, writes results/domain.json, prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    data_dir = parser.parse_args().data_dir
    rows = []
    for inputs, grid in GRIDS.items():
        for case in grid:
            rows.append(measure(inputs, *case, data_dir))
            row = rows[-1]
            print(inputs, *case, row["within_domain"], np.round(row["excess"], 3), flush=True)
    write_rows("domain", rows)
    holds = [summarize(name, [row for row in rows if row["inputs"] == name]) for name in GRIDS]
    return int(not all(holds))


if __name__ == "__main__":
    raise SystemExit(main())
