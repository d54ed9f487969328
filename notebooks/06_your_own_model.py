# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model
#
# From a Flax model to its Fisher spectrum, its learning rate and a better gamma, and back into the
# model, which is then trained. The Fisher matrix F is the mean over inputs x of J(x)^T J(x), where
# J holds the derivatives of the outputs with respect to all parameters; its largest eigenvalue
# lambda_max says how large a step the squared loss can take.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import meanfield_jax as mf


class Block(nnx.Module):
    """A residual block that halves the map and doubles the channels."""

    def __init__(self, width, rngs):
        options = dict(use_bias=False, rngs=rngs)
        self.first = nnx.Conv(width, 2 * width, (3, 3), strides=2, **options)
        self.second = nnx.Conv(2 * width, 2 * width, (3, 3), **options)
        self.shortcut = nnx.Conv(width, 2 * width, (1, 1), strides=2, **options)
        self.norms = nnx.List([nnx.BatchNorm(size, rngs=rngs) for size in (width, 2 * width)])

    def __call__(self, x):
        y = nnx.relu(self.norms[0](x))
        return self.shortcut(y) + self.second(nnx.relu(self.norms[1](self.first(y))))


class ResNet(nnx.Module):
    """A small residual network for images of 8x8 pixels."""

    def __init__(self, rngs, width=24):
        self.stem = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs), Block(2 * width, rngs)])
        self.norm = nnx.BatchNorm(4 * width, rngs=rngs)
        self.head = nnx.Linear(4 * width, 10, rngs=rngs)

    def __call__(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean((1, 2)))


images, labels = mf.data.load("digits", num_samples=1024)
x, y = jnp.asarray(images), jax.nn.one_hot(labels, 10)
model = ResNet(nnx.Rngs(0))

# %% [markdown]
# ## Read the model
#
# The model runs once on traced inputs, and its layers, sums and means become a specification. The
# variances of the weights are those of the distribution that they were drawn from.

# %%
network = mf.Network.from_flax(model, x[:1])
network

# %% [markdown]
# ## Predict, and measure
#
# Theory describes networks drawn with these variances, on this very batch; the measurement is of
# the model itself. In theory each eigenvalue occurs C = 10 times, once for each output; in one
# model the ten spread, and lambda_max is the mean of the largest over such models.

# %%
batch = x[:32]
theory = mf.analyze(network, data=batch)
op = mf.fisher_operator(model, batch)
measured = mf.top_eigenvalues(op, k=20).eigenvalues
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
places, expected = np.arange(1, 21), np.repeat(theory.fisher.eigenvalues[:2], 10)
axes.plot(places, measured, "o", label="the model, by Lanczos")
axes.step(places, expected, where="mid", label="theory")
axes.plot(1, theory.fisher.lambda_max, "D", label="theory, lambda_max")
axes.set(xlabel="number of the eigenvalue", ylabel="eigenvalue of F", xticks=[1, 5, 10, 15, 20])
axes.set_ylim(0)
axes.legend(frameon=False)
print(f"lambda_max: {theory.fisher.lambda_max:.1f} predicted, {measured[0]:.1f} measured")

# %% [markdown]
# ## A learning rate
#
# Of the network by theory, for i.i.d. inputs, and of the model by a few products with F:

# %%
mf.learning_rate(network, num_samples=32)

# %%
rate = mf.learning_rate(model, batch)
rate

# %% [markdown]
# ## Another gamma, back in the model
#
# Which gamma, the same in all norms, doubles the largest stable learning rate near a minimum,
# 2 (1 + mu) / lambda_max? `tune` descends through the theory, and `apply_to` brings the numbers
# back. The new rate is measured on the model.

# %%
before = float(mf.analyze(network, num_samples=32).eta_max(0.9))
with jax.enable_x64():
    tuned = mf.tune(network, mf.objectives.target_eta_max(2 * before), num_samples=32, shared=True)
other = tuned.network.apply_to(model)
other_rate = mf.learning_rate(other, batch)
print(f"gamma {float(other.norm.scale[0]):.3f}")
other_rate


# %% [markdown]
# ## Train both
#
# Each at the rate that is recommended for it, with the loss (1/2n) sum over samples and outputs
# that the rate is for.


# %%
@nnx.jit
def step(model, optimizer, x, y):
    def loss(model):
        return jnp.mean(jnp.sum((model(x) - y) ** 2, -1)) / 2

    value, gradient = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradient)
    return value


def train(model, rate, epochs=4, size=32):
    """The mean loss of every epoch."""
    optimizer = nnx.Optimizer(model, optax.sgd(rate, momentum=0.9), wrt=nnx.Param)
    losses = []
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(len(x)).reshape(-1, size)
        losses.append(np.mean([step(model, optimizer, x[rows], y[rows]) for rows in order]))
    return losses


figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for label, trained, at in ("as it was", model, rate), ("tuned", other, other_rate):
    losses = train(nnx.clone(trained), float(at))
    axes.plot(range(1, 5), losses, "o-", label=f"{label}, rate {float(at):.3f}")
axes.axhline(0.45, color="black", lw=0.8, ls="--", label="best constant output")
axes.set(yscale="log", xlabel="epoch", ylabel="training loss", xticks=range(1, 5))
_ = axes.legend(frameon=False)

# %% [markdown]
# ## What has no theory
#
# is refused with its path in the model, and can still be measured:

# %%
upsampling = nnx.ConvTranspose(3, 8, (2, 2), strides=2, rngs=nnx.Rngs(0))
small_maps = jax.random.normal(jax.random.key(0), (8, 4, 4, 3))
try:
    mf.Network.from_flax(nnx.Sequential(upsampling), small_maps)
except mf.SpecError as error:
    print(error)
