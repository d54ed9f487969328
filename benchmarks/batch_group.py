"""BatchNorm's accuracy against the batch size, and what groups of channels change at both ends.

FC: MNIST, 784-64x3-10, 2048 training images, heavy ball .9, cross-entropy, as many epochs for every
batch size; three seeds, each norm and batch size at its own best learning rate (by training loss).
BatchGroupNorm with G groups of the 64 channels: G = 64 is BatchNorm, G = 1 pools LayerNorm's
statistics over the batch. Conv: CIFAR-10 subset at 16 x 16, 32x3 channels, stride 2, the same for
batches of 128 and more: there G may exceed the 32 channels, so that fewer values share statistics.
(Conv was added when FC, whose G ends at BatchNorm, had shown no gain at batch 1024.)

Claims, of Zhou et al. 2020 (arXiv:2012.02782): accuracy of BatchNorm is lower at batch 2 and at
batch 1024 than at its best size in between; the best G (by training loss) lifts both ends; the
best G grows with the batch size; G = C is bit-equal to BatchNorm, in training and in evaluation.
"Lower" and "lifts" mean by two standard errors of the difference.

Writes results/batch_group.json and .png; exits with 1 where a claim is false. About ten minutes
on two cores.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
from common import RESULTS, conclude, console, small_images, trained_at, write_rows
from flax import nnx
from matplotlib.figure import Figure
from rich.progress import track

import meanfield_jax as mf

WIDTH, CHANNELS, DEPTH = 64, 32, 3
NUM_TRAIN, NUM_TEST, NUM_IMAGES_TEST = 2048, 4096, 1074
BATCH_SIZES = (2, 4, 8, 32, 128, 512, 1024)
GROUPS = (1, 4, 16, WIDTH)
LARGE_SIZES, MANY_GROUPS = (128, 1024), (4, CHANNELS, 2 * CHANNELS, 4 * CHANNELS)
"""Of the convolutional network."""
RATES = np.array([0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
SEEDS = 3
EPOCHS = 8
COLORS = ("#D55E00", "#E69F00", "#0072B2")
"""Of all but BatchNorm, which is black."""
ERRORS = 2.0
"""Standard errors that a difference must exceed; fixed before the run."""


def connected(norm: mf.Layer) -> mf.Network:
    """The fully connected network with this norm."""
    return mf.mlp([WIDTH] * DEPTH, inputs=784, outputs=10, norm=norm, bias_var=0.0)


def convolutional(norm: mf.Layer) -> mf.Network:
    """The convolutional network with this norm."""
    channels = [CHANNELS] * DEPTH
    return mf.cnn(channels, inputs=(16, 16, 3), head="mean", norm=norm, bias_var=0.0)


def cell(network_of, groups: int, size: int, data, test) -> dict:
    """Training loss and test accuracy by seed, at the best rate."""
    norm = mf.BatchGroupNorm(num_groups=groups)
    options = dict(batch_size=size, epochs=EPOCHS)
    best, losses, everywhere = trained_at(network_of(norm), data, test, RATES, SEEDS, **options)
    accuracy = everywhere[best]
    return dict(
        network=network_of.__name__,
        groups=groups,
        batch_size=size,
        rate=float(RATES[best]),
        loss=float(losses[best]),
        accuracy=accuracy.tolist(),
        mean=float(accuracy.mean()),
        error=float(accuracy.std(ddof=1) / np.sqrt(SEEDS)),
    )


def bit_equal(data) -> bool:
    """Whether G = C and BatchNorm take the same 20 steps, and say the same in evaluation."""
    results = []
    for norm in (mf.BatchNorm(), mf.BatchGroupNorm(num_groups=WIDTH)):
        graph, params, rest = nnx.split(mf.build(connected(norm), rngs=nnx.Rngs(0)), nnx.Param, ...)

        def loss(params, rest, x, labels, graph=graph):
            model = nnx.merge(graph, params, rest, copy=True)
            chosen = jax.nn.log_softmax(model(x))[jnp.arange(len(x)), labels]
            return -chosen.mean(), nnx.split(model, nnx.Param, ...)[2]

        slope = jax.jit(jax.grad(loss, has_aux=True))
        for start in range(0, 20 * 32, 32):
            rows = slice(start, start + 32)
            gradient, rest = slope(params, rest, data[0][rows], data[1][rows])
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)
        model = nnx.merge(graph, params, rest)
        model.eval()
        results.append([*jax.tree.leaves((params, rest)), model(data[0])])
    return all(bool((a == b).all()) for a, b in zip(*results, strict=True))


def exceeds(a: dict, b: dict) -> tuple[bool, str]:
    """Whether a's accuracy is above b's by so many standard errors, and the numbers."""
    error = float(np.hypot(a["error"], b["error"]))
    shown = f"{a['mean']:.4f} - {b['mean']:.4f} = {(a['mean'] - b['mean']) / error:.1f} s.e."
    return a["mean"] - b["mean"] > ERRORS * error, shown


def best_of(cells: dict[tuple[int, int], dict], size: int) -> dict:
    """The number of groups with the smallest training loss at a batch size."""
    rows = [row for (_, at), row in cells.items() if at == size]
    return min(rows, key=lambda row: row["loss"])


def claims_of(cells: dict, conv: dict, equal: bool) -> list[dict]:
    """The statements, with their numbers; cells are by groups and batch size."""
    small, large = BATCH_SIZES[0], BATCH_SIZES[-1]
    ridge = max((cells[WIDTH, size] for size in BATCH_SIZES), key=lambda row: row["mean"])
    claims = []

    def claim(text: str, holds: bool, numbers: str) -> None:
        claims.append(dict(text=text, holds=bool(holds), numbers=numbers))

    for size in (small, large):
        holds, numbers = exceeds(ridge, cells[WIDTH, size])
        text = f"FC, BatchNorm: batch {ridge['batch_size']} is better than batch {size}"
        claim(text, holds, numbers)
    ends = [("FC", cells, WIDTH, small), ("FC", cells, WIDTH, large)]
    for name, found, channels, size in (*ends, ("conv", conv, CHANNELS, large)):
        best = best_of(found, size)
        holds, numbers = exceeds(best, found[channels, size])
        text = f"{name}, batch {size}: the best G, {best['groups']}, is better than BatchNorm"
        claim(text, holds, numbers)
    chosen = [best_of(cells, size)["groups"] for size in BATCH_SIZES]
    slope = np.polyfit(np.log(BATCH_SIZES), np.log(chosen), 1)[0]
    text = "FC: the best G grows with the batch size (slope of logarithms)"
    claim(text, slope > 0, f"{slope:.2f}: {chosen}")
    claim("G = C is bit-equal to BatchNorm", equal, str(equal))
    return claims


def picture(cells: dict, conv: dict) -> Figure:
    """Accuracy and loss over the batch size, a line for each number of groups."""
    figure = Figure(figsize=(14, 4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    panels = (
        (left, cells, BATCH_SIZES, WIDTH, "mean"),
        (middle, cells, BATCH_SIZES, WIDTH, "loss"),
        (right, conv, LARGE_SIZES, CHANNELS, "mean"),
    )
    for axes, found, sizes, channels, key in panels:
        colors = iter(COLORS)
        for groups in dict.fromkeys(groups for groups, _ in found):
            color = "#000000" if groups == channels else next(colors)
            rows = [found[groups, size] for size in sizes]
            name = f"G = {groups}" + (" (BatchNorm)" if groups == channels else "")
            errors = [row["error"] for row in rows] if key == "mean" else None
            style = dict(fmt="o-", color=color, capsize=3, mfc="white", label=name)
            axes.errorbar(sizes, [row[key] for row in rows], errors, **style)
        axes.set(xlabel="batch size", xscale="log", xticks=sizes)
        axes.set_xticklabels(map(str, sizes))
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    left.set(ylabel="test accuracy", title=f"FC, {EPOCHS} epochs of {NUM_TRAIN} MNIST images")
    middle.set(ylabel="training loss", yscale="log", title="the same at its best learning rate")
    right.set(ylabel="test accuracy", title=f"conv, {CHANNELS} channels, CIFAR-10 subset")
    for axes in (left, right):
        axes.legend(fontsize=8, frameon=False)
    return figure


def main() -> int:
    """Trains, writes the JSON and the picture, prints the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    data, test = (
        mf.data.load(
            "mnist", split=split, num_samples=count, data_dir=options.data_dir, flatten=True
        )
        for split, count in (("train", NUM_TRAIN), ("test", NUM_TEST))
    )
    equal = bit_equal(data)
    jobs = list(itertools.product(GROUPS, BATCH_SIZES))
    cells = {job: cell(connected, *job, data, test) for job in track(jobs, "FC", console=console)}
    data = small_images(options.data_dir, "train", NUM_TRAIN)
    test = small_images(options.data_dir, "test", NUM_IMAGES_TEST)
    jobs = list(itertools.product(MANY_GROUPS, LARGE_SIZES))
    conv = {
        job: cell(convolutional, *job, data, test) for job in track(jobs, "conv", console=console)
    }
    claims = claims_of(cells, conv, equal)
    rows = [*cells.values(), *conv.values()]
    write_rows("batch_group", rows, claims=claims)
    picture(cells, conv).savefig(RESULTS / "batch_group.png", dpi=120)
    for row in rows:
        name = f"{row['network']}, G = {row['groups']}, batch {row['batch_size']}"
        numbers = f"{row['mean']:.4f} +- {row['error']:.4f}, rate {row['rate']}"
        print(f"{name}: {numbers}, loss {row['loss']:.4f}")
    return conclude(claims)


if __name__ == "__main__":
    sys.exit(main())
