"""What the gate of instance-enhancement BatchNorm does: at the start, and against noise.

At the start, MNIST, FC 784-Wx3-10, n = 256, training mode: the ratio of BatchNorm's lambda_max to
the gated one's, by theory and measured on random draws, over the width W. In the limit of infinite
width it is 1/sigmoid(-1)^2 = 13.83, and so is that of eta_max = 2 (1 + momentum) / lambda_max.

Noise, CIFAR-10 subset at 16 x 16, conv 16-32-64, batches of 32, heavy ball .9, cross-entropy:
networks train with noise in the statistics of every norm, channel and step: the mean is off by s u
standard deviations and the standard deviation by a factor exp(s v), u and v standard normal. Each
norm and s at its best learning rate (by training loss), three seeds. Afterwards, with statistics of
batches of 256: how far noise of the same s moves the logits (root mean square over draws, each
logit against the mean over draws), absolutely and in standard deviations of the logits over images.

Claims, of Liang et al. 2020 (arXiv:1908.04008, section 4): theory gives the measured ratio within
three standard errors or 2 % at every width where it takes the largest eigenvalue for an outlier
(``within_domain``), and the largest width is within 10 % of 13.83; at every s > 0, training loss
rises less over that of s = 0, and logits move less, absolutely and relatively, with the gate than
without. (n was 64 in a first look, where theory says that no width up to 1024 is in its domain. In
a first run it took width 64 to be inside and was wrong, 17.4 against 13.5, which mended
``within_domain``.)

Departure: the paper's noise multiplies and shifts the output of BatchNorm by the same for all
samples; noise in the statistics is the same thing.

Writes results/instance_enhancement.json and .png; exits with 1 where a claim is false. About six
minutes on two cores.
"""

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RESULTS, conclude, small_images, write_rows
from flax import nnx
from matplotlib.figure import Figure

import meanfield_jax as mf
from meanfield_jax.layers.batch_norm import BatchNormModule
from meanfield_jax.layers.instance_enhancement import InstanceEnhancementModule

NORMS = {"BN": mf.BatchNorm(), "IEBN": mf.InstanceEnhancementBatchNorm()}
COLORS = {"BN": "#000000", "IEBN": "#0072B2"}
LIMIT = float(1 / jax.nn.sigmoid(-1.0) ** 2)
WIDTHS, DRAWS, NUM_SAMPLES = (64, 128, 256, 512, 1024, 2048), 6, 256
SCALES = (0.0, 0.2, 0.4, 0.8)
"""s, of the noise."""
RATES = np.array([0.003, 0.01, 0.03, 0.1, 0.3])
SEEDS, EPOCHS, BATCH, MOMENTUM = 3, 8, 32, 0.9
NUM_TRAIN, NUM_TEST, NUM_PROBED, NOISES = 2048, 1000, 256, 32
BARS = dict(errors=3.0, to_theory=0.02, to_limit=0.1)
"""Fixed before the run."""


def noisy(base: type[BatchNormModule]) -> type[BatchNormModule]:
    """The module with noise in its statistics: the one that was put there with ``disturb``."""

    class Noisy(base):
        def statistics(self, x):
            mean, var = super().statistics(x)
            shift, stretch = self.noise
            return mean + shift * jnp.sqrt(var + self.eps), var * jnp.exp(2 * stretch)

    return Noisy


NOISY = {base: noisy(base) for base in (BatchNormModule, InstanceEnhancementModule)}


def disturb(model: nnx.Module, key: jax.Array, scale: jax.Array | float) -> nnx.Module:
    """The model, with new noise in every norm."""
    for index, (_, module) in enumerate(nnx.iter_modules(model)):
        if type(module) in NOISY:
            module.__class__ = NOISY[type(module)]
        if type(module) in NOISY.values():
            size = (2, *module.mean[...].shape)
            drawn = jax.random.normal(jax.random.fold_in(key, index), size)
            module.noise = nnx.data(scale * drawn)
    return model


def largest(norm: mf.Layer, width: int, x: jax.Array, seed: int) -> float:
    """Lambda_max of one draw in training mode."""
    network = mf.mlp([width] * 3, inputs=784, outputs=10, norm=norm)
    model = mf.build(network, rngs=nnx.Rngs(seed))
    operator = mf.fisher_operator(model, x, statistics="batch")
    return float(mf.top_eigenvalues(operator, 1, tol=1e-4).eigenvalues[0])


def ratios(x: jax.Array) -> list[dict]:
    """Predicted and measured lambda_max of BN over that of IEBN, by width."""
    rows = []
    for width in WIDTHS:
        fishers = {
            name: mf.analyze(mf.mlp([width] * 3, inputs=784, outputs=10, norm=norm), data=x).fisher
            for name, norm in NORMS.items()
        }
        predicted = {name: float(fisher.lambda_max) for name, fisher in fishers.items()}
        measured = {
            name: np.array([largest(norm, width, x, seed) for seed in range(DRAWS)])
            for name, norm in NORMS.items()
        }
        drawn = measured["BN"] / measured["IEBN"]  # the same weights
        row = dict(
            width=width,
            outlier=all(bool(fisher.within_domain) for fisher in fishers.values()),
            predicted=predicted["BN"] / predicted["IEBN"],
            measured=float(drawn.mean()),
            error=float(drawn.std(ddof=1) / np.sqrt(DRAWS)),
            lambda_max={name: [predicted[name], *measured[name].tolist()] for name in NORMS},
        )
        shown = f"{row['measured']:.3f} +- {row['error']:.3f}"
        print(f"width {width}: predicted {row['predicted']:.3f}, measured {shown}", flush=True)
        rows.append(row)
    return rows


def network(norm: mf.Layer) -> mf.Network:
    """Three convolutions of stride 2, the mean over positions, 10 outputs."""
    return mf.cnn([16, 32, 64], inputs=(16, 16, 3), head="mean", norm=norm, bias_var=0.0)


def train(norm: mf.Layer, scale: float, data, test) -> dict[str, np.ndarray]:
    """Training runs at all rates and seeds, (rates, seeds) each."""
    x, labels = data
    graph = nnx.split(disturb(mf.build(network(norm), rngs=nnx.Rngs(0)), jax.random.key(0), 0.0))[0]

    def logits(params, rest, x, key, scale):
        model = disturb(nnx.merge(graph, params, rest, copy=True), key, scale)
        return model(x), nnx.split(model, nnx.Param, ...)[2]

    def loss(params, rest, rows, key):
        outputs, rest = logits(params, rest, x[rows], key, scale)
        losses = optax.softmax_cross_entropy_with_integer_labels(outputs, labels[rows])
        return losses.mean(), rest

    def run(rate, params, rest, orders, key):
        optimizer = optax.sgd(rate, MOMENTUM)

        def step(carry, rows):
            params, rest, memory, key = carry
            key, own = jax.random.split(key)
            (value, rest), slope = jax.value_and_grad(loss, has_aux=True)(params, rest, rows, own)
            updates, memory = optimizer.update(slope, memory, params)
            return (optax.apply_updates(params, updates), rest, memory, key), value

        start = (params, rest, optimizer.init(params), key)
        (params, rest, _, key), losses = jax.lax.scan(step, start, orders)

        def moved(key):
            return logits(params, rest, test[0][:NUM_PROBED], key, scale)[0]

        drawn = jax.lax.map(moved, jax.random.split(key, NOISES))
        spread = jnp.sqrt(drawn.var(0).mean())
        between = jnp.sqrt(drawn.mean(0).var(0).mean())
        clean = logits(params, rest, test[0], key, 0.0)[0]
        return dict(
            loss=losses[-(len(orders) // EPOCHS) :].mean(),
            moved=spread,
            relative=spread / between,
            accuracy=(clean.argmax(-1) == test[1]).mean(),
        )

    steps = len(x) // BATCH
    over_seeds = jax.vmap(run, (None, 0, 0, 0, 0))
    over_rates = jax.jit(jax.vmap(over_seeds, (0, None, None, None, None)))
    states, orders = [], []
    for seed in range(SEEDS):
        model = disturb(mf.build(network(norm), rngs=nnx.Rngs(seed)), jax.random.key(0), 0.0)
        states.append(nnx.split(model, nnx.Param, ...)[1:])
        rng = np.random.default_rng(seed)
        order = np.stack([rng.permutation(len(x))[: steps * BATCH] for _ in range(EPOCHS)])
        orders.append(order.reshape(EPOCHS * steps, BATCH))
    params, rest = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    keys = jax.random.split(jax.random.key(1), SEEDS)
    found = over_rates(jnp.asarray(RATES), params, rest, jnp.asarray(orders), keys)
    return jax.tree.map(np.asarray, found)


def noise_rows(data, test) -> list[dict]:
    """Each norm and s at its best rate: numbers by seed."""
    rows = []
    for name, norm in NORMS.items():
        for scale in SCALES:
            found = train(norm, scale, data, test)
            best = int(np.nan_to_num(found["loss"], nan=np.inf).mean(1).argmin())
            numbers = {key: values[best].tolist() for key, values in found.items()}
            row = dict(norm=name, scale=scale, rate=float(RATES[best]), **numbers)
            shown = ", ".join(f"{key} {np.mean(values):.3f}" for key, values in numbers.items())
            print(f"{name}, s = {scale}: rate {row['rate']}, {shown}", flush=True)
            rows.append(row)
    return rows


def claims_of(ratio_rows: list[dict], rows: list[dict]) -> list[dict]:
    """The statements, with their numbers."""
    claims = []

    def claim(text: str, holds: bool, numbers: str) -> None:
        claims.append(dict(text=text, holds=bool(holds), numbers=numbers))

    for row in ratio_rows:
        if not row["outlier"]:
            continue
        off = abs(row["predicted"] - row["measured"])
        bar = max(BARS["errors"] * row["error"], BARS["to_theory"] * row["measured"])
        numbers = f"{row['predicted']:.3f}, measured {row['measured']:.3f} +- {row['error']:.3f}"
        claim(f"width {row['width']}: lambda_max BN / IEBN as predicted", off <= bar, numbers)
    last = ratio_rows[-1]
    off = abs(last["measured"] / LIMIT - 1)
    text = f"width {last['width']}: within {BARS['to_limit']:.0%} of {LIMIT:.2f}"
    claim(text, off <= BARS["to_limit"], f"{last['measured']:.3f}")
    at = {(row["norm"], row["scale"]): row for row in rows}
    for scale in SCALES[1:]:
        rises = {
            name: np.mean(at[name, scale]["loss"]) - np.mean(at[name, 0.0]["loss"])
            for name in NORMS
        }
        text = f"s = {scale}: training loss rises less with IEBN"
        claim(text, rises["IEBN"] < rises["BN"], f"{rises['IEBN']:.3f}, BN {rises['BN']:.3f}")
        for key, how in (("moved", "absolutely"), ("relative", "relatively")):
            values = {name: np.mean(at[name, scale][key]) for name in NORMS}
            numbers = f"{values['IEBN']:.3f}, BN {values['BN']:.3f}"
            text = f"s = {scale}: logits move less with IEBN, {how}"
            claim(text, values["IEBN"] < values["BN"], numbers)
    return claims


def picture(ratio_rows: list[dict], rows: list[dict]) -> Figure:
    """The ratio over the width; loss, movement and accuracy over the noise."""
    figure = Figure(figsize=(14, 3.8), layout="constrained")
    first, *others = figure.subplots(1, 4)
    widths = [row["width"] for row in ratio_rows]
    first.axhline(LIMIT, color="gray", ls=":", label=f"1 / sigmoid(-1)² = {LIMIT:.2f}")
    inside = [row["predicted"] if row["outlier"] else np.nan for row in ratio_rows]
    first.plot(widths, inside, color="#D55E00", label="theory, where its domain is")
    values, errors = ([row[key] for row in ratio_rows] for key in ("measured", "error"))
    style = dict(fmt="o", color="black", mfc="white", capsize=3, label="measured")
    first.errorbar(widths, values, errors, **style)
    first.set(xscale="log", xlabel="width", xticks=widths)
    first.set_xticklabels(map(str, widths))
    first.minorticks_off()
    first.set(title="lambda_max, BN / IEBN (MNIST)", ylim=(None, LIMIT + 1.2))
    first.legend(fontsize=8, frameon=False)
    titles = dict(
        loss="training loss (CIFAR-10 subset)",
        relative="movement of logits / their std",
        accuracy="test accuracy without noise",
    )
    for axes, (key, title) in zip(others, titles.items(), strict=True):
        for name in NORMS:
            values = np.array([row[key] for row in rows if row["norm"] == name])
            error = values.std(1, ddof=1) / np.sqrt(SEEDS)
            style = dict(fmt="o-", color=COLORS[name], mfc="white", capsize=3, label=name)
            axes.errorbar(SCALES, values.mean(1), error, **style)
        axes.set(xlabel="noise s of the statistics", title=title)
    others[0].legend(fontsize=8, frameon=False)
    for axes in (first, *others):
        axes.grid(alpha=0.25)
        axes.title.set_size(10)
    return figure


def main() -> int:
    """Measures, writes the JSON and the picture, prints the claims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", help="folder with the images [$MEANFIELD_JAX_DATA]")
    options = parser.parse_args()
    images, _ = mf.data.load(
        "mnist", num_samples=NUM_SAMPLES, data_dir=options.data_dir, flatten=True
    )
    ratio_rows = ratios(jnp.asarray(images))
    data = small_images(options.data_dir, "train", NUM_TRAIN)
    rows = noise_rows(data, small_images(options.data_dir, "test", NUM_TEST))
    claims = claims_of(ratio_rows, rows)
    write_rows("instance_enhancement", rows, ratios=ratio_rows, claims=claims)
    picture(ratio_rows, rows).savefig(RESULTS / "instance_enhancement.png", dpi=120)
    return conclude(claims)


if __name__ == "__main__":
    sys.exit(main())
