"""Steps to a training loss: one run at a rate found without a search, against twelve rates.

Heavy ball (momentum 0.9) on the squared loss with one-hot targets, minibatches of 100 out of 2000
MNIST images, 20 epochs, five seeds. The grid: 12 rates from 1e-4 to 1. Against it, each one run
without any search: ``mf.learning_rate`` of the specification and one batch, the same of each draw
(measured), and what people use instead: ``optax.contrib``'s prodigy, dadapt_adamw, dowg (with its
own rate), mechanize around the same heavy ball at 1e-3, and the learning-rate range test of Smith
(2017, arXiv:1506.01186): rates rise from 1e-5 to 10 over 100 steps, and the rate is a tenth of the
one at which the loss is lowest. (momo needs the loss in its update, which ``mf.train`` does not
pass.) The loss to be reached is the lowest that any rate of the grid has after half of the epochs,
median over seeds.

Claims: ``mf.learning_rate`` needs at most 1.25 times the steps of the best rate of the grid at the
median over networks, and 1.6 times at worst; and fewer than each peer at the median. Writes
results/time_to_loss.json and .png, prints a table, exits with 1 where a claim is false.
"""

import argparse
import sys
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from common import RESULTS, write_rows
from flax import nnx
from matplotlib.figure import Figure

import meanfield_jax as mf

RATES = np.geomspace(1e-4, 1, 12)
SEEDS = np.arange(5)
NUM_SAMPLES, BATCH_SIZE, EPOCHS = 2000, 100, 20
STEPS = NUM_SAMPLES // BATCH_SIZE
"""Steps of an epoch; the loss is known as its mean over one."""
PREDICTED, MEASURED, RANGE_TEST = "learning_rate", "learning_rate, measured", "range test"
PEERS = {
    "prodigy": lambda: optax.contrib.prodigy(),
    "dadapt_adamw": lambda: optax.contrib.dadapt_adamw(),
    "dowg": lambda: optax.contrib.dowg(),
    "mechanize": lambda: optax.contrib.mechanize(optax.sgd(1e-3, 0.9)),
}
COLOR = dict(zip((PREDICTED, MEASURED, RANGE_TEST), ("#0072B2", "#009E73", "#E69F00"), strict=True))
TYPICAL, WORST = 1.25, 1.6


def residual(norm: mf.layers.Norm) -> mf.Network:
    """Dense, ten blocks x + Dense(relu(norm(x))), norm, ReLU, Dense."""
    block = mf.Residual(mf.Sequential((norm, mf.Activation("relu"), mf.Dense(100, 2.0, 0.0))))
    end = (norm, mf.Activation("relu"), mf.Dense(10, 1.0, 0.0))
    return mf.Network((784,), (mf.Dense(100, 1.0, 0.0), *[block] * 10, *end))


def cases(data_dir: str | None) -> Iterator[tuple[str, mf.Network, np.ndarray, np.ndarray]]:
    """Name, network, images and labels."""
    options = dict(outputs=10, norm=mf.BatchNorm())
    x, labels = mf.data.load("mnist", num_samples=NUM_SAMPLES, flatten=True, data_dir=data_dir)
    for widths in ([100] * 3, [300] * 3, [100] * 10):
        name = f"FC 784-{widths[0]}x{len(widths)}-10, BatchNorm"
        yield name, mf.mlp(widths, inputs=784, **options), x, labels
    layer = mf.mlp([100] * 5, inputs=784, outputs=10, norm=mf.LayerNorm())
    yield "FC 784-100x5-10, LayerNorm", layer, x, labels
    yield "residual, 10 blocks, BatchNorm", residual(mf.BatchNorm()), x, labels
    yield "FC 784-100x3-10", mf.mlp([100] * 3, inputs=784, outputs=10), x, labels
    maps, labels = mf.data.load("mnist", num_samples=NUM_SAMPLES, data_dir=data_dir)
    network = mf.cnn([8, 16, 32], inputs=maps.shape[1:], **options)
    yield "conv 8-16-32, BatchNorm", network, maps, labels


def runs(network: mf.Network, x: np.ndarray, labels: np.ndarray) -> dict[str, dict]:
    """By rule: its losses by epoch, (..., seeds, epochs), its rate, seconds to find that."""
    options = dict(data=(x, labels), epochs=EPOCHS, batch_size=BATCH_SIZE, seed=SEEDS)
    batch = jnp.asarray(x[:BATCH_SIZE])
    ways = {
        PREDICTED: lambda seed: mf.learning_rate(network, batch),
        MEASURED: lambda seed: mf.learning_rate(drawn(network, seed), batch),
        RANGE_TEST: lambda seed: range_test(drawn(network, seed), x, labels),
    }
    found = {}
    for name, way in ways.items():
        start = time.perf_counter()
        rates = np.array([float(way(seed)) for seed in SEEDS])
        found[name] = dict(rate=rates, seconds=(time.perf_counter() - start) / len(SEEDS))
    rates = np.concatenate(
        [np.repeat(RATES[:, None], len(SEEDS), 1), *([at["rate"][None] for at in found.values()])]
    )
    losses = np.asarray(mf.train(network, learning_rate=rates, **options).loss)
    for index, at in enumerate(found.values()):
        at |= dict(loss=losses[len(RATES) + index], rate=float(np.median(at["rate"])))
    found["grid"] = dict(loss=losses[: len(RATES)], rate=RATES, seconds=0.0)
    for name, rule in PEERS.items():
        loss = mf.train(network, optimizer=rule(), **options).loss
        found[name] = dict(loss=np.asarray(loss), rate=np.nan, seconds=0.0)
    return found


def range_test(model: nnx.Module, x: np.ndarray, labels: np.ndarray) -> float:
    """A tenth of the rate at which the loss is lowest while rates rise from step to step."""
    apply, params = mf.functional(model)
    y = jax.nn.one_hot(labels, 10)

    @jax.jit
    def step(params, momenta, rate, x, y):
        def loss(params):
            return jnp.sum((apply(params, x) - y) ** 2) / (2 * BATCH_SIZE)

        value, slope = jax.value_and_grad(loss)(params)
        momenta = jax.tree.map(lambda m, g: 0.9 * m + g, momenta, slope)
        return jax.tree.map(lambda p, m: p - rate * m, params, momenta), momenta, value

    momenta, values = jax.tree.map(jnp.zeros_like, params), []
    rates = np.geomspace(1e-5, 10, 100)
    for count, rate in enumerate(rates):
        rows = slice(count % STEPS * BATCH_SIZE, (count % STEPS + 1) * BATCH_SIZE)
        params, momenta, value = step(params, momenta, rate, jnp.asarray(x[rows]), y[rows])
        values.append(float(value))
    smooth = np.convolve(np.nan_to_num(values, nan=np.inf, posinf=1e30), np.ones(5) / 5, "valid")
    return float(rates[4:][smooth.argmin()] / 10)


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
    for name in (*COLOR, *PEERS):
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
    return dict(case=case, rule=rule, target=target, **values, holds=bool(ratio <= WORST))


def finite(value: float) -> float | None:
    """For JSON."""
    return float(value) if np.isfinite(value) else None


def markdown(rows: list[dict]) -> str:
    """The table, for the terminal."""
    lines = [
        "| network | loss | rate by | rate | steps | / best of the grid | within 1.6 |",
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
        print(markdown(rows[-len(COLOR) - len(PEERS) - 1 :]), file=sys.stderr, flush=True)
    write_rows("time_to_loss", rows)
    targets = {row["case"]: row["target"] for row in rows}
    picture(found, targets).savefig(RESULTS / "time_to_loss.png", dpi=120)
    print(markdown(rows))
    ratios = {
        name: [
            np.inf if row["ratio"] is None else row["ratio"] for row in rows if row["rule"] == name
        ]
        for name in (*COLOR, *PEERS)
    }
    medians = {name: float(np.median(values)) for name, values in ratios.items()}
    print({name: f"median {medians[name]:.2f}, worst {max(ratios[name]):.2f}" for name in ratios})
    ours = medians[PREDICTED]
    beaten = all(ours < medians[name] for name in (RANGE_TEST, *PEERS))
    return 0 if ours <= TYPICAL and max(ratios[PREDICTED]) <= WORST and beaten else 1


if __name__ == "__main__":
    raise SystemExit(main())
