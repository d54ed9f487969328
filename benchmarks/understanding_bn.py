"""What BatchNorm does to a deep network, without theory: the claims of Bjorck et al. 2018.

A residual convolutional network of 12 blocks, 16 channels, x + conv(relu(x)), each block with and
without BatchNorm before its ReLU, at Xavier's weight_var 1 (gain 1; both fans are equal in a
block), on 1024 images of the CIFAR-10 subset. Four claims:

a. Without BatchNorm activations grow with depth. At initialization the residual sum grows by
   1 + weight_var/2 = 1.5 a block in the theory of wide networks, with BatchNorm linearly; a plain
   network at the critical weight_var 2 does not grow, so this is a claim about residual networks
   (or about variances above the critical one). One step of SGD at rate .32 lets it explode.
b. BatchNorm lets larger rates train (cross-entropy of the last epoch below 2.2, chance is 2.303;
   heavy ball .9, batches of 64, 8 epochs, ten seeds), and with them it generalizes better (accuracy
   on the subset's other 1074 images, at the rate of the lowest training loss).
c. Without BatchNorm gradients at initialization have heavier tails, and nearly the same sign for
   every input. The batch's gradient is split by samples, see mf.diagnostics.input_dependence.
d. Squared singular values of products of Gaussian matrices have the moments of Fuss-Catalan.

Bars were set before the full run. An earlier one with three seeds, at the rates of the best test
accuracy, left it open whether BatchNorm generalizes better at its best rate than at the best rate
without it: .304 +- .019 against .276 +- .007, 1.4 standard errors, with the bar at 2; hence ten
seeds. With them it does by that rule (4.5), but not at the rate of the lowest training loss, which
is smaller (.9): it is beyond that rate that larger steps trade training loss for accuracy. Where no
rate trains every seed, the rate of the lowest mean loss counts (a rule made after a run; the one
before it, a rate below the grid, gave a ratio of 3160 instead of 100).

Writes results/understanding_bn.json and .png, exits with 1 where a claim is false. About twenty
minutes on two cores.

Source: Bjorck, Gomes, Selman & Weinberger 2018 (arXiv:1806.02375). Departure: the paper trains a
ResNet of 110 layers on all of CIFAR-10, for 165 epochs.
"""

import argparse
import sys

import jax
import numpy as np
import optax
import xarray as xr
from common import RESULTS, Claim, write_rows
from flax import nnx
from matplotlib.figure import Figure
from random_products import (
    fuss_catalan_moments,
    fuss_catalan_support,
    random_product_singular_values,
)

import meanfield_jax as mf

BLOCKS, CHANNELS = 12, 16
NUM_SAMPLES, BATCH_SIZE, EPOCHS = 1024, 64, 8
RATES = 10.0 ** np.arange(-3, 1.01, 0.5)
SEEDS, DRAWS = np.arange(10), 3
TRAINED = 2.2
LARGE_STEP = 10.0**-0.5
NUM_INPUTS, NUM_SPLIT, TAIL_SHARE = 128, 64, 0.05
DEPTHS, ORDERS, SIZE, PRODUCTS = (1, 2, 5), (1, 2, 3), 1000, 32
COLOR = {"no BatchNorm": "#D55E00", "BatchNorm": "#0072B2"}
LEGEND = dict(fontsize=8, edgecolor="none", framealpha=0.85)
LOSS = optax.softmax_cross_entropy_with_integer_labels
Images = tuple[np.ndarray, np.ndarray]


def network_of(norm: bool, *, residual: bool = True, weight_var: float = 1.0) -> mf.Network:
    """Three strided convolutions down to maps of 4x4, the blocks, the mean over positions."""
    before = (*([mf.BatchNorm()] if norm else []), mf.Activation("relu"))

    def conv(stride: int) -> mf.Conv:
        padding = "CIRCULAR" if stride == 1 else "SAME"
        return mf.Conv(CHANNELS, 3, stride, padding, weight_var=weight_var, bias_var=0.0)

    block = mf.Sequential((*before, conv(1)))
    body = mf.Repeat(mf.Residual(block) if residual else block, BLOCKS)
    stem = (conv(2), *before, conv(2), *before, conv(2))
    head = (*before, mf.GlobalMeanPool(), mf.Dense(10, weight_var=1.0, bias_var=0.0))
    return mf.Network((32, 32, 3), (*stem, body, *head))


NETWORKS = {"no BatchNorm": network_of(False), "BatchNorm": network_of(True)}
PLAIN = network_of(False, residual=False, weight_var=2.0)


def load(data_dir: str | None) -> tuple[Images, Images]:
    """Training and test images, both by the mean and deviation of the training images."""
    options = dict(standardize=False, data_dir=data_dir)
    x, labels = mf.data.load("cifar10", num_samples=NUM_SAMPLES, **options)
    x_test, labels_test = mf.data.load("cifar10", split="test", **options)
    mean, std = x.mean((0, 1, 2)), x.std((0, 1, 2))
    return ((x - mean) / std, labels), ((x_test - mean) / std, labels_test)


def variances(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """Of the activations behind each block, (blocks,)."""
    activations = mf.diagnostics.activations(model, x)
    last = {path.partition("]")[0]: path for path in activations if "block[" in path}
    return mf.diagnostics.moments(
        {path: activations[path] for path in last.values()}
    ).variance.values


def stepped(model: nnx.Module, data: Images) -> nnx.Module:
    """A copy after one step of SGD at the large rate."""
    copy, (x, labels) = nnx.clone(model), data
    slope = nnx.grad(lambda model: LOSS(model(x), labels).mean())(copy)
    params = nnx.state(copy, nnx.Param)
    nnx.update(copy, jax.tree.map(lambda p, g: p - LARGE_STEP * g, params, slope))
    return copy


def growth(data: Images) -> dict[str, np.ndarray]:
    """Variances by case, (draws, blocks)."""
    x, labels = data[0][:NUM_INPUTS], data[1][:NUM_INPUTS]
    found: dict[str, list[np.ndarray]] = {}
    for draw in range(DRAWS):
        for name, network in (*NETWORKS.items(), ("plain", PLAIN)):
            model = mf.build(network, rngs=nnx.Rngs(draw))
            found.setdefault(name, []).append(variances(model, x))
            if name in NETWORKS:
                after = variances(stepped(model, (x, labels)), x)
                found.setdefault(f"{name}, after a step", []).append(after)
    return {name: np.array(values) for name, values in found.items()}


def training(data: Images, test: Images) -> dict[str, xr.Dataset]:
    """Curves of all rates and seeds."""
    found = {}
    for name, network in NETWORKS.items():
        run = mf.train(
            network,
            data,
            test=test,
            learning_rate=RATES[:, None],
            seed=SEEDS,
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            loss="cross_entropy",
        )
        found[name] = run.to_xarray(("learning_rate", "seed"))
        shown = " ".join(
            f"{value:.2f}" for value in found[name].test_accuracy[..., -1].mean("seed")
        )
        print(f"{name}: {shown}", file=sys.stderr, flush=True)
    return found


def accuracies(run: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """On the test images, mean and standard error over seeds; what diverged counts as chance."""
    final = np.nan_to_num(run.test_accuracy.values[..., -1], nan=0.1)
    return final.mean(-1), final.std(-1, ddof=1) / np.sqrt(len(SEEDS))


def largest_rate(run: xr.Dataset) -> float:
    """At which every seed ends below the bar."""
    trained = (run.loss.values[..., -1] < TRAINED).all(-1)  # NaN is not
    return float(RATES[trained].max()) if trained.any() else 0.0


def lowest_loss(run: xr.Dataset) -> int:
    """Which rate has the lowest loss of the last epoch: test images have no say."""
    return int(np.nanargmin(run.loss.values[..., -1].mean(-1)))


def gradients(data: Images) -> dict[str, xr.Dataset]:
    """Tails and input dependence of the blocks' kernels, means over draws."""
    x, labels = data
    found = {}
    for name, network in NETWORKS.items():
        draws = []
        for draw in range(DRAWS):
            model = mf.build(network, rngs=nnx.Rngs(draw))
            every = mf.diagnostics.gradients(model, LOSS, x[:NUM_INPUTS], labels[:NUM_INPUTS])
            kernels = [path for path in every if "block" in path and path.endswith("kernel")]
            tails = mf.diagnostics.gradient_tails(
                {path: every[path] for path in kernels}, tail_share=TAIL_SHARE
            )
            split = mf.diagnostics.input_dependence(model, LOSS, x[:NUM_SPLIT], labels[:NUM_SPLIT])
            draws.append(tails.assign(ratio=split.ratio.sel(weight=kernels)))
        found[name] = xr.concat(draws, "draw").mean("draw")
    return found


def products() -> dict[int, np.ndarray]:
    """Squared singular values by depth, (products, size)."""
    keys = jax.random.split(jax.random.key(0), PRODUCTS)
    draw = random_product_singular_values
    return {
        depth: np.array([draw(key, depth, SIZE) for key in keys], np.float64) for depth in DEPTHS
    }


def moment_rows(squares: dict[int, np.ndarray]) -> list[dict]:
    """Measured over predicted moments with their standard errors."""
    rows = []
    for depth, values in squares.items():
        expected = fuss_catalan_moments(depth, ORDERS)
        for order, moment in zip(ORDERS, expected, strict=True):
            ratios = (values**order).mean(1) / moment
            error = ratios.std(ddof=1) / np.sqrt(len(ratios))
            rows.append(
                dict(
                    depth=depth,
                    order=order,
                    predicted=float(moment),
                    ratio=float(ratios.mean()),
                    standard_error=float(error),
                )
            )
    return rows


def claims_of(variance, runs, slopes, moments) -> list[Claim]:
    """Each claim with its number and the bar."""
    grown = {name: np.median(values[:, -1] / values[:, 0]) for name, values in variance.items()}
    jump = {
        name: np.median(variance[f"{name}, after a step"][:, -1] / variance[name][:, -1])
        for name in NETWORKS
    }
    (mean, error), (mean_norm, error_norm) = (accuracies(runs[name]) for name in NETWORKS)
    best, best_norm = (lowest_loss(runs[name]) for name in NETWORKS)
    better = (mean_norm[best_norm] - mean[best]) / np.hypot(error[best], error_norm[best_norm])

    def gain(low: int, high: int) -> float:
        """What BatchNorm gains from one rate to the other, in standard errors."""
        gained = mean_norm[high] - mean_norm[low]
        return gained / np.hypot(error_norm[low], error_norm[high])

    # where no rate trains every seed, the one of the lowest mean loss counts
    lowest = (RATES[best], RATES[best_norm])
    rates = [largest_rate(runs[name]) or low for name, low in zip(NETWORKS, lowest, strict=True)]
    off, on = (slopes[name].median() for name in NETWORKS)
    worst = max(abs(row["ratio"] - 1) for row in moments)
    entries = (
        ("a  growth over 12 blocks, no BatchNorm", grown["no BatchNorm"], BLOCKS, True),
        ("a  growth over 12 blocks, BatchNorm", grown["BatchNorm"], BLOCKS, False),
        ("a  growth over 12 blocks, plain at weight_var 2", grown["plain"], 2, False),
        ("a  growth by one large step, no BatchNorm", jump["no BatchNorm"], 1000, True),
        ("a  growth by one large step, BatchNorm", jump["BatchNorm"], 10, False),
        ("b  largest rate that trains, with over without", rates[1] / rates[0], 3, True),
        ("b  best accuracy, with less without, standard errors", better, 2, True),
        ("b  with: best rate less the other's, standard errors", gain(best, best_norm), 2, True),
        (
            "b  the same, rates of the best test accuracy, standard errors",
            gain(int(mean.argmax()), int(mean_norm.argmax())),
            2,
            True,
        ),
        ("c  kurtosis, without over with", off.kurtosis / on.kurtosis, 2, True),
        ("c  tail index, with over without", on.tail_index / off.tail_index, 1.2, True),
        ("c  |sum g| / sum |g|, no BatchNorm", off.ratio, 0.5, True),
        ("c  |sum g| / sum |g|, without over with", off.ratio / on.ratio, 3, True),
        ("d  worst of nine moments, relative", worst, 0.01, False),
    )
    return [Claim(text, float(value), bound, least) for text, value, bound, least in entries]


def picture(variance, runs, slopes, squares, moments) -> Figure:
    """Four panels, one a claim."""
    figure = Figure(figsize=(11, 8.6), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    _draw_growth(_pair(figure, grid[0, 0]), variance)
    _draw_training(figure.add_subplot(grid[0, 1]), runs)
    _draw_gradients(_pair(figure, grid[1, 0]), slopes)
    _draw_products(figure.add_subplot(grid[1, 1]), squares, moments)
    return figure


def _pair(figure: Figure, place):
    """Two axes, one above the other, over the blocks."""
    inner = place.subgridspec(2, 1, hspace=0.05)
    upper = figure.add_subplot(inner[0])
    lower = figure.add_subplot(inner[1], sharex=upper)
    upper.tick_params(labelbottom=False)
    lower.set(xlabel="block")
    return upper, lower


def _draw_growth(panels, variance) -> None:
    upper, lower = panels
    block = np.arange(1, BLOCKS + 1)
    for name, color in COLOR.items():
        upper.plot(block, np.median(variance[name], 0), "o-", color=color, label=name)
        after = np.median(variance[f"{name}, after a step"], 0)
        label = f"{name}, after one step at rate {LARGE_STEP:.2f}"
        lower.plot(block, after, "s--", color=color, mfc="white", label=label)
    start = np.median(variance["no BatchNorm"][:, 0])
    upper.plot(
        block, start * 1.5 ** (block - 1.0), ":", color="black", label="1.5 a block (theory)"
    )
    label = "not residual, critical weight_var 2"
    upper.plot(block, np.median(variance["plain"], 0), "-", color="#555555", label=label)
    upper.set_title("a. Variance of the activations over depth", loc="left")
    for axes in panels:
        axes.set(yscale="log", ylabel="variance")
        axes.legend(**LEGEND)
    upper.set_ylim(0.1, 3e3)  # room for the legend


def _draw_training(axes, runs) -> None:
    for name, color in COLOR.items():
        mean, error = accuracies(runs[name])
        axes.errorbar(RATES, mean, error, fmt="o-", color=color, mfc="white", capsize=3, label=name)
        failed = (runs[name].diverged_at.values >= 0).any(-1)
        axes.plot(RATES[failed], mean[failed], "x", color=color, ms=9)
        if rate := largest_rate(runs[name]):
            axes.axvline(
                rate, color=color, lw=1, ls=":", label=f"largest rate that trains: {rate:.2g}"
            )
    axes.axhline(0.1, color="#555555", lw=1, ls="--", label="chance (x: a seed diverged)")
    axes.set(xscale="log", xlabel="learning rate", ylabel="test accuracy", ylim=(0, None))
    axes.set_title(f"b. Accuracy on the CIFAR-10 subset after {EPOCHS} epochs", loc="left")
    axes.legend(**LEGEND)


def _draw_gradients(panels, slopes) -> None:
    upper, lower = panels
    block = np.arange(1, BLOCKS + 1)
    for name, color in COLOR.items():
        upper.plot(block, slopes[name].kurtosis, "o-", color=color, label=name)
        lower.plot(block, slopes[name].ratio, "o-", color=color)
    upper.axhline(3, color="#555555", lw=1, ls="--", label="Gaussian")
    lower.axhline(NUM_SPLIT**-0.5, color="#555555", lw=1, ls="--", label="unrelated inputs")
    upper.set(ylabel="kurtosis", ylim=(0, 1.4 * upper.get_ylim()[1]))
    lower.set(ylabel="|sum g| / sum |g|", ylim=(0, 1))
    upper.set_title("c. Gradients of the kernels at the start", loc="left")
    for axes in panels:
        axes.legend(ncols=3, **LEGEND)


def _draw_products(axes, squares, moments) -> None:
    shades = ("#009E73", "#CC79A7", "#E69F00")
    for (depth, values), color in zip(squares.items(), shades, strict=True):
        edge = fuss_catalan_support(depth)
        edges = np.linspace(0, 1.05 * edge, 60)
        density, _ = np.histogram(values, edges, density=True)
        ratios = " ".join(f"{row['ratio']:.3f}" for row in moments if row["depth"] == depth)
        label = f"product of {depth}, moments over theory {ratios}"
        axes.stairs(density, edges, color=color, lw=1.6, label=label)
        axes.axvline(edge, color=color, lw=1, ls=":")
    axes.set(yscale="log", xlabel="squared singular value", ylabel="density", ylim=(1e-4, None))
    axes.set_title(f"d. Products of Gaussian matrices, N = {SIZE}", loc="left")
    axes.plot([], [], ":", color="black", label="end of the support (theory)")
    axes.legend(**LEGEND)


def main() -> int:
    """Measures everything, writes JSON and the picture, prints the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    data, test = load(parser.parse_args().data_dir)
    variance, slopes, squares = growth(data), gradients(data), products()
    runs, moments = training(data, test), moment_rows(squares)
    claims = claims_of(variance, runs, slopes, moments)
    facts = dict(
        variance={name: np.median(values, 0).tolist() for name, values in variance.items()},
        rates=RATES.tolist(),
        training={name: runs_record(run) for name, run in runs.items()},
        gradients={name: gradients_record(slope) for name, slope in slopes.items()},
        moments=moments,
    )
    write_rows("understanding_bn", [claim.record() for claim in claims], **facts)
    picture(variance, runs, slopes, squares, moments).savefig(
        RESULTS / "understanding_bn.png", dpi=120
    )
    print("| claim | measured | bar | holds |\n|---|---|---|---|")
    for claim in claims:
        sign = ">=" if claim.at_least else "<="
        holds = "yes" if claim.holds else "no"
        print(f"| {claim.text} | {claim.value:.3g} | {sign} {claim.bound:g} | {holds} |")
    return 0 if all(claim.holds for claim in claims) else 1


def runs_record(run: xr.Dataset) -> dict:
    """By rate: test accuracy with its standard error, last training loss, divergence."""
    mean, error = accuracies(run)
    loss = run.loss.values[..., -1].mean(-1)
    return dict(
        test_accuracy=mean.tolist(),
        standard_error=error.tolist(),
        loss=[float(value) if np.isfinite(value) else None for value in loss],
        num_diverged=(run.diverged_at.values >= 0).sum(-1).tolist(),
        largest_rate=largest_rate(run),
        lowest_loss_rate=float(RATES[lowest_loss(run)]),
    )


def gradients_record(slope: xr.Dataset) -> dict:
    """By block."""
    return {name: slope[name].values.tolist() for name in ("kurtosis", "tail_index", "ratio")}


if __name__ == "__main__":
    raise SystemExit(main())
