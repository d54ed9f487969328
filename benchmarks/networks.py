"""The three networks of the benchmarks, with the same numbers in JAX and in PyTorch.

Weights and inputs are drawn by NumPy from a seed, so that every process has them without a file.
"""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

WEIGHT_VAR, BIAS_VAR = 2.0, 0.5
NUM_OUTPUTS = 10


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and its inputs.

    Attributes:
        title: What it is, in words.
        input_shape: Of one sample; (features,) or (height, width, channels).
        widths: Of the hidden layers; dense, or 3x3 convolutions with stride 2 for images.
        batch_norm: Whether a BatchNorm (gamma = 1) stands before every ReLU.
        num_samples: n.
    """

    title: str
    input_shape: tuple[int, ...]
    widths: tuple[int, ...]
    batch_norm: bool = False
    num_samples: int = 1000

    @property
    def convolutional(self) -> bool:
        """Whether the inputs are images."""
        return len(self.input_shape) == 3


CASES = {
    "A": Case("FC 784-1000x3-10 ReLU", (784,), (1000, 1000, 1000)),
    "C": Case("the same with BatchNorm in train mode", (784,), (1000, 1000, 1000), True),
    "B": Case("conv 30-60-90, 3x3, stride 2, on 32x32x3, ReLU", (32, 32, 3), (30, 60, 90)),
}


def kernel_shapes(case: Case) -> list[tuple[int, ...]]:
    """Shapes of the weights in the order of the layers: (in, out) or (height, width, in, out)."""
    sizes = (case.input_shape[-1], *case.widths)
    pairs = list(itertools.pairwise(sizes))
    if not case.convolutional:
        return [*pairs, (sizes[-1], NUM_OUTPUTS)]
    side = case.input_shape[0] // 2 ** len(case.widths)
    return [*((3, 3, *pair) for pair in pairs), (side * side * sizes[-1], NUM_OUTPUTS)]


def draw_weights(case: Case, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """Kernels ~ N(0, weight_var / fan_in) and biases ~ N(0, bias_var), float32."""
    rng = np.random.default_rng(seed)
    layers = []
    for shape in kernel_shapes(case):
        std = math.sqrt(WEIGHT_VAR / math.prod(shape[:-1]))
        kernel = std * rng.standard_normal(shape, dtype=np.float32)
        bias = math.sqrt(BIAS_VAR) * rng.standard_normal(shape[-1], dtype=np.float32)
        layers.append((kernel.astype(np.float32), bias.astype(np.float32)))
    return layers


def draw_inputs(case: Case, seed: int = 1) -> np.ndarray:
    """Standard normal inputs, (n, *input_shape), float32."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((case.num_samples, *case.input_shape), dtype=np.float32)


def jax_model(case: Case) -> Any:
    """The Flax network that ``mf.build`` makes, with the weights of :func:`draw_weights`."""
    from flax import nnx

    import meanfield_jax as mf

    options = dict(outputs=NUM_OUTPUTS, weight_var=WEIGHT_VAR, bias_var=BIAS_VAR)
    norm = mf.BatchNorm(gamma=1.0) if case.batch_norm else None
    if case.convolutional:
        shape = dict(kernel_size=3, stride=2, padding="SAME", head="flatten")
        net = mf.cnn(list(case.widths), inputs=case.input_shape, norm=norm, **shape, **options)
    else:
        net = mf.mlp(list(case.widths), inputs=case.input_shape[0], norm=norm, **options)
    model = mf.build(net, rngs=nnx.Rngs(0))
    _load(model, draw_weights(case))
    return model


def _load(model: Any, layers: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Writes kernels and biases into a Flax module, layer by layer."""
    import jax.numpy as jnp
    from flax import nnx

    state = nnx.state(model, nnx.Param)
    leaves = dict(nnx.to_flat_state(state))
    owners = sorted({path[:-1] for path in leaves if path[-1] == "kernel"}, key=_natural)
    for owner, (kernel, bias) in zip(owners, layers, strict=True):
        for name, value in (("kernel", kernel), ("bias", bias)):
            leaf = leaves[(*owner, name)]
            assert leaf[...].shape == value.shape, (owner, leaf[...].shape, value.shape)
            leaf[...] = jnp.asarray(value)
    nnx.update(model, state)


def _natural(path: tuple[Any, ...]) -> tuple[tuple[int, int, str], ...]:
    """Sorts 2 before 10, whether the parts are numbers or names."""
    return tuple((0, int(p), "") if str(p).isdigit() else (1, 0, str(p)) for p in path)


def torch_model(case: Case, *, running_statistics: bool = False) -> Any:
    """The same network in PyTorch, in train mode.

    Args:
        case: Which one.
        running_statistics: Whether BatchNorm has them (PyTorch's default). They are set to the
            statistics of the inputs. curvlinops' transformations refuse such a network in train
            mode, because it writes to its buffers.
    """
    import torch
    from torch import nn

    layers: list[Any] = []
    *hidden, (head, head_bias) = draw_weights(case)
    for kernel, bias in hidden:
        layers.extend(_torch_linear(kernel, bias))
        if case.batch_norm:
            norm = nn.BatchNorm2d if case.convolutional else nn.BatchNorm1d
            layers.append(norm(len(bias), momentum=1.0, track_running_stats=running_statistics))
        layers.append(nn.ReLU())
    if case.convolutional:
        layers.append(_flatten_channels_last())
    model = nn.Sequential(*layers, *_torch_linear(head, head_bias)).train()
    if running_statistics:
        with torch.no_grad():
            model(torch_inputs(case))
    return model


def torch_inputs(case: Case) -> Any:
    """The inputs as PyTorch wants them: channels first."""
    import torch

    inputs = torch.from_numpy(draw_inputs(case))
    return inputs.permute(0, 3, 1, 2).contiguous() if case.convolutional else inputs


def _torch_linear(kernel: np.ndarray, bias: np.ndarray) -> list[Any]:
    """A dense layer, or XLA's "SAME" padding (for stride 2: one row below, right) and a conv."""
    import torch
    from torch import nn

    layers: list[Any]
    if kernel.ndim == 4:
        layer = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3, stride=2)
        layers = [nn.ZeroPad2d((0, 1, 0, 1)), layer]
        weight = kernel.transpose(3, 2, 0, 1)
    else:
        layer = nn.Linear(*kernel.shape)
        layers = [layer]
        weight = kernel.T
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight.copy()))
        layer.bias.copy_(torch.from_numpy(bias))
    return layers


def _flatten_channels_last() -> Any:
    """Flattens (n, channels, height, width) in the order height, width, channel."""
    from torch import nn

    class Flatten(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1).flatten(1)

    return Flatten()
