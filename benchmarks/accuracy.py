"""How well theory predicts real networks' Fisher outliers.

Every case is drawn anew four times. A case holds when |mean - theory| <= 4 standard errors + 3 % of
the theory (training mode of the fully connected network on Gaussian inputs: 0.5 %). The published
recursion ("wei2019") is reported beside them with its deviation and has nothing to hold. Exits with
1 when a case misses. About ten minutes on two cores.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
from common import console, write_rows
from summary import accuracy_tables

import meanfield_jax as mf
from meanfield_jax.experiments.validate import measure

DRAWS = 4


def cases(data_dir: str | None) -> list[dict]:
    """Network, inputs and allowed deviation in training mode of every case."""
    norm = mf.BatchNorm(gamma=1.0)
    position = mf.BatchNorm(gamma=1.0, axes="position")
    fc = dict(widths=[1000] * 3, inputs=784, outputs=10)
    conv = dict(channels=[120, 240, 360])
    gaussian = jax.random.normal(jax.random.key(0), (1000, 784))
    maps = jax.random.normal(jax.random.key(1), (500, 32, 32, 3))
    rows = [
        dict(name="FC 784-1000x3-10", net=mf.mlp(**fc), x=gaussian),
        *(
            dict(
                name=f"FC, BatchNorm gamma={gamma:g}",
                net=mf.mlp(**fc, norm=mf.BatchNorm(gamma=gamma)),
                x=gaussian,
                tolerance=0.005,
            )
            for gamma in (0.5, 1.0, 2.0)
        ),
        dict(name="conv 120-240-360", net=mf.cnn(**conv), x=maps),
        dict(name="conv, BatchNorm", net=mf.cnn(**conv, norm=norm), x=maps),
        dict(name="conv, BatchNorm per position", net=mf.cnn(**conv, norm=position), x=maps),
    ]
    try:
        mnist, _ = mf.data.load("mnist", num_samples=1000, flatten=True, data_dir=data_dir)
    except mf.DataError as error:
        print(error, file=sys.stderr)
        return rows
    real = dict(name="FC, BatchNorm, MNIST", x=jnp.asarray(mnist), tolerance=0.05)
    real["net"] = mf.mlp(**fc, norm=norm)
    # the i.i.d. theory makes no claim for running statistics on real images
    return [
        *rows,
        dict(real, held=("batch",)),
        dict(real, name="FC, BatchNorm, MNIST, theory given the images", tolerance=0.03, data=True),
    ]


def predict(case: dict, statistics: str) -> float:
    """The outlier by theory: of the very inputs, or of i.i.d. ones."""
    net, x = case["net"], case["x"]
    if case.get("data"):
        return float(mf.analyze(net, data=x, statistics=statistics).fisher.outlier)
    with jax.enable_x64():
        theory = mf.analyze(net, statistics=statistics, num_samples=len(x))
        return float(theory.fisher.outlier)


def result(case: dict) -> list[dict]:
    """Measures one case in both modes."""
    has_norm = any("BatchNorm" in repr(layer) for layer in case["net"].layers)
    draws = [measure(case["net"], case["x"], seed=seed).mean(-1) for seed in range(DRAWS)]
    outliers = np.stack(draws).astype(float)
    means, errors = outliers.mean(0), outliers.std(0, ddof=1) / np.sqrt(DRAWS)
    modes = ("batch", "frozen") if has_norm else ("batch",)
    return [
        compare(case, mode if has_norm else "", float(mean), float(error))
        for mode, mean, error in zip(modes, means, errors, strict=False)
    ]


def compare(case: dict, mode: str, mean: float, error: float) -> dict:
    """One row: theory against the measured mean and its standard error."""
    statistics = mode or "batch"
    theory, published = (predict(case, name) for name in (statistics, "wei2019"))
    share = case.get("tolerance", 0.03) if statistics == "batch" else 0.03
    held = statistics in case.get("held", ("batch", "frozen"))
    return dict(
        network=case["name"],
        mode=mode,
        predicted=theory,
        measured=mean,
        standard_error=error,
        ratio=theory / mean,
        published_ratio=published / mean,
        allowed=4 * error + share * theory if held else None,
        holds=bool(abs(mean - theory) <= 4 * error + share * theory) if held else None,
    )


def main() -> int:
    """Runs all cases, writes JSON, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with MNIST [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    rows = []
    for case in cases(options.data_dir):
        rows += result(case)
        console.print(rows[-1])
    write_rows("accuracy", rows, draws=DRAWS)
    console.print(accuracy_tables(dict(rows=rows))[0].printed())
    return 0 if all(row["holds"] is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
