"""Where theory's lambda_max holds: FC networks with BatchNorm, by depth, width, n and outputs.

Gaussian inputs, training mode, three draws each. Claim: where ``fisher.outlier_limited`` is True,
every draw's largest eigenvalue is within 5 % of ``fisher.lambda_max``. Where it is False the excess
is reported. Exits with 1 when the claim is false. About five minutes on two cores.
"""

import itertools

import jax
import numpy as np
from common import write_rows
from flax import nnx

import meanfield_jax as mf

GRID = itertools.product((2, 4, 8, 12), (100, 200, 400), (50, 100), (1, 10))
DRAWS, BOUND = 3, 0.05


def measure(depth: int, width: int, num_samples: int, outputs: int) -> dict:
    """Predicted and measured largest eigenvalue of one network."""
    network = mf.mlp([width] * depth, inputs=width, outputs=outputs, norm=mf.BatchNorm())
    x = jax.random.normal(jax.random.key(1), (num_samples, width))
    fisher = mf.analyze(network, num_samples=num_samples).fisher
    tops = []
    for seed in range(DRAWS):
        op = mf.fisher_operator(mf.build(network, rngs=nnx.Rngs(seed)), x)
        found = mf.top_eigenvalues(op, 1, tol=3e-3, key=jax.random.key(seed)).raise_if_failed()
        tops.append(float(found.eigenvalues[0]))
    jax.clear_caches()
    return dict(
        depth=depth,
        width=width,
        num_samples=num_samples,
        outputs=outputs,
        lambda_max=float(fisher.lambda_max),
        outlier_limited=bool(fisher.outlier_limited),
        excess=[top / float(fisher.lambda_max) for top in tops],
    )


def main() -> int:
    """Measures the grid, writes results/domain.json, prints a summary."""
    rows = []
    for case in GRID:
        rows.append(measure(*case))
        print(*case, rows[-1]["outlier_limited"], np.round(rows[-1]["excess"], 3), flush=True)
    inside, outside = (
        np.array([row["excess"] for row in rows if row["outlier_limited"] == limited])
        for limited in (True, False)
    )
    write_rows("domain", rows)
    print(f"outlier-limited: {len(inside)} networks, {inside.min():.3f} to {inside.max():.3f}")
    medians = np.median(outside, -1)
    print(f"others: {len(outside)} networks, medians {medians.min():.2f} to {medians.max():.2f}")
    return int(np.any(np.abs(inside - 1) > BOUND))


if __name__ == "__main__":
    raise SystemExit(main())
