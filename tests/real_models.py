"""Architectures that people train, in Flax: their structure as published, their widths free."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx


class Block(nnx.Module):
    """A basic block of a ResNet: two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs, outputs, stride, rngs):
        def conv(channels, side, step):
            return nnx.Conv(
                channels, outputs, (side, side), strides=step, use_bias=False, rngs=rngs
            )

        self.one, self.two = conv(inputs, 3, stride), conv(outputs, 3, 1)
        self.norms = nnx.List([nnx.BatchNorm(outputs, rngs=rngs) for _ in range(2)])
        changed = stride != 1 or inputs != outputs
        parts = [conv(inputs, 1, stride), nnx.BatchNorm(outputs, rngs=rngs)] if changed else []
        self.shortcut = nnx.List(parts)

    def __call__(self, x):
        h = nnx.relu(self.norms[0](self.one(x)))
        h = self.norms[1](self.two(h))
        for part in self.shortcut:
            x = part(x)
        return nnx.relu(h + x)


class ResNet18(nnx.Module):
    """He et al. 2016 (arXiv:1512.03385), with the 3x3 stem for images of 32x32."""

    def __init__(self, rngs, width=64, classes=10):
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        widths = [width, *(width * 2**stage for stage in range(4) for _ in range(2))]
        strides = [1, 1, 2, 1, 2, 1, 2, 1]
        self.blocks = nnx.List(
            [
                Block(*pair, stride, rngs)
                for *pair, stride in zip(widths[:-1], widths[1:], strides, strict=True)
            ]
        )
        self.head = nnx.Linear(widths[-1], classes, rngs=rngs)

    def __call__(self, x):
        h = nnx.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            h = block(h)
        return self.head(h.mean((1, 2)))


class LinenBlock(nn.Module):
    """The same block in Linen."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x, train):
        def norm():
            return nn.BatchNorm(use_running_average=not train)

        h = nn.Conv(self.width, (3, 3), strides=self.stride, use_bias=False)(x)
        h = nn.Conv(self.width, (3, 3), use_bias=False)(nn.relu(norm()(h)))
        h = norm()(h)
        if x.shape != h.shape:
            x = norm()(nn.Conv(self.width, (1, 1), strides=self.stride, use_bias=False)(x))
        return nn.relu(x + h)


class LinenResNet18(nn.Module):
    """The same network in Linen."""

    width: int = 64
    classes: int = 10

    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        for stage in range(4):
            for index in range(2):
                stride = 2 if stage > 0 and index == 0 else 1
                x = LinenBlock(self.width * 2**stage, stride)(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))


class GRU(nnx.Module):
    """A recurrent classifier of sequences."""

    def __init__(self, rngs, inputs=3, width=8, classes=4):
        self.rnn = nnx.RNN(nnx.GRUCell(inputs, width, rngs=rngs))
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x)[:, -1])


class TransformerBlock(nnx.Module):
    """Pre-norm attention and perceptron, with dropout."""

    def __init__(self, width, heads, rngs):
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.attention = nnx.MultiHeadAttention(heads, width, dropout_rate=0.1, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, h, mask=None):
        h = h + self.attention(self.norms[0](h), mask=mask, decode=False)
        return h + self.dropout(self.down(nnx.gelu(self.up(self.norms[1](h)))))


class VisionTransformer(nnx.Module):
    """Dosovitskiy et al. 2021 (arXiv:2010.11929), small."""

    def __init__(self, rngs, side=8, patch=4, width=8, depth=2, classes=3):
        self.patches = nnx.Conv(3, width, (patch, patch), strides=patch, rngs=rngs)
        count = (side // patch) ** 2 + 1
        self.positions = nnx.Param(0.1 * jax.random.normal(rngs.params(), (count, width)))
        self.cls = nnx.Param(0.1 * jax.random.normal(rngs.params(), (width,)))
        self.blocks = nnx.List([TransformerBlock(width, 2, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x):
        h = self.patches(x).reshape(len(x), -1, self.cls.shape[0])
        first = jnp.broadcast_to(self.cls[...], (len(x), 1, h.shape[-1]))
        h = jnp.concatenate([first, h], 1) + self.positions[...][None]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)[:, 0])


class LanguageModel(nnx.Module):
    """Tokens and a mask of those that count to logits of the next one; the readout is tied."""

    def __init__(self, rngs, words=11, width=8, depth=1):
        self.embed = nnx.Embed(words, width, rngs=rngs)
        self.blocks = nnx.List([TransformerBlock(width, 2, rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens, mask):
        causal = nnx.make_causal_mask(tokens) * mask[:, None, None, :]
        h = self.embed(tokens)
        for block in self.blocks:
            h = block(h, causal)
        return self.norm(h) @ self.embed.embedding[...].T * mask[..., None]
