"""Cross-iteration BatchNorm at batch 4: whose statistics are nearest to those of all images?

Left two panels: during training (heavy ball .9, cross-entropy) the mean and the variance that three
layers would use, against those of all training images at the same weights: BatchNorm (the batch's
own), the average over a window of 4 iterations as they were, and compensated for the change of the
weights. All three are read off the same run, at every norm, so that only the statistics differ.
CIFAR-10 subset, 16 x 16. Right: test accuracy of BatchNorm and cross-iteration BatchNorm at batch 4
and of BatchNorm at batch 64, after as many epochs, each at its own best rate (by training loss).
The fully connected network, whose statistics have no positions to average over, was added after a
first run had shown that BatchNorm does not suffer from a batch of 4 in the convolutional one.

Claims, of Yao et al. 2020 (arXiv:2002.05712, figures 1 and 4): at every learning rate the error is
ordered BatchNorm > window > compensated, of means and of variances; the window's error grows with
the learning rate; at batch 4 accuracy is nearer to BatchNorm's at batch 64 than BatchNorm's is.
Writes results/cross_iteration.json and .png; exits with 1 where a claim is false. About five
minutes on two cores.
"""

import argparse
import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, conclude, small_images, trained_at, write_rows
from flax import nnx
from matplotlib.figure import Figure

import meanfield_jax as mf
from meanfield_jax.layers.cross_iteration import CrossIterationBatchNormModule

CHANNELS, SHAPE = [16, 32, 64], (16, 16, 3)
NUM_TRAIN, NUM_TEST = 2048, 1000
BATCH, LARGE, WINDOW = 4, 64, 4
RATES = (0.003, 0.01, 0.03, 0.1)
MOMENTUM = 0.9
SKIPPED, CHECKPOINTS, BETWEEN = 40, 20, 10
"""Steps before the first checkpoint; checkpoints; steps between two."""
SEEDS = 3
ACCURACY_RATES = np.array([0.001, 0.003, 0.01, 0.03, 0.1])
EPOCHS = 10
NAMES = ("BatchNorm", "window", "compensated")
COLORS = dict(zip(NAMES, ("#0072B2", "#D55E00", "#009E73"), strict=True))


def convolutional(norm: mf.Layer) -> mf.Network:
    """Three convolutions of stride 2, the mean over positions, 10 outputs."""
    return mf.cnn(CHANNELS, inputs=SHAPE, head="mean", norm=norm, bias_var=0.0)


def connected(norm: mf.Layer) -> mf.Network:
    """Three fully connected layers: statistics of a batch of 4 are those of four numbers."""
    return mf.mlp([128] * 3, inputs=int(np.prod(SHAPE)), outputs=10, norm=norm, bias_var=0.0)


class Probe(CrossIterationBatchNormModule):
    """Keeps the statistics of the last call: the batch's own, and those that were used."""

    def statistics(self, x, z, mean, var):
        """As in the layer."""
        used = super().statistics(x, z, mean, var)
        self.own, self.used = nnx.Intermediate((mean, var)), nnx.Intermediate(used)
        return used


def probes(model: nnx.Module) -> list[Probe]:
    """The norms, first to last."""
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, Probe)]


def errors_of(rate: float, seed: int, x: jax.Array, labels: jax.Array) -> np.ndarray:
    """Errors along one run: (checkpoints, layers, 3 kinds, mean and variance)."""
    norm = mf.CrossIterationBatchNorm(window=WINDOW)
    model = mf.build(convolutional(norm), rngs=nnx.Rngs(seed))
    for _, module in nnx.iter_modules(model):
        if type(module) is CrossIterationBatchNormModule:
            module.__class__ = Probe
    model(x[:BATCH])  # makes the places of what is kept
    for module in probes(model):
        module.iterations[...] = jnp.zeros((), jnp.int32)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    optimizer = optax.sgd(rate, MOMENTUM)

    def forward(params, rest, rows):
        model = nnx.merge(graph, params, rest, copy=True)
        outputs = model(x[rows])
        loss = optax.softmax_cross_entropy_with_integer_labels(outputs, labels[rows]).mean()
        kept = [(module.own.get_value(), module.used.get_value()) for module in probes(model)]
        return loss, (nnx.split(model, nnx.Param, ...)[2], kept)

    def step(carry, rows):
        params, rest, memory = carry
        slope, (rest, kept) = jax.grad(forward, has_aux=True)(params, rest, rows)
        updates, memory = optimizer.update(slope, memory, params)
        return (optax.apply_updates(params, updates), rest, memory), kept

    @jax.jit
    def steps(carry, rows):
        return jax.lax.scan(step, carry, rows)

    @jax.jit
    def everything(params, rest):
        """Statistics of all images, each layer's inputs normalized by them."""
        model = nnx.merge(graph, params, rest, copy=True)
        for module in probes(model):
            module.iterations[...] = jnp.zeros((), jnp.int32)  # an empty window
        model(x)
        return [module.own.get_value() for module in probes(model)]

    rng = np.random.default_rng(seed)
    carry = (params, rest, optimizer.init(params))
    found = []
    for checkpoint in range(CHECKPOINTS):
        count = SKIPPED if checkpoint == 0 else BETWEEN
        rows = rng.integers(0, len(x), (count, BATCH))
        carry, _ = steps(carry, rows[:-WINDOW])
        kept = []
        for row in rows[-WINDOW:]:
            weights, memory = carry[:2]  # of this forward pass
            carry, one = steps(carry, row[None])
            kept.append(jax.tree.map(lambda leaf: np.asarray(leaf[0]), one))
        found.append(errors_at(kept, jax.tree.map(np.asarray, everything(weights, memory))))
    return np.array(found)


def errors_at(kept: list, full: list) -> np.ndarray:
    """(layers, 3 kinds, mean and variance) from the last calls, the newest last."""
    result = []
    for layer, (full_mean, full_var) in enumerate(full):
        own = [one[layer][0] for one in kept]
        window_mean = np.mean([mean for mean, _ in own], 0)
        second = np.mean([var + mean**2 for mean, var in own], 0)
        kinds = (own[-1], (window_mean, second - window_mean**2), kept[-1][layer][1])
        row = []
        for mean, var in kinds:
            used, everything = (mean[None], var[None]), (full_mean, full_var)
            error = mf.diagnostics.statistics_error(used, everything)
            row.append([float(error.mean), float(error.var)])
        result.append(row)
    return np.array(result)


def accuracies(network_of, data, test) -> dict[str, dict]:
    """Test accuracies of each norm at its best rate, by seed, and the rate."""
    cases = {
        f"BatchNorm, batch {BATCH}": (mf.BatchNorm(), BATCH),
        f"cross-iteration, batch {BATCH}": (mf.CrossIterationBatchNorm(window=WINDOW), BATCH),
        f"BatchNorm, batch {LARGE}": (mf.BatchNorm(), LARGE),
    }
    found = {}
    for name, (norm, size) in cases.items():
        options = dict(momentum=MOMENTUM, batch_size=size, epochs=EPOCHS)
        best, _, accuracy = trained_at(
            network_of(norm), data, test, ACCURACY_RATES, SEEDS, **options
        )
        values, everywhere = accuracy[best], accuracy.mean(-1)
        found[name] = dict(
            rate=float(ACCURACY_RATES[best]),
            accuracy=float(values.mean()),
            error=float(values.std(ddof=1) / np.sqrt(SEEDS)),
            by_seed=values.tolist(),
            by_rate=everywhere.tolist(),
        )
        shown = " ".join(f"{value:.3f}" for value in everywhere)
        print(f"{name}: {values.mean():.3f} at {found[name]['rate']}; {shown}", flush=True)
    return found


def claims_of(errors: np.ndarray, accuracy: dict[str, dict]) -> list[dict]:
    """Errors: (rates, 3 kinds, mean and variance)."""
    claims = []
    for column, what in enumerate(("means", "variances")):
        for row, rate in enumerate(RATES):
            values = errors[row, :, column]
            text = f"error of {what} at rate {rate}: BatchNorm > window > compensated"
            shown = " > ".join(f"{value:.3f}" for value in values)
            claims.append(dict(text=text, numbers=shown, holds=bool(np.all(np.diff(values) < 0))))
        grows = errors[:, 1, column]
        text = f"the uncompensated window's error of {what} grows with the learning rate"
        shown = " ".join(f"{value:.3f}" for value in grows)
        claims.append(dict(text=text, numbers=shown, holds=bool(grows[-1] > grows[0])))
    for name, cases in accuracy.items():
        small, cross, large = (case["accuracy"] for case in cases.values())
        text = f"{name}: at batch {BATCH} accuracy is nearer to that of BatchNorm at batch {LARGE}"
        shown = f"{small:.3f} (BN {BATCH}), {cross:.3f} (CBN {BATCH}), {large:.3f} (BN {LARGE})"
        claims.append(dict(text=text, numbers=shown, holds=abs(cross - large) < abs(small - large)))
    return claims


def picture(errors: np.ndarray, accuracy: dict[str, dict]) -> Figure:
    """Errors over the learning rate, and accuracies; errors are (rates, seeds, 3 kinds, 2)."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    *panels, right = figure.subplots(1, 3)
    for axes, column, what in zip(panels, (0, 1), ("mean", "variance"), strict=True):
        for kind, name in enumerate(NAMES):
            values = errors[:, :, kind, column]
            spread = values.std(1, ddof=1) / np.sqrt(SEEDS)
            style = dict(fmt="o-", color=COLORS[name], capsize=3, mfc="white", label=name)
            axes.errorbar(RATES, values.mean(1), spread, **style)
        axes.set(xscale="log", xlabel="learning rate", ylim=(0, None))
        axes.set(title=f"error of the {what} at batch {BATCH}")
        axes.grid(alpha=0.25)
    panels[0].set(ylabel="root mean square, in standard deviations")
    panels[1].set(ylabel="root mean square, relative")
    panels[0].legend(fontsize=8, frameon=False)
    for color, (name, cases) in zip(("black", "#CC79A7"), accuracy.items(), strict=True):
        for index, row in enumerate(cases.values()):
            right.plot([index] * SEEDS, row["by_seed"], "o", color=color, ms=3, alpha=0.5)
            label = name if index == 0 else None
            style = dict(fmt="s", color=color, capsize=4, label=label)
            right.errorbar(index, row["accuracy"], row["error"], **style)
    right.set_xticks(range(3), [case.replace(", ", "\n") for case in cases], fontsize=8)
    right.legend(fontsize=8, frameon=False)
    right.set(ylabel="test accuracy at the best rate", title=f"{EPOCHS} epochs, CIFAR-10 subset")
    right.set_xlim(-0.5, 2.5)
    right.grid(alpha=0.25, axis="y")
    return figure


def main() -> int:
    """Measures, writes the JSON and the picture, prints the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    data = small_images(options.data_dir, "train", NUM_TRAIN)
    test = small_images(options.data_dir, "test", NUM_TEST)
    errors = np.empty((len(RATES), SEEDS, CHECKPOINTS, len(CHANNELS), len(NAMES), 2))
    for (row, rate), seed in itertools.product(enumerate(RATES), range(SEEDS)):
        errors[row, seed] = errors_of(rate, seed, *data)
        shown = np.array2string(errors[row, seed].mean((0, 1)).T, precision=3)
        print(f"rate {rate}, seed {seed}: {shown}", file=sys.stderr, flush=True)
    by_seed = errors.mean((2, 3))
    flat = [(x.reshape(len(x), -1), labels) for x, labels in (data, test)]
    accuracy = {
        "convolutional": accuracies(convolutional, data, test),
        "fully connected": accuracies(connected, *flat),
    }
    claims = claims_of(by_seed.mean(1), accuracy)
    rows = [
        dict(
            rate=rate,
            statistics=name,
            mean=by_seed[row, :, kind, 0].tolist(),
            variance=by_seed[row, :, kind, 1].tolist(),
            by_layer=errors[row, :, :, :, kind].mean((0, 1)).tolist(),
        )
        for row, rate in enumerate(RATES)
        for kind, name in enumerate(NAMES)
    ]
    write_rows("cross_iteration", rows, accuracy=accuracy, claims=claims)
    picture(by_seed, accuracy).savefig(RESULTS / "cross_iteration.png", dpi=120)
    return conclude(claims)


if __name__ == "__main__":
    sys.exit(main())
