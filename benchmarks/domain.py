"""Where theory's lambda_max holds: FC networks with BatchNorm, by depth, width, n and outputs.

Gaussian inputs by theory of i.i.d. inputs, and MNIST images by theory of these images; training
mode. Measured: eight draws. Claims, on either:

* where ``fisher.within_domain`` is True, every draw's largest eigenvalue is within 5 % of
  ``fisher.lambda_max`` (``excess`` is the one over the other);
* where it is False, the median of eight other draws (``drawn_eigenvalues``) over that of the
  measured ones is .95 to 1.05 at the median over networks, and within 20 % of 1 for eight networks
  in ten.

Exits with 1 when one is false. About fifteen minutes on two cores.
"""

import argparse
import itertools

import jax
import numpy as np
from common import write_rows

import meanfield_jax as mf

GRIDS = {
    "gaussian": itertools.product((2, 4, 8, 12), (100, 200, 400), (50, 100), (1, 10)),
    "mnist": itertools.product((1, 3), (64, 256, 512, 1024, 2048), (64, 128), (1, 10)),
}
"""Depth, width, n, outputs."""
DRAWS, BOUND = 8, 0.05
MEDIAN, WITHIN, FRACTION = 0.05, 0.20, 0.8


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
    drawn, measured = (
        mf.drawn_eigenvalues(network, x, draws=DRAWS, seed=seed).raise_if_failed()
        for seed in (0, 1)
    )
    tops = np.asarray(measured.eigenvalues[:, 0], float)
    jax.clear_caches()
    return dict(
        inputs=inputs,
        depth=depth,
        width=width,
        num_samples=num_samples,
        outputs=outputs,
        lambda_max=float(fisher.lambda_max),
        within_domain=bool(fisher.within_domain),
        drawn=float(drawn.lambda_max),
        drawn_ratio=float(drawn.lambda_max / np.median(tops)),
        excess=(tops / float(fisher.lambda_max)).tolist(),
    )


def summarize(inputs: str, rows: list[dict]) -> bool:
    """Prints draws against predictions inside and outside of the domain; whether all hold."""
    inside = np.array([row["excess"] for row in rows if row["within_domain"]])
    outside = [row for row in rows if not row["within_domain"]]
    wide = np.array([1 / np.median(row["excess"]) for row in outside])
    drawn = np.array([row["drawn_ratio"] for row in outside])
    print(f"{inputs}: {len(inside)} networks inside, {inside.min():.3f} to {inside.max():.3f}")
    for name, ratios in (("wide limit", wide), ("drawn", drawn)):
        print(
            f"  {len(outside)} outside, {name} / measured: median {np.median(ratios):.2f},"
            f" within {WITHIN:.0%}: {np.mean(np.abs(ratios - 1) <= WITHIN):.0%}"
        )
    return bool(
        np.all(np.abs(inside - 1) <= BOUND)
        and abs(np.median(drawn) - 1) <= MEDIAN
        and np.mean(np.abs(drawn - 1) <= WITHIN) >= FRACTION
    )


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
            print(
                inputs,
                *case,
                row["within_domain"],
                f"{row['drawn_ratio']:.2f}",
                np.round(row["excess"], 3),
                flush=True,
            )
    write_rows("domain", rows)
    holds = [summarize(name, [row for row in rows if row["inputs"] == name]) for name in GRIDS]
    return int(not all(holds))


if __name__ == "__main__":
    raise SystemExit(main())
