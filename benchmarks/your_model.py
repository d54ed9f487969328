"""lambda_max of Flax models, predicted from the model itself and measured on it.

The models of tests/flax_models.py, as their authors would write them, at a small width and at four
times that width, on real images of 8x8 pixels: the specification is read by ``Network.from_flax``,
its theory is that of these images, and the model, drawn with four seeds, is measured by Lanczos.
Beside it, networks of the specification are drawn (:func:`meanfield_jax.drawn_eigenvalues`), which
holds at any width if the specification is right. Goal: within 10 % at four times the width.

Run: python benchmarks/your_model.py   (about twenty minutes on two cores)
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import write_rows
from flax import nnx

import meanfield_jax as mf

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import flax_models

SEEDS, DRAWS = 4, 8
NUM_SAMPLES = 16
GOAL = 0.10
WIDTHS = 12, 48


def images(name: str) -> jax.Array:
    """Images of MNIST or CIFAR-10, averaged over squares so that their sides are 8."""
    x, _ = mf.data.load(name, num_samples=NUM_SAMPLES)
    x = jnp.asarray(x)
    x = x[:, 2:-2, 2:-2] if name == "mnist" else x
    size = x.shape[1] // 8
    x = x.reshape(len(x), 8, size, 8, size, -1).mean((2, 4))
    return (x - x.mean()) / x.std()


MODELS = {
    "MNIST CNN of Flax": (flax_models.MnistCNN, "mnist"),
    "ResNet v1 of Flax": (flax_models.ResNetV1, "cifar10"),
    "ResNet v2": (flax_models.ResNetV2, "cifar10"),
    "VGG": (flax_models.VGG, "cifar10"),
    "MobileNetV2 block": (flax_models.MobileNet, "cifar10"),
    "ConvNeXt block": (flax_models.ConvNeXtBlock, "cifar10"),
    "GroupNorm CNN": (flax_models.GroupNormCNN, "cifar10"),
    "U-Net encoder": (flax_models.UNetEncoder, "cifar10"),
    "DenseNet": (flax_models.DenseNet, "cifar10"),
    "Inception": (flax_models.Inception, "cifar10"),
    "gated CNN": (flax_models.GatedCNN, "cifar10"),
    "MLP-Mixer": (flax_models.MLPMixer, "cifar10"),
    "vision transformer": (flax_models.VisionTransformer, "cifar10"),
}


def measured(make, width: int, x: jax.Array, seed: int) -> float:
    """The largest eigenvalue of the model drawn with this seed, in training mode."""
    if issubclass(make, nnx.Module):
        op = mf.fisher_operator(make(nnx.Rngs(seed), width), x)
    else:
        model = make(width)
        op = mf.FisherOperator.from_linen(model, model.init(jax.random.key(seed), x), x)
    return float(mf.top_eigenvalues(op, k=1).eigenvalues[0])


def row(name: str, width: int) -> dict:
    """Prediction and measurements of one model."""
    make, data = MODELS[name]
    x = images(data)
    model = make(nnx.Rngs(0), width) if issubclass(make, nnx.Module) else make(width)
    network = mf.Network.from_flax(model, x)
    fisher = mf.analyze(network, data=x).fisher
    drawn = mf.drawn_eigenvalues(network, x, draws=DRAWS).raise_if_failed()
    found = [measured(make, width, x, seed) for seed in range(SEEDS)]
    return dict(
        model=name,
        width=width,
        predicted=float(fisher.lambda_max),
        drawn=drawn.eigenvalues[:, 0].tolist(),
        measured=found,
        drawn_ratio=float(drawn.eigenvalues[:, 0].mean()) / float(np.mean(found)),
        ratio=float(fisher.lambda_max) / float(np.mean(found)),
        standard_error=float(np.std(found, ddof=1) / np.sqrt(SEEDS) / np.mean(found)),
        within_domain=bool(fisher.within_domain),
    )


def main() -> int:
    """Prints one line for each model and width; returns 1 if a wide one misses the goal."""
    rows = []
    for name in MODELS:
        for width in WIDTHS:
            rows.append(row(name, width))
            jax.clear_caches()
            found = rows[-1]
            print(
                f"{name:20} width {width:3}: predicted / measured {found['ratio']:.3f}"
                f" +- {found['standard_error']:.3f}, drawn / measured {found['drawn_ratio']:.3f},"
                f" in its domain: {found['within_domain']}",
                flush=True,
            )
    write_rows("your_model", rows)
    wide = [found for found in rows if found["width"] == max(WIDTHS)]
    return int(any(abs(found["ratio"] - 1) > GOAL for found in wide))


if __name__ == "__main__":
    sys.exit(main())
