"""Models as Flax users write them, each small and written anew, with the specification of each."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import meanfield_jax as mf

RELU = mf.Activation("relu")
NORM = mf.BatchNorm()


def dense(width: int) -> mf.Dense:
    return mf.Dense(width, 1.0, 0.0)


def conv(width: int, kernel_size: int = 3, stride: int = 1, **options) -> mf.Conv:
    return mf.Conv(width, kernel_size, stride, weight_var=1.0, bias_var=0.0, **options)


def bare(width: int, kernel_size: int = 3, stride: int = 1, **options) -> mf.Conv:
    return conv(width, kernel_size, stride, use_bias=False, **options)


class MnistCNN(nn.Module):
    """Flax's example for MNIST."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        for factor in (1, 2):
            x = nn.relu(nn.Conv(factor * self.width, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Dense(8 * self.width)(x.reshape((x.shape[0], -1))))
        return nn.Dense(10)(x)


def mnist_cnn(w: int = 8) -> mf.Network:
    pool = mf.AvgPool()
    body = (conv(w), RELU, pool, conv(2 * w), RELU, pool, mf.Flatten(), dense(8 * w), RELU)
    return mf.Network((8, 8, 1), (*body, dense(10)))


class ResNetV1(nn.Module):
    """Flax's example for ImageNet: ReLU after the sum, projections, the last gamma of a block."""

    width: int = 8
    last_gamma: float = 1.0

    @nn.compact
    def __call__(self, x, train: bool = True):
        def norm(x, **options):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9, **options)(x)

        x = nn.Conv(self.width, (3, 3), padding=[(1, 1), (1, 1)], use_bias=False)(x)
        x = nn.max_pool(nn.relu(norm(x)), (3, 3), strides=(2, 2), padding="SAME")
        for factor, stride in ((1, 1), (2, 2)):
            width = factor * self.width
            y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
            y = nn.Conv(width, (3, 3), use_bias=False)(nn.relu(norm(y)))
            y = norm(y, scale_init=nn.initializers.constant(self.last_gamma))
            if x.shape != y.shape:
                x = norm(nn.Conv(width, (1, 1), (stride, stride), use_bias=False)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def resnet_v1(w: int = 8, last_gamma: float = 1.0) -> mf.Network:
    def branch(width: int, stride: int) -> mf.Sequential:
        last = mf.BatchNorm(last_gamma)
        return mf.Sequential((bare(width, 3, stride), NORM, RELU, bare(width), last))

    stem = (bare(w, padding=1), NORM, mf.MaxPool(3, 2, "SAME"), RELU)
    second = mf.Residual(branch(2 * w, 2), mf.Sequential((bare(2 * w, 1, 2), NORM)))
    blocks = (mf.Residual(branch(w, 1)), RELU, second, RELU)
    return mf.Network((8, 8, 3), (*stem, *blocks, mf.GlobalMeanPool(), dense(10)))


class PreActivationBlock(nnx.Module):
    def __init__(self, width, out, stride, rngs):
        options = dict(use_bias=False, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size in (width, out)])
        self.first = nnx.Conv(width, out, (3, 3), strides=stride, **options)
        self.second = nnx.Conv(out, out, (3, 3), **options)
        shortcut = nnx.Conv(width, out, (1, 1), strides=stride, **options)
        self.shortcut = shortcut if stride > 1 else None

    def __call__(self, x):
        y = nnx.relu(self.norms[0](x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        return shortcut + self.second(nnx.relu(self.norms[1](self.first(y))))


class ResNetV2(nnx.Module):
    def __init__(self, rngs, width=8):
        self.stem = nnx.Conv(3, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List(
            [
                PreActivationBlock(width, width, 1, rngs),
                PreActivationBlock(width, 2 * width, 2, rngs),
            ]
        )
        self.norm = nnx.BatchNorm(2 * width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(2 * width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(nnx.relu(self.norm(x)).mean((1, 2))))


def resnet_v2(w: int = 8) -> mf.Network:
    def branch(width: int, stride: int) -> mf.Sequential:
        return mf.Sequential((bare(width, 3, stride), NORM, RELU, bare(width)))

    first = mf.Residual(mf.Sequential((NORM, RELU, *branch(w, 1).layers)))
    second = mf.Residual(branch(2 * w, 2), mf.Sequential((bare(2 * w, 1, 2),)))
    head = (NORM, RELU, mf.GlobalMeanPool(), mf.Dropout(0.1), dense(10))
    return mf.Network((8, 8, 3), (conv(w), first, NORM, RELU, second, *head))


class VGG(nnx.Module):
    def __init__(self, rngs, width=8):
        sizes = 3, width, width, 2 * width, 2 * width
        self.convs = nnx.List(
            [nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(sizes)]
        )
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size in sizes[1:]])
        self.dense = nnx.Linear(4 * sizes[-1], 4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x):
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = nnx.relu(norm(conv(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2)) if index % 2 else x
        return self.head(nnx.relu(self.dense(x.reshape(x.shape[0], -1))))


def vgg(w: int = 8) -> mf.Network:
    pool, widths = mf.MaxPool(), (w, w, 2 * w, 2 * w)
    layers = [
        part
        for index, width in enumerate(widths)
        for part in (conv(width), NORM, *([pool] if index % 2 else []), RELU)
    ]
    return mf.Network((8, 8, 3), (*layers, mf.Flatten(), dense(4 * w), RELU, dense(10)))


class MobileNet(nnx.Module):
    """Inverted bottlenecks with a depthwise convolution and ReLU6, as in MobileNetV2."""

    def __init__(self, rngs, width=8):
        def conv(a, b, side, groups=1):
            options = dict(use_bias=False, feature_group_count=groups, rngs=rngs)
            return nnx.Conv(a, b, (side, side), **options)

        wide = 4 * width
        self.stem = conv(3, width, 3)
        self.convs = nnx.List(
            [conv(width, wide, 1), conv(wide, wide, 3, wide), conv(wide, width, 1)]
        )
        self.norms = nnx.List(
            [nnx.BatchNorm(size, rngs=rngs) for size in (width, wide, wide, width)]
        )
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu6(self.norms[0](self.stem(x)))
        y = jax.nn.relu6(self.norms[1](self.convs[0](x)))
        y = jax.nn.relu6(self.norms[2](self.convs[1](y)))
        x = x + self.norms[3](self.convs[2](y))
        return self.head(x.mean(axis=(1, 2)))


def mobile_net(w: int = 8) -> mf.Network:
    relu6, wide = mf.Activation("relu6"), 4 * w
    depthwise = bare(wide, groups=wide)
    branch = (bare(wide, 1), NORM, relu6, depthwise, NORM, relu6, bare(w, 1), NORM)
    body = (bare(w), NORM, relu6, mf.Residual(mf.Sequential(branch)), mf.GlobalMeanPool())
    return mf.Network((8, 8, 3), (*body, dense(10)))


class ConvNeXtBlock(nnx.Module):
    """A block of ConvNeXt: depthwise convolution, LayerNorm of channels, LayerScale."""

    def __init__(self, rngs, width=8):
        self.stem = nnx.Conv(3, width, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.spatial = nnx.Conv(width, width, (3, 3), feature_group_count=width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.wide = nnx.Conv(width, 4 * width, (1, 1), rngs=rngs)
        self.narrow = nnx.Conv(4 * width, width, (1, 1), rngs=rngs)
        self.gamma = nnx.Param(jnp.full((width,), 0.5))
        self.head = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        y = self.narrow(nnx.gelu(self.wide(self.norm(self.spatial(x)))))
        x = x + self.gamma[...][None, None, None] * y
        return self.head(jnp.mean(x, axis=(1, 2)))


def conv_next(w: int = 8) -> mf.Network:
    norm = mf.LayerNorm(eps=1e-6, over_positions=False)
    gelu = mf.Activation("gelu_tanh")
    branch = (conv(w, groups=w), norm, conv(4 * w, 1), gelu, conv(w, 1), mf.Scale(0.5))
    stem = conv(w, 2, 2, padding="VALID")
    body = (stem, mf.Residual(mf.Sequential(branch)), mf.GlobalMeanPool(), dense(10))
    return mf.Network((8, 8, 3), body)


class SkipInit(nn.Module):
    """A residual MLP with one trainable factor per branch and RMSNorm, He's initialization."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width)(x)
        for index in range(2):
            y = nn.tanh(nn.RMSNorm()(x))
            y = nn.Dense(self.width, kernel_init=nn.initializers.he_uniform())(y)
            x = x + self.param(f"alpha_{index}", nn.initializers.constant(0.3), ()) * y
        return nn.Dense(4)(x)


class SmallMLP(nnx.Module):
    """No convolution: LayerNorm, dropout, SiLU, a factor that is a constant."""

    def __init__(self, rngs, width=16):
        self.layers = nnx.List(
            [nnx.Linear(6, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)]
        )
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(2)])
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(width, 4, rngs=rngs)

    def __call__(self, x):
        x = self.dropout(nnx.silu(self.norms[0](self.layers[0](x))))
        x = x + 0.5 * self.layers[1](x)
        return self.head(nnx.silu(self.norms[1](x)))


def small_mlp(w: int = 16) -> mf.Network:
    norm, silu = mf.LayerNorm(eps=1e-6), mf.Activation("silu")
    branch = mf.Residual(mf.Sequential((dense(w), mf.Scale(0.5, "none"))))
    body = (dense(w), norm, silu, mf.Dropout(0.2), branch, norm, silu, dense(4))
    return mf.Network((6,), body)


class GroupNormCNN(nn.Module):
    """GroupNorm, tanh, strides, a dilated convolution, circular padding."""

    width: int = 16

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (3, 3), (2, 2), padding="CIRCULAR")(x)
        x = nn.tanh(nn.GroupNorm(num_groups=4)(x))
        x = nn.Conv(self.width, (3, 3), kernel_dilation=2)(x)
        x = nn.tanh(nn.GroupNorm(num_groups=None, group_size=4)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def group_norm_cnn(w: int = 16) -> mf.Network:
    norm, tanh = mf.GroupNorm(num_groups=4, eps=1e-6), mf.Activation("tanh")
    body = (conv(w, 3, 2, padding="CIRCULAR"), norm, tanh, conv(w, dilation=2), norm, tanh)
    return mf.Network((8, 8, 3), (*body, mf.Flatten(), dense(10)))


class UNetEncoder(nn.Module):
    """The encoder of a U-Net: pairs of convolutions, InstanceNorm, leaky ReLU, max pooling."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        for level in range(2):
            for _ in range(2):
                x = nn.InstanceNorm()(nn.Conv(2**level * self.width, (3, 3))(x))
                x = nn.leaky_relu(x, 0.1)
            x = nn.max_pool(x, (2, 2), strides=(2, 2)) if level == 0 else x
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def unet_encoder(w: int = 8) -> mf.Network:
    norm, leaky = mf.InstanceNorm(eps=1e-6), mf.Activation("leaky_relu")
    levels = (conv(w), norm, leaky, conv(w), norm, mf.MaxPool(), leaky)
    levels += (conv(2 * w), norm, leaky, conv(2 * w), norm, leaky)
    return mf.Network((8, 8, 3), (*levels, mf.GlobalMeanPool(), dense(10)))


class DenseBlock(nnx.Module):
    """Every layer sees the outputs of all layers before it, side by side."""

    def __init__(self, width, growth, layers, rngs):
        self.norms, self.convs = nnx.List([]), nnx.List([])
        for _ in range(layers):
            self.norms.append(nnx.BatchNorm(width, rngs=rngs))
            self.convs.append(nnx.Conv(width, growth, (3, 3), use_bias=False, rngs=rngs))
            width += growth

    def __call__(self, x):
        features = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features.append(conv(nnx.relu(norm(jnp.concatenate(features, axis=-1)))))
        return jnp.concatenate(features, axis=-1)


class DenseNet(nnx.Module):
    """The DenseNet of CIFAR-10: dense blocks, and a transition that halves the map."""

    def __init__(self, rngs, width=8):
        widest = 3 * width
        self.stem = nnx.Conv(3, width, (3, 3), use_bias=False, rngs=rngs)
        self.blocks = nnx.List([DenseBlock(width, width, 2, rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(widest, rngs=rngs) for _ in range(2)])
        self.transition = nnx.Conv(widest, width, (1, 1), use_bias=False, rngs=rngs)
        self.head = nnx.Linear(widest, 10, rngs=rngs)

    def __call__(self, x):
        x = self.blocks[0](self.stem(x))
        x = self.transition(nnx.relu(self.norms[0](x)))
        x = self.blocks[1](nnx.avg_pool(x, (2, 2), strides=(2, 2)))
        return self.head(nnx.relu(self.norms[1](x)).mean((1, 2)))


def dense_net(w: int = 8) -> mf.Network:
    grown = mf.Concat((mf.Sequential(), mf.Sequential((NORM, RELU, bare(w)))))
    transition = NORM, RELU, bare(w, 1), mf.AvgPool()
    head = NORM, RELU, mf.GlobalMeanPool(), dense(10)
    return mf.Network((8, 8, 3), (bare(w), grown, grown, *transition, grown, grown, *head))


class Inception(nn.Module):
    """Branches of several window sizes side by side, each with BatchNorm and ReLU."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        def conv(x, width, side):
            x = nn.Conv(width, (side, side), use_bias=False)(x)
            return nn.relu(nn.BatchNorm(use_running_average=False)(x))

        x = conv(x, self.width, 3)
        for _ in range(2):
            narrow, wide = conv(x, 2 * self.width, 1), conv(conv(x, self.width, 1), self.width, 3)
            x = jnp.concatenate([narrow, wide], -1)
        return nn.Dense(10)(jnp.mean(x, (1, 2)))


def inception(w: int = 8) -> mf.Network:
    def unit(width: int, side: int) -> tuple[mf.Layer, ...]:
        return bare(width, side), NORM, RELU

    narrow, wide = mf.Sequential(unit(2 * w, 1)), mf.Sequential((*unit(w, 1), *unit(w, 3)))
    block = mf.Concat((narrow, wide))
    return mf.Network((8, 8, 3), (*unit(w, 3), block, block, mf.GlobalMeanPool(), dense(10)))


class GatedMLP(nnx.Module):
    """A residual block with SwiGLU, as in transformers, without the attention."""

    def __init__(self, rngs, width=16):
        def linear(a, b):
            return nnx.Linear(a, b, use_bias=False, rngs=rngs)

        self.embed, self.norm = linear(6, width), nnx.RMSNorm(width, rngs=rngs)
        self.value, self.gate = linear(width, 2 * width), linear(width, 2 * width)
        self.down, self.head = linear(2 * width, width), linear(width, 4)

    def __call__(self, x):
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.down(nnx.silu(self.gate(y)) * self.value(y))
        return self.head(x)


def gated_mlp(w: int = 16) -> mf.Network:
    def linear(width: int) -> mf.Dense:
        return mf.Dense(width, 1.0, 0.0, use_bias=False)

    gate = mf.Sequential((linear(2 * w), mf.Activation("silu")))
    product = mf.Product(gate, mf.Sequential((linear(2 * w),)))
    branch = mf.Residual(mf.Sequential((mf.RMSNorm(eps=1e-6), product, linear(w))))
    return mf.Network((6,), (linear(w), branch, linear(4)))


class GatedCNN(nn.Module):
    """Gated convolutions: the two factors are the halves of one convolution's channels."""

    width: int = 8

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.glu(nn.Conv(2 * self.width, (3, 3))(x))
        x = nn.Dense(2 * self.width)(x)
        x = x[..., : self.width] * nn.tanh(x[..., self.width :])
        return nn.Dense(10)(jnp.mean(x, axis=(1, 2)))


def gated_cnn(w: int = 8) -> mf.Network:
    def gated(size: int, activation: str) -> mf.Product:
        gate = mf.Sequential((conv(w, size), mf.Activation(activation)))
        return mf.Product(mf.Sequential((conv(w, size),)), gate)

    gates = gated(3, "sigmoid"), gated(3, "sigmoid"), gated(1, "tanh")
    return mf.Network((8, 8, 3), (*gates, mf.GlobalMeanPool(), dense(10)))


class MLPMixer(nn.Module):
    """MLP-Mixer as published: patches, token mixing, channel mixing."""

    width: int = 8
    blocks: int = 2

    @nn.compact
    def __call__(self, x):
        def mlp(x, hidden):
            return nn.Dense(x.shape[-1])(nn.gelu(nn.Dense(hidden)(x)))

        x = nn.Conv(self.width, (2, 2), strides=(2, 2))(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for _ in range(self.blocks):
            y = jnp.swapaxes(nn.LayerNorm()(x), 1, 2)
            x = x + jnp.swapaxes(mlp(y, 24), 1, 2)
            x = x + mlp(nn.LayerNorm()(x), 2 * self.width)
        x = jnp.mean(nn.LayerNorm()(x), axis=1)
        return nn.Dense(10)(x)


def mlp_mixer(w: int = 8, blocks: int = 2) -> mf.Network:
    norm, gelu = mf.LayerNorm(eps=1e-6, over_positions=False), mf.Activation("gelu_tanh")

    def mix(*positions: int) -> mf.MixPositions:
        return mf.MixPositions(positions, 1.0, 0.0)

    tokens = mf.Residual(mf.Sequential((norm, mix(24, 1), gelu, mix(4, 4))))
    channels = mf.Residual(mf.Sequential((norm, conv(2 * w, 1), gelu, conv(w, 1))))
    stem = conv(w, 2, 2)
    body = (stem, *(tokens, channels) * blocks, norm, mf.GlobalMeanPool(), dense(10))
    return mf.Network((8, 8, 3), body)


class VisionTransformer(nnx.Module):
    """Patches, learned positions, pre-norm blocks of attention and MLP, the mean over positions."""

    def __init__(self, rngs, width=16, heads=4):
        def linear(a, b):
            return nnx.Linear(a, b, rngs=rngs)

        self.patches = nnx.Conv(3, width, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, 16, width)))
        self.norms = nnx.List([nnx.LayerNorm(width, rngs=rngs) for _ in range(3)])
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.mlp = nnx.Sequential(linear(width, 4 * width), nnx.gelu, linear(4 * width, width))
        self.head = linear(width, 10)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.positions[...]
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x).mean(axis=1))


class LinenTransformer(nn.Module):
    """The same in Linen."""

    width: int = 16
    heads: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.width, (2, 2), strides=(2, 2), padding="VALID")(x)
        x = x.reshape(x.shape[0], -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 16, self.width))
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y)
        y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
        x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(10)(nn.LayerNorm()(x).mean(axis=1))


def vision_transformer(w: int = 16, heads: int = 4, positions: float = 0.0004) -> mf.Network:
    norm, gelu = mf.LayerNorm(eps=1e-6, over_positions=False), mf.Activation("gelu_tanh")
    attention = mf.Residual(mf.Sequential((norm, mf.SelfAttention(heads))))
    mlp = mf.Residual(mf.Sequential((norm, conv(4 * w, 1), gelu, conv(w, 1))))
    stem = conv(w, 2, 2, padding="VALID"), mf.Offset(positions)
    body = (*stem, attention, mlp, norm, mf.GlobalMeanPool(), dense(10))
    return mf.Network((8, 8, 3), body)


CASES = {
    "DenseNet": (lambda: DenseNet(nnx.Rngs(0)), dense_net),
    "Inception": (lambda: Inception(), inception),
    "GatedMLP": (lambda: GatedMLP(nnx.Rngs(0)), gated_mlp),
    "GatedCNN": (lambda: GatedCNN(), gated_cnn),
    "MLPMixer": (lambda: MLPMixer(), mlp_mixer),
    "MnistCNN": (lambda: MnistCNN(), mnist_cnn),
    "ResNetV1": (lambda: ResNetV1(), resnet_v1),
    "ResNetV2": (lambda: ResNetV2(nnx.Rngs(0)), resnet_v2),
    "VGG": (lambda: VGG(nnx.Rngs(0)), vgg),
    "MobileNet": (lambda: MobileNet(nnx.Rngs(0)), mobile_net),
    "ConvNeXt": (lambda: ConvNeXtBlock(nnx.Rngs(0)), conv_next),
    "SmallMLP": (lambda: SmallMLP(nnx.Rngs(0)), small_mlp),
    "GroupNormCNN": (lambda: GroupNormCNN(), group_norm_cnn),
    "UNetEncoder": (lambda: UNetEncoder(), unet_encoder),
}
"""A function that makes the model, and the function of its specification."""


class Attention(nnx.Module):
    """Attention to other inputs, or with another width, or of a sequence."""

    def __init__(self, kind, rngs):
        self.kind, features = kind, {"wide": 32}.get(kind)
        self.embed = nnx.Linear(6, 16, rngs=rngs)
        options = dict(qkv_features=features, decode=False, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, 16, **options)

    def __call__(self, x):
        x = self.embed(x if self.kind == "sequence" else x.reshape(x.shape[0], -1, 6))
        return x + self.attention(x, 2 * x if self.kind == "cross" else x)


class NormOfPositions(nn.Module):
    """A norm whose statistics run over the positions of each channel."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), (2, 2))(x).reshape(x.shape[0], -1, 8)
        x = nn.LayerNorm()(jnp.swapaxes(x, 1, 2))
        return nn.Dense(10)(x.mean(2))


class PartOfNorm(nn.Module):
    """Half of a norm's values."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.LayerNorm()(nn.Dense(8)(x))[:, :4])


class Stacked(nn.Module):
    """Two maps, one above the other."""

    @nn.compact
    def __call__(self, x):
        x = jnp.concatenate([nn.Conv(8, (3, 3))(x), nn.Conv(8, (3, 3))(x)], 1)
        return nn.Dense(10)(x.mean((1, 2)))


class UsedTwice(nnx.Module):
    """One layer's values in two branches, next to a third."""

    def __init__(self, rngs):
        self.first, self.second = (nnx.Linear(6, 6, rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(6, 4, rngs=rngs)

    def __call__(self, x):
        y = self.first(x)
        return self.head(x + y + self.second(nnx.relu(y)))


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 6, rngs=rngs)

    def __call__(self, x):
        return self.layer(nnx.relu(self.layer(x)))


class Factor(nnx.Module):
    """A factor that is none of a layer or of channels: by position, a function, or used twice."""

    def __init__(self, kind, rngs):
        self.kind = kind
        shape = {"position": (4, 1, 1), "sigmoid": (4,), "twice": (4,)}[kind]
        self.factor = nnx.Param(jnp.full(shape, 0.5))
        self.first = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.second = nnx.Conv(4, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        factor = self.factor[...]
        factor = nnx.sigmoid(factor) if self.kind == "sigmoid" else factor
        factor = jnp.expand_dims(factor, range(4 - factor.ndim))
        x = self.first(x) * factor
        y = self.second(x)
        return self.head((x + (y * factor if self.kind == "twice" else y)).mean((1, 2)))


class OwnLinear(nnx.Linear):
    """A subclass that does what its parent does."""

    def __call__(self, x):
        return super().__call__(x)


REFUSED = {
    "factor of positions": (
        lambda: Factor("position", nnx.Rngs(0)),
        (4, 4, 3),
        "factor=.*parameter outside",
    ),
    "function of a factor": (
        lambda: Factor("sigmoid", nnx.Rngs(0)),
        (4, 4, 3),
        "factor=.*parameter outside",
    ),
    "factor used twice": (lambda: Factor("twice", nnx.Rngs(0)), (4, 4, 3), "factor=.*used once"),
    **{
        f"{kind} attention": (lambda kind=kind: Attention(kind, nnx.Rngs(0)), shape, message)
        for kind, shape, message in (
            ("cross", (4, 4, 6), "attention=.*several arrays"),
            ("wide", (4, 4, 6), "attention.qkv_features=.*as many features as channels"),
            ("sequence", (5, 6), r"x.shape=\(2, 5, 6\): sequences"),
        )
    },
    "norm of positions": (lambda: NormOfPositions(), (8, 8, 3), "LayerNorm_0.*over positions"),
    "concatenated positions": (lambda: Stacked(), (8, 8, 3), "concatenation along axis 1"),
    "part of a norm": (lambda: PartOfNorm(), (6,), "LayerNorm_0.features=.*part of its values"),
    "branch used twice": (lambda: UsedTwice(nnx.Rngs(0)), (6,), "first=.*several branches go on"),
    "tied": (lambda: Tied(nnx.Rngs(0)), (6,), "layer=.*used twice"),
}
"""A model, the shape of one input, and what the message says."""
