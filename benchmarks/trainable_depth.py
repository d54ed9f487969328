"""How deep a network can be and still learn, against the depth scales of signal propagation.

Left: tanh networks without BatchNorm (width 100, bias_var 0.05) over weight_var and depth. Two
inputs' correlation moves to its fixed point as exp(-depth/xi_c); once it is there to rounding, a
network cannot tell them apart. Schoenholz et al. 2017 saw networks learn down to about 6 xi_c.
Right: networks with BatchNorm, weight_var 2, where the gradient's square grows by a factor a layer
(ReLU 1.467, tanh 1.178) and drives the largest eigenvalue, not the signal.

Heavy ball (momentum 0.9) on the squared loss, one-hot targets, 1000 MNIST images, batches of 100,
200 steps, two seeds, at half of the largest stable rate that theory gives each network. Accuracy on
the training images. Claim: without BatchNorm, the depth at which it falls below one half is 6 xi_c
to a factor of 2 wherever that is within the picture. Writes results/trainable_depth.json and .png,
exits with 1 where the claim is false. About six minutes on two cores.

Source: Schoenholz, Gilmer, Ganguli & Sohl-Dickstein 2017 (arXiv:1611.01232), figure 5; Yang et al.
2019 (arXiv:1902.08129) for the growth.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, write_rows
from matplotlib.figure import Figure

import meanfield_jax as mf
from meanfield_jax.variants import with_weight_var

WEIGHT_VARS = np.array([1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0])
BIAS_VAR = 0.05
DEPTHS = np.arange(10, 101, 10)
NORM_DEPTHS = np.array([5, 10, 15, 20, 30, 40, 60])
ACTIVATIONS = {"relu": "#0072B2", "tanh": "#D55E00"}
WIDTH, NUM_SAMPLES, BATCH_SIZE, EPOCHS = 100, 1000, 100, 20
SEEDS = np.arange(2)
SCALES = 6.0
"""How many xi_c deep a network still learns, as published."""
GOAL = 2.0
LEARNED = 0.5


def network_of(depth: int, activation: str, norm: mf.BatchNorm | None, **variances) -> mf.Network:
    """784, so many hidden layers, 10; the hidden ones as a scan."""
    after = (*([norm] if norm else []), mf.Activation(activation))
    block = (mf.Dense(WIDTH, **variances), *after)
    last = mf.Dense(10, **variances)
    return mf.Network((784,), (*block, mf.Repeat(mf.Sequential(block), depth - 1), last))


def depth_scale(weight_var: float) -> float:
    """xi_c of tanh without BatchNorm."""
    block = mf.Sequential((mf.Dense(WIDTH, weight_var, BIAS_VAR), mf.Activation("tanh")))
    with jax.enable_x64():
        return float(mf.fixed_point(block).depth_scales.xi_c)


def vanilla(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Accuracies, (depths, weight_vars), mean over seeds; what diverged counts as chance."""
    found = []
    for depth in DEPTHS.tolist():
        network = network_of(depth, "tanh", None, bias_var=BIAS_VAR)

        def rate(weight_var, network=network):
            changed = with_weight_var(network, weight_var)
            return mf.analyze(changed, num_samples=BATCH_SIZE).eta_max() / 2

        rates = jax.jit(jax.vmap(rate))(jnp.asarray(WEIGHT_VARS))
        found.append(
            learned(
                network,
                x,
                labels,
                learning_rate=rates[:, None],
                weight_var=WEIGHT_VARS[:, None],
            )
        )
        shown = " ".join(f"{value:.2f}" for value in found[-1])
        print(f"depth {depth}: {shown}", file=sys.stderr, flush=True)
    return np.array(found)


def learned(network: mf.Network, x: np.ndarray, labels: np.ndarray, **numbers) -> np.ndarray:
    """Accuracy on the training images at the end, mean over seeds."""
    data = (x, labels)
    run = mf.train(
        network, data, test=data, epochs=EPOCHS, batch_size=BATCH_SIZE, seed=SEEDS, **numbers
    )
    return np.nan_to_num(np.asarray(run.test_accuracy[..., -1]), nan=0.1).mean(-1)


def normalized(x: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """By activation: accuracies, (depths,)."""
    found = {}
    for activation in ACTIVATIONS:
        values = []
        for depth in NORM_DEPTHS.tolist():
            network = network_of(depth, activation, mf.BatchNorm())
            rate = 0.5 * mf.learning_rate(network, num_samples=BATCH_SIZE).quadratic
            rule = optax.sgd(rate, momentum=0.9)
            values.append(learned(network, x, labels, optimizer=rule))
        found[activation] = np.array(values)
        shown = " ".join(f"{value:.2f}" for value in values)
        print(f"{activation}: {shown}", file=sys.stderr, flush=True)
    return found


def failing_depth(accuracy: np.ndarray, depths: np.ndarray) -> float:
    """Where the accuracy first falls below one half, by linear interpolation; infinite: nowhere."""
    fails = accuracy < LEARNED
    if not fails.any():
        return float("inf")
    at = int(fails.argmax())
    if at == 0:
        return float(depths[0])
    part = (accuracy[at - 1] - LEARNED) / (accuracy[at - 1] - accuracy[at])
    return float(depths[at - 1] + part * (depths[at] - depths[at - 1]))


def rows_of(accuracy: np.ndarray) -> list[dict]:
    """A row for each weight_var."""
    rows = []
    for column, weight_var in enumerate(WEIGHT_VARS.tolist()):
        scale = SCALES * depth_scale(weight_var)
        depth = failing_depth(accuracy[:, column], DEPTHS)
        counts = bool(DEPTHS[0] < scale < DEPTHS[-1])
        holds = not counts or bool(scale / GOAL <= depth <= scale * GOAL)
        rows.append(
            dict(
                weight_var=weight_var,
                predicted=scale,
                failing_depth=depth if np.isfinite(depth) else None,
                within_picture=counts,
                holds=holds,
                accuracy=accuracy[:, column].tolist(),
            )
        )
    return rows


def picture(accuracy: np.ndarray, norms: dict[str, np.ndarray]) -> Figure:
    """Accuracy over weight_var and depth with 6 xi_c; beside it the normalized networks."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    mesh = left.pcolormesh(WEIGHT_VARS, DEPTHS, accuracy, vmin=0, vmax=1, cmap="cividis")
    figure.colorbar(mesh, ax=left, label="accuracy on the training images")
    fine = np.linspace(WEIGHT_VARS[0], WEIGHT_VARS[-1], 81)
    scale = [SCALES * depth_scale(value) for value in fine]
    left.plot(fine, scale, color="white", lw=2, label="6 xi_c (theory)")
    left.set(ylim=(DEPTHS[0] - 5, DEPTHS[-1] + 5), xlabel="weight_var", ylabel="hidden layers")
    left.set(title=f"tanh, no BatchNorm, bias_var {BIAS_VAR:g}")
    left.legend(loc="upper right", fontsize=8, labelcolor="white", frameon=False)
    for name, values in norms.items():
        color = ACTIVATIONS[name.partition(",")[0]]
        style = "o--" if "by layer" in name else "o-"
        right.plot(NORM_DEPTHS, values, style, color=color, mfc="white", label=name)
    for activation, color in ACTIVATIONS.items():
        growth = float(mf.batch_growth(activation, BATCH_SIZE))
        label = f"6 / log {growth:.3f}"
        right.axvline(SCALES / np.log(growth), color=color, lw=1, ls=":", label=label)
    right.set(ylim=(0, 1), xlabel="hidden layers", title="BatchNorm, weight_var 2")
    right.legend(fontsize=8, frameon=False)
    return figure


def main() -> int:
    """Trains all networks, writes JSON and the picture, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    x, labels = mf.data.load(
        "mnist", num_samples=NUM_SAMPLES, flatten=True, data_dir=options.data_dir
    )
    accuracy, norms = vanilla(x, labels), normalized(x, labels)
    rows = rows_of(accuracy)
    deep = {
        name: dict(depths=NORM_DEPTHS.tolist(), accuracy=v.tolist()) for name, v in norms.items()
    }
    write_rows("trainable_depth", rows, depths=DEPTHS.tolist(), batch_norm=deep)
    picture(accuracy, norms).savefig(RESULTS / "trainable_depth.png", dpi=120)
    print("| weight_var | 6 xi_c | fails at | within a factor of 2 |\n|---|---|---|---|")
    for row in rows:
        depth = "-" if row["failing_depth"] is None else f"{row['failing_depth']:.0f}"
        holds = ("yes" if row["holds"] else "no") if row["within_picture"] else "outside"
        print(f"| {row['weight_var']} | {row['predicted']:.1f} | {depth} | {holds} |")
    return 0 if all(row["holds"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
