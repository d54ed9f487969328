"""Whether tuning pays in training: deep networks before and after ``mf.tune``, over learning rates.

2000 MNIST images, squared loss on one-hot targets, heavy ball (momentum 0.9), batches of 100, ten
epochs, five seeds, width 100. Every network is trained over the same grid of learning rates, at the
rate that ``mf.train`` has by default (0.1), and at the one that ``mf.learning_rate`` recommends.

* tanh, 30 layers with BatchNorm: gamma = 1, and one gamma for all layers tuned for gradients that
  keep their size (``objectives.unit_growth``).
* ReLU, the same: the growth does not depend on gamma, so beta is tuned with it.
* A residual network, 10 blocks Dense-BatchNorm-ReLU-Dense-BatchNorm: all scales 1; the last one of
  each branch 0 (Goyal et al. 2017, arXiv:1706.02677); each scale tuned between 0.1 and 3 for the
  largest eta_max with outputs of unit variance (``objectives.max_eta_max``). Without bounds those
  at the end of the branches go to 0: theory finds that initialization by itself.

A network trains where its mean training loss in the last epoch is, for every seed, below half of
what the best constant output gives (0.45). Claims: at its recommended rate each tuned network
trains and the two deep ones with gamma = 1 do not; there it reaches a lower loss, in the worst of
five seeds, than gamma = 1 at the best rate of the grid; the tuned residual network reaches a lower
loss than either of the others, each at its best rate.

Run: ``python tuning_pays.py``. The exit status is 1 when a claim is false. About 15 minutes on 2
cores.
"""

import argparse
import sys
from collections.abc import Callable

import jax
import numpy as np
from common import RESULTS, Claim, write_rows
from matplotlib.figure import Figure

import meanfield_jax as mf
from meanfield_jax import plot_style

DEFAULT = 0.1
RATES = np.geomspace(1e-4, 1, 9)
SEEDS = np.arange(5)
WIDTH, DEPTH, BLOCKS, NUM_SAMPLES, BATCH_SIZE, EPOCHS = 100, 30, 10, 2000, 100, 10
CONSTANT = 0.45
UNTUNED, ZERO, TUNED = "gamma = 1", "last gamma of a branch 0", "tuned"
COLOR = {UNTUNED: "#555555", ZERO: "#D55E00", TUNED: "#0072B2"}


def chain(activation: str) -> mf.Network:
    """So many equal hidden layers with BatchNorm."""
    block = (mf.Dense(WIDTH), mf.BatchNorm(), mf.Activation(activation))
    return mf.Network((784,), (*block, mf.Repeat(mf.Sequential(block), DEPTH - 1), mf.Dense(10)))


def residual(last_gamma: float) -> mf.Network:
    """Blocks whose branches end in a BatchNorm of this scale."""
    branch = (mf.Dense(WIDTH), mf.BatchNorm(), mf.Activation("relu"), mf.Dense(WIDTH))
    block = mf.Residual(mf.Sequential((*branch, mf.BatchNorm(gamma=last_gamma))))
    return mf.Network(
        (784,), (mf.Dense(WIDTH), *[block] * BLOCKS, mf.Activation("relu"), mf.Dense(10))
    )


def tuned(network: mf.Network, objective: mf.objectives.Objective, **options) -> mf.Network:
    """The network after ``mf.tune``, in double precision."""
    with jax.enable_x64():
        found = mf.tune(network, objective, num_samples=BATCH_SIZE, **options)
        print(found, file=sys.stderr, flush=True)
        return found.network


def cases() -> dict[str, dict[str, Callable[[], mf.Network]]]:
    """What is compared, by case and variant."""
    growth, largest = mf.objectives.unit_growth(), mf.objectives.max_eta_max(1.0)
    both = dict(over=("gamma", "beta"), shared=True)
    return {
        f"tanh, {DEPTH} layers": {
            UNTUNED: lambda: chain("tanh"),
            TUNED: lambda: tuned(chain("tanh"), growth, over="gamma", shared=True),
        },
        f"ReLU, {DEPTH} layers": {
            UNTUNED: lambda: chain("relu"),
            TUNED: lambda: tuned(chain("relu"), growth, **both),
        },
        f"residual, {BLOCKS} blocks": {
            UNTUNED: lambda: residual(1.0),
            ZERO: lambda: residual(0.0),
            TUNED: lambda: tuned(residual(1.0), largest, bounds=dict(gamma=(0.1, 3.0))),
        },
    }


def row_of(case: str, variant: str, network: mf.Network, data) -> dict:
    """One network over all rates and seeds; the last losses are those of the grid."""
    rate = float(mf.learning_rate(network, num_samples=BATCH_SIZE))
    rates = np.array([DEFAULT, rate, *RATES])[:, None]
    options = dict(batch_size=BATCH_SIZE, epochs=EPOCHS)
    run = mf.train(network, data, learning_rate=rates, seed=SEEDS, **options)
    default, own, *losses = np.nan_to_num(np.asarray(run.loss[..., -1]), nan=np.inf).tolist()
    print(f"{case}, {variant}: rate {rate:.3g}", file=sys.stderr, flush=True)
    return dict(case=case, variant=variant, rate=rate, default=default, own=own, losses=losses)


def best(row: dict) -> float:
    """The median over seeds at the best rate of the grid."""
    return float(np.median(row["losses"], 1).min())


def make_claims(rows: list[dict]) -> list[Claim]:
    """Those of the head of this file; worst seeds over what counts as trained."""
    claims, bound = [], CONSTANT / 2
    for row in rows:
        if row["variant"] == TUNED or (row["variant"] == UNTUNED and "layers" in row["case"]):
            wanted = "trains" if row["variant"] == TUNED else "does not train"
            text = f"{row['case']}, {row['variant']}: {wanted} at its recommended rate, loss"
            at_least = row["variant"] != TUNED
            claims.append(Claim(text, max(row["own"]), bound, at_least=at_least))
    for row in (row for row in rows if row["variant"] == TUNED):
        before = next(r for r in rows if (r["case"], r["variant"]) == (row["case"], UNTUNED))
        text = f"{row['case']}: best loss of gamma = 1 over the tuned one's at its recommended rate"
        claims.append(Claim(text, best(before) / max(row["own"]), 1.0))
    first, zero, tuned_row = (row for row in rows if "residual" in row["case"])
    for row in (first, zero):
        text = f"residual: best loss of {row['variant']} over that of the tuned one"
        claims.append(Claim(text, best(row) / best(tuned_row), 1.0))
    return claims


def picture(rows: list[dict]) -> Figure:
    """Final losses over the learning rate; median and range of the seeds."""
    names = list(dict.fromkeys(row["case"] for row in rows))
    figure = plot_style.picture(4.4 * len(names), 4.2)
    panels = figure.subplots(1, len(names), sharey=True)
    handles = {}
    for axes, name in zip(panels, names, strict=True):
        for row in (row for row in rows if row["case"] == name):
            color, variant = COLOR[row["variant"]], row["variant"]
            losses = np.minimum(np.array(row["losses"]), 1e3)
            (handles[variant],) = axes.plot(RATES, np.median(losses, 1), "o-", color=color)
            axes.fill_between(RATES, losses.min(1), losses.max(1), color=color, alpha=0.2, lw=0)
            rate = axes.axvline(row["rate"], color=color, ls=":", lw=1.5)
            handles[f"{variant}: its recommended rate"] = rate
        handles["rate 0.1"] = axes.axvline(DEFAULT, color="black", lw=0.8)
        handles["loss of a constant"] = axes.axhline(CONSTANT, color="black", lw=0.8, ls="--")
        axes.set(xscale="log", yscale="log", xlabel="learning rate", title=name, ylim=(0.1, 3))
    panels[0].set_ylabel(f"training loss after {EPOCHS} epochs")
    plot_style.letters(panels)
    place = dict(loc="outside lower center", ncols=4)
    figure.legend(handles.values(), handles, fontsize=8, frameon=False, **place)
    return figure


def main() -> int:
    """Tunes, trains, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    data = mf.data.load("mnist", num_samples=NUM_SAMPLES, flatten=True, data_dir=options.data_dir)
    rows = [
        row_of(case, variant, make(), data)
        for case, variants in cases().items()
        for variant, make in variants.items()
    ]
    claims = make_claims(rows)
    write_rows("tuning_pays", rows, claims=[claim.record() for claim in claims])
    picture(rows).savefig(RESULTS / "tuning_pays.png", dpi=130)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
