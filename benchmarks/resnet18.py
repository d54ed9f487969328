"""lambda_max of a ResNet-18 in training mode: time and peak memory, beside curvlinops.

11 million parameters, 3x3 stem, 512 Gaussian images of 32x32x3, 10 outputs, float32, the same
weights in Flax and in PyTorch (random, as Flax draws them). To 1e-3: this package stops by its own
error bound, the GGN of curvlinops is given to SciPy's ``eigsh`` with that tolerance. Each in a
process of its own.

Run: ``python resnet18.py [--num-samples 512]``. The exit status is 1 when a claim is false.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import Claim, Peer, compare
from summary import finish

MODELS = str(Path(__file__).parents[1] / "tests")
NUM_OUTPUTS = 10


def _images(num_samples: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num_samples, 32, 32, 3), dtype=np.float32)


def _flax_model() -> Any:
    from flax import nnx

    sys.path.insert(0, MODELS)
    import real_models

    return real_models.ResNet18(nnx.Rngs(0))


def meanfield(num_samples: int) -> Any:
    """This package."""
    import meanfield_jax as mf

    model, x = _flax_model(), _images(num_samples)

    def solve() -> dict[str, Any]:
        operator = mf.fisher_operator(model, x)
        found = mf.top_eigenvalues(operator, tol=1e-3).raise_if_failed()
        return dict(value=float(found.eigenvalues[0]), products=int(found.num_matvecs))

    return solve


def _torch_model() -> Any:
    """The same network, with the Flax model's weights."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.one = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.two = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            norm = {"track_running_stats": False}
            self.norms = nn.ModuleList([nn.BatchNorm2d(outputs, **norm) for _ in range(2)])
            self.shortcut = nn.Sequential()
            if stride != 1 or inputs != outputs:
                conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(outputs, **norm))
            self.stride = stride

        def forward(self, x: Any) -> Any:
            # Flax's SAME pads below and to the right where the stride is 2
            padded = nn.functional.pad(x, (0, 1, 0, 1)) if self.stride == 2 else x
            weight, pad = self.one.weight, 1 if self.stride == 1 else 0
            h = nn.functional.conv2d(padded, weight, stride=self.stride, padding=pad)
            h = self.norms[1](self.two(self.norms[0](h).relu()))
            return (h + self.shortcut(x)).relu()

    class ResNet18(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(64, track_running_stats=False)
            sizes, blocks = [64, 64, 64, 128, 128, 256, 256, 512, 512], []
            for index, (a, b) in enumerate(itertools.pairwise(sizes)):
                blocks.append(Block(a, b, 2 if index in (2, 4, 6) else 1))
            self.blocks = nn.ModuleList(blocks)
            self.head = nn.Linear(512, NUM_OUTPUTS)

        def forward(self, x: Any) -> Any:
            h = self.norm(self.stem(x)).relu()
            for block in self.blocks:
                h = block(h)
            return self.head(h.mean((2, 3)))

    theirs, ours = ResNet18(), _flax_model()

    def copy(to: Any, array: Any, axes: tuple[int, ...]) -> None:
        with torch.no_grad():
            to.copy_(torch.from_numpy(np.array(array).transpose(axes)))

    pairs = [(theirs.stem, ours.stem)]
    for a, b in zip(theirs.blocks, ours.blocks, strict=True):
        pairs += [(a.one, b.one), (a.two, b.two)]
        if len(a.shortcut):
            pairs.append((a.shortcut[0], b.shortcut[0]))
    for to, conv in pairs:
        copy(to.weight, conv.kernel[...], (3, 2, 0, 1))
    copy(theirs.head.weight, ours.head.kernel[...], (1, 0))
    copy(theirs.head.bias, ours.head.bias[...], (0,))
    return theirs


def curvlinops(num_samples: int) -> Any:
    """The GGN of curvlinops with SciPy's eigsh."""
    import torch
    from curvlinops import GGNLinearOperator
    from scipy.sparse.linalg import eigsh
    from torch import nn

    model = _torch_model()
    x = torch.from_numpy(_images(num_samples).transpose(0, 3, 1, 2).copy())
    targets = torch.zeros(num_samples, NUM_OUTPUTS)

    def solve() -> dict[str, Any]:
        params = list(model.parameters())
        options: dict[str, Any] = dict(check_deterministic=False, num_data=num_samples)
        loss = nn.MSELoss(reduction="mean")
        ggn = GGNLinearOperator(model, loss, params, [(x, targets)], **options)
        matrix = ggn.to_scipy(dtype=np.float32)
        start = np.random.default_rng(0).standard_normal(matrix.shape[0], dtype=np.float32)
        (value,) = eigsh(matrix, 1, which="LA", tol=1e-3, v0=start, return_eigenvectors=False)
        return dict(value=float(value) * NUM_OUTPUTS / 2)

    return solve


def main() -> int:
    """Measures, prints, writes results/resnet18.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=512)
    options = parser.parse_args()
    peers = [
        Peer("meanfield_jax", "resnet18:meanfield", timeout=3000),
        Peer("curvlinops GGN + eigsh", "resnet18:curvlinops", timeout=3000),
    ]
    compare(peers, dict(num_samples=options.num_samples), 0)  # a call takes many minutes
    ours, theirs = (peer.record() for peer in peers)
    apart = abs(ours["value"] / theirs["value"] - 1)
    claims = [
        Claim("peak memory, MB", ours["megabytes"], 6000, at_least=False),
        Claim("away from curvlinops", apart, 2e-3, at_least=False),
        Claim("curvlinops' time over ours, first calls", theirs["cold_ratio"], 1.0),
    ]
    record = dict(num_samples=options.num_samples, peers=[ours, theirs])
    return finish("resnet18", record, claims)


if __name__ == "__main__":
    sys.exit(main())
