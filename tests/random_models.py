"""Models of every kind that users write, drawn at random: for the measurement to be right on.

A model maps one kind of inputs to a vector of six numbers a sample through a few random blocks and
ends in one of several heads. All sizes are the same, so that operations are compiled once.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

WIDTH, NUM_SAMPLES, NUM_WORDS, LENGTH = 6, 7, 5, 3


def rounded(left, right, dims, precision=None, **options):
    """A user's own product: weights rounded, gradients straight through."""
    near = right + jax.lax.stop_gradient(jnp.round(4 * right) / 4 - right)
    return jax.lax.dot_general(left, near, dims, precision=precision)


class Linear(nnx.Module):
    def __init__(self, rngs, **options):
        self.layer = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **options)

    def __call__(self, h):
        return jnp.tanh(self.layer(h))


class OwnProduct(Linear):
    def __init__(self, rngs):
        super().__init__(rngs, dot_general=rounded)


class Tied(Linear):
    def __call__(self, h):
        return jnp.tanh(self.layer(h)) @ self.layer.kernel[...].T


class UsedTwice(Linear):
    def __call__(self, h):
        return self.layer(super().__call__(h))


class SharedParam(nnx.Module):
    def __init__(self, rngs):
        self.one = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.two = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.two.kernel = self.one.kernel

    def __call__(self, h):
        return self.two(jnp.tanh(self.one(h)))


class MaskedLinear(nnx.Linear):
    """Pruned: the mask is a constant, or a parameter."""

    learned = False

    def __init__(self, rngs):
        super().__init__(WIDTH, WIDTH, rngs=rngs)
        mask = jax.random.bernoulli(rngs.params(), 0.6, (WIDTH, WIDTH)).astype(jnp.float32)
        self.mask = nnx.Param(mask + 0.5) if self.learned else nnx.Variable(mask)

    def __call__(self, h):
        kernel = self.kernel[...] * self.mask[...]
        return jnp.tanh(self.dot_general(h, kernel, (((h.ndim - 1,), (0,)), ((), ()))))


class LearnedMask(MaskedLinear):
    learned = True


class Constant(Linear):
    """A frozen layer: its arrays are no parameters."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.layer.kernel = nnx.Variable(self.layer.kernel[...])
        self.layer.bias = nnx.Variable(self.layer.bias[...])


class Stopped(Linear):
    """Frozen by stop_gradient, in half of its outputs."""

    def __call__(self, h):
        found = super().__call__(h)
        return jnp.where(jnp.arange(WIDTH) % 2 == 0, jax.lax.stop_gradient(found), found)


class Remat(Linear):
    def __call__(self, h):
        return h + nnx.remat(lambda layer, h: jnp.tanh(layer(h)))(self.layer, h)


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        self.layers = create(rngs)

    def __call__(self, h):
        h = h.astype(self.layers.kernel.dtype)

        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(h, layer):
            return jnp.tanh(layer(h))

        return through(h, self.layers)


class PerSample(Linear):
    """A user's own vmap over the samples."""

    def __call__(self, h):
        return jax.vmap(lambda one: jnp.tanh(self.layer(one)))(h)


class Convolution(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3,), rngs=rngs)
        self.out = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)

    def __call__(self, h):
        return self.out(jnp.tanh(self.conv(h[..., None])).reshape(len(h), -1))


class Recurrent(nnx.Module):
    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(2, WIDTH, rngs=rngs))

    def __call__(self, h):
        # Embed's outputs are float32 always, and a scan's carry keeps its dtype
        h = h.astype(jax.tree.leaves(nnx.state(self.rnn, nnx.Param))[0].dtype)
        carry = jnp.zeros((len(h), WIDTH), h.dtype)
        return self.rnn(h.reshape(len(h), LENGTH, 2), initial_carry=carry)[:, -1]


class Attention(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 2, 4, rngs=rngs, decode=False)

    def __call__(self, h):
        tokens = h.reshape(len(h), LENGTH, 2)
        return h + self.attention(tokens).reshape(h.shape)


class Normalized(Linear):
    def __init__(self, rngs, norm):
        super().__init__(rngs)
        self.norm = norm

    def __call__(self, h):
        return jnp.tanh(self.norm(self.layer(h)))


class Batch(Normalized):
    def __init__(self, rngs):
        super().__init__(rngs, nnx.BatchNorm(WIDTH, rngs=rngs))


class ZeroScale(Batch):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.norm.scale[...] = jnp.zeros(WIDTH)


class ByHand(Linear):
    """BatchNorm as one writes it down."""

    def __call__(self, h):
        z = self.layer(h)
        return jnp.tanh((z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-3))


class Dropped(Linear):
    def __init__(self, rngs):
        super().__init__(rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, h):
        return self.dropout(super().__call__(h))


class Low(nnx.Module):
    """Low-rank adaptation of a frozen layer."""

    def __init__(self, rngs):
        self.frozen = Constant(rngs)
        self.adapted = nnx.LoRA(WIDTH, 2, WIDTH, rngs=rngs)
        self.adapted.lora_b[...] += 0.3

    def __call__(self, h):
        return self.frozen(h) + self.adapted(h)


class Complex(nnx.Module):
    """Complex numbers inside."""

    def __init__(self, rngs):
        self.phase = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,), jnp.float32))

    def __call__(self, h):
        return jnp.real(h * jnp.exp(1j * self.phase[...]))


BLOCKS = {
    "linear": Linear,
    "own product": OwnProduct,
    "tied": Tied,
    "used twice": UsedTwice,
    "shared": SharedParam,
    "masked": MaskedLinear,
    "learned mask": LearnedMask,
    "constant": Constant,
    "stopped": Stopped,
    "remat": Remat,
    "scan": Scanned,
    "vmap": PerSample,
    "conv": Convolution,
    "rnn": Recurrent,
    "attention": Attention,
    "layer norm": lambda rngs: Normalized(rngs, nnx.LayerNorm(WIDTH, rngs=rngs)),
    "group norm": lambda rngs: Normalized(rngs, nnx.GroupNorm(WIDTH, num_groups=2, rngs=rngs)),
    "rms norm": lambda rngs: Normalized(rngs, nnx.RMSNorm(WIDTH, rngs=rngs)),
    "dropout": Dropped,
    "lora": Low,
    "complex": Complex,
    "batch norm": Batch,
    "zero scale": ZeroScale,
    "by hand": ByHand,
}
COUPLED = ("batch norm", "zero scale", "by hand")
"""Blocks that make samples depend on each other."""

HEADS = ("plain", "none", "scalar", "column", "tuple", "dict", "positions", "tied")
STEMS = ("vectors", "tokens", "masked tokens", "two arrays")


class Model(nnx.Module):
    """A stem, blocks and a head."""

    def __init__(self, stem: str, blocks: list[str], head: str, rngs):
        self.stem, self.head = stem, head
        self.embed = nnx.Embed(NUM_WORDS, WIDTH, rngs=rngs)
        self.blocks = nnx.List([BLOCKS[name](rngs) for name in blocks])
        outputs = dict(scalar=1, column=1, positions=2 * LENGTH).get(head, 3)
        self.out = nnx.Linear(WIDTH, outputs, rngs=rngs)

    def __call__(self, x, more=None):
        if self.stem == "tokens":
            h = self.embed(x).mean(1)
        elif self.stem == "masked tokens":
            words = self.embed(x)
            weights = more.astype(words.dtype)
            h = (words * weights[..., None]).sum(1) / weights.sum(1)[:, None]
        else:
            h = x if more is None else jnp.tanh(x) + more
        for block in self.blocks:
            h = block(h)
        if self.head == "none":
            return h
        if self.head == "tied":
            return h @ self.embed.embedding[...].T
        y = self.out(h)
        if self.head == "scalar":
            return y[:, 0]
        if self.head == "tuple":
            return h, y
        if self.head == "dict":
            return {"hidden": h, "logits": y}
        return y.reshape(len(y), LENGTH, 2) if self.head == "positions" else y


def inputs(stem: str, rng: np.random.Generator) -> Any:
    """A batch for a stem."""
    vectors = rng.normal(size=(NUM_SAMPLES, WIDTH))
    tokens = rng.integers(0, NUM_WORDS, (NUM_SAMPLES, LENGTH))
    if stem == "tokens":
        return jnp.asarray(tokens)
    if stem == "masked tokens":
        mask = rng.random((NUM_SAMPLES, LENGTH)) < 0.6
        mask[:, 0] = True
        return {"x": jnp.asarray(tokens), "more": jnp.asarray(mask)}
    if stem == "two arrays":
        return jnp.asarray(vectors), jnp.asarray(rng.normal(size=(NUM_SAMPLES, 1)))
    return jnp.asarray(vectors)


def draw(seed: int) -> tuple[list[str], str, str, np.random.Generator]:
    """The blocks, the stem and the head of one random model."""
    rng = np.random.default_rng(seed)
    blocks = [str(name) for name in rng.choice(list(BLOCKS), rng.integers(1, 4))]
    return blocks, str(rng.choice(STEMS)), str(rng.choice(HEADS)), rng
