"""Steps to a training loss: one run at the predicted rate against a grid of learning rates.

Heavy ball (momentum 0.9) on the squared loss with one-hot targets, minibatches of 100 out of 2000
MNIST images, 20 epochs, five seeds. The grid: 12 rates from 1e-4 to 1. Against it, each one run
without any search: ``mf.optimizer`` given one batch (half of the largest stable rate), the same
at 0.8 of it (the median of the best rates in the phase diagrams, see ``reproduce.py fig2``), and
``mf.learning_rate_for`` each draw. The loss to be reached is
the lowest that any rate of the grid has after half of the epochs, median over seeds.

Claim: ``mf.optimizer`` needs at most 1.5 times the steps of the best rate of the grid, which costs
twelve runs. Writes results/time_to_loss.json and .png, prints a table, exits with 1 where the claim
is false. About ten minutes on two cores.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, write_rows
from flax import nnx
from matplotlib.figure import Figure

import meanfield_jax as mf

RATES = np.geomspace(1e-4, 1, 12)
SEEDS = np.arange(5)
NUM_SAMPLES, BATCH_SIZE, EPOCHS = 2000, 100, 20
STEPS = NUM_SAMPLES // BATCH_SIZE
"""Steps of an epoch; the loss is known as its mean over one."""
GOAL = 1.5
FRACTION = 0.8
RULES = {
    "optimizer": dict(),
    f"optimizer, fraction {FRACTION}": dict(fraction=FRACTION),
}
MEASURED = "learning_rate_for"
COLOR = dict(zip((*RULES, MEASURED), ("#0072B2", "#56B4E9", "#009E73"), strict=True))


def cases(data_dir: str | None) -> Iterator[tuple[str, mf.Network, np.ndarray, np.ndarray]]:
    """Name, network, images and labels."""
    options = dict(outputs=10, norm=mf.BatchNorm())
    x, labels = mf.data.load("mnist", num_samples=NUM_SAMPLES, flatten=True, data_dir=data_dir)
    for widths in ([100] * 3, [300] * 3):
        name = f"FC 784-{widths[0]}x3-10, BatchNorm"
        yield name, mf.mlp(widths, inputs=784, **options), x, labels
    yield "FC 784-100x3-10", mf.mlp([100] * 3, inputs=784, outputs=10), x, labels
    maps, labels = mf.data.load("mnist", num_samples=NUM_SAMPLES, data_dir=data_dir)
    network = mf.cnn([8, 16, 32], inputs=maps.shape[1:], **options)
    yield "conv 8-16-32, BatchNorm", network, maps, labels


def runs(network: mf.Network, x: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
    """By rule: its losses by epoch, (..., seeds, epochs), its rate, seconds to find that."""
    options = dict(data=(x, labels), epochs=EPOCHS, batch_size=BATCH_SIZE, seed=SEEDS)
    grid = mf.train(network, learning_rate=RATES[:, None], **options)
    found = dict(grid=dict(loss=np.asarray(grid.loss), rate=RATES, seconds=0.0))
    batch = jnp.asarray(x[:BATCH_SIZE])
    for name, changes in RULES.items():
        start = time.perf_counter()
        rule = mf.optimizer(network, data=batch, **changes)
        seconds = time.perf_counter() - start
        rate = changes.get("fraction", 0.5) * float(mf.analyze(network, data=batch).eta_max())
        loss = mf.train(network, optimizer=rule, **options).loss
        found[name] = dict(loss=np.asarray(loss), rate=rate, seconds=seconds)
    start = time.perf_counter()
    rates = [mf.learning_rate_for(drawn(network, seed), batch) for seed in SEEDS]
    seconds = (time.perf_counter() - start) / len(SEEDS)
    loss = mf.train(network, learning_rate=jnp.stack(rates), **options).loss
    rate = float(np.median(rates))
    found[MEASURED] = dict(loss=np.asarray(loss), rate=rate, seconds=seconds)
    return found


def drawn(network: mf.Network, seed: int) -> nnx.Module:
    """The very draw that ``mf.train`` starts from."""
    return mf.build(network, rngs=nnx.Rngs(jax.random.split(jax.random.key(seed))[0]))


def steps_to(loss: np.ndarray, target: float) -> np.ndarray:
    """Steps until the loss is at the target, (...,) of (..., epochs); infinite where it never is.

    Between the middles of two epochs the logarithm of the loss is taken to be linear.
    """
    below = np.nan_to_num(loss, nan=np.inf) <= target
    after = below.argmax(-1)
    before = np.maximum(after - 1, 0)
    high, low = (np.take_along_axis(loss, at[..., None], -1)[..., 0] for at in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.log(high / target) / np.log(high / low)
    steps = STEPS * (after + 0.5 - np.where(after > before, 1 - part, 0))
    return np.where(below.any(-1), steps, np.inf)


def rows_of(case: str, found: dict[str, dict]) -> list[dict]:
    """A row for the best rate of the grid and for each rule."""
    losses = np.nan_to_num(found["grid"]["loss"], nan=np.inf)
    target = float(np.median(losses, 1)[:, EPOCHS // 2 - 1].min())
    by_rate = np.median(steps_to(losses, target), -1)
    best = int(by_rate.argmin())
    rows = [
        row_of(case, "best of the grid", target, RATES[best], by_rate[best], by_rate[best], 0.0)
    ]
    rows[0]["by_rate"] = [finite(steps) for steps in by_rate]
    for name in COLOR:
        by_seed = steps_to(found[name]["loss"], target)
        at = found[name]
        steps = np.median(by_seed)
        rows.append(row_of(case, name, target, at["rate"], steps, by_rate[best], at["seconds"]))
        rows[-1]["by_seed"] = [finite(steps) for steps in by_seed]
    return rows


def row_of(case, rule, target, rate, steps, best, seconds) -> dict:
    """One result; None where a loss was never reached, or there is no single rate."""
    ratio = steps / best
    values = dict(rate=finite(rate), steps=finite(steps), ratio=finite(ratio), seconds=seconds)
    return dict(case=case, rule=rule, target=target, **values, holds=bool(ratio <= GOAL))


def finite(value: float) -> float | None:
    """For JSON."""
    return float(value) if np.isfinite(value) else None


def markdown(rows: list[dict]) -> str:
    """The table of the README."""
    lines = [
        "| network | loss | rate by | rate | steps | / best of the grid | within 1.5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rate, steps, ratio = (
            "-" if row[name] is None else f"{row[name]:{form}}"
            for name, form in (("rate", ".3g"), ("steps", ".0f"), ("ratio", ".2f"))
        )
        holds = "yes" if row["holds"] else "no"
        cells = [row["case"], f"{row['target']:.3f}", row["rule"], rate, steps, ratio, holds]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def picture(found: dict[str, dict[str, dict]], targets: dict[str, float]) -> Figure:
    """Learning curves, medians over seeds: the grid in grey."""
    figure = Figure(figsize=(3.6 * len(found), 3.6), layout="constrained")
    steps = STEPS * (np.arange(EPOCHS) + 0.5)
    for axes, (case, rules) in zip(figure.subplots(1, len(found))[...], found.items(), strict=True):
        for index, losses in enumerate(rules["grid"]["loss"]):
            label = "12 rates, 1e-4 to 1" if index == 0 else None
            axes.plot(steps, np.median(losses, 0), color="#bbbbbb", lw=1, label=label)
        for name, color in COLOR.items():
            axes.plot(steps, np.median(rules[name]["loss"], 0), color=color, lw=2, label=name)
        axes.axhline(targets[case], color="black", lw=0.5, ls=":")
        axes.set(yscale="log", ylim=(5e-3, 20), xlabel="step", title=case)
    figure.axes[0].set_ylabel("training loss")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def main() -> int:
    """Runs all cases, writes JSON and the picture, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    rows, found = [], {}
    for name, network, x, labels in cases(options.data_dir):
        found[name] = runs(network, x, labels)
        rows += rows_of(name, found[name])
        print(markdown(rows[-len(COLOR) - 1 :]), file=sys.stderr, flush=True)
    write_rows("time_to_loss", rows)
    targets = {row["case"]: row["target"] for row in rows}
    picture(found, targets).savefig(RESULTS / "time_to_loss.png", dpi=120)
    print(markdown(rows))
    return 0 if all(row["holds"] for row in rows if row["rule"] == "optimizer") else 1


if __name__ == "__main__":
    raise SystemExit(main())
