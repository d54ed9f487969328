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
# # Deep networks, and which gamma
#
# A deep network lives at the fixed point of one of its blocks. Theory says where that is, over how
# many layers a signal gets there, and how fast gradients grow; and since it can be differentiated,
# it also says how to choose gamma.

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import meanfield_jax as mf

# %% [markdown]
# ## Without BatchNorm: order and chaos
#
# Left of the critical line two inputs become equal with depth, right of it they drift apart; on it
# signals travel furthest. 200 x 200 networks:

# %%
tanh = mf.Sequential((mf.Dense(100), mf.Activation("tanh")))
with jax.enable_x64():
    grid = mf.phase_diagram(
        tanh, weight_var=np.linspace(0.5, 4, 200), bias_var=np.linspace(0.001, 0.5, 200)
    )
    critical = mf.phase_diagram(
        tanh, weight_var=np.linspace(0.5, 4, 36), bias_var=np.array([0.01, 0.05, 0.1, 0.5])
    ).critical_weight_var
figure, axes = plt.subplots(figsize=(6, 4.2), layout="constrained")
mesh = axes.pcolormesh(grid.bias_var, grid.weight_var, np.log10(grid.xi_c), vmax=2.5)
axes.plot(grid.bias_var, grid.critical_weight_var, color="white", label="chi_1 = 1")
axes.set(xlabel="variance of the biases", ylabel="variance of the weights")
axes.legend()
figure.colorbar(mesh, label="log10 of the depth scale xi_c")
critical.to_series().round(5)

# %% [markdown]
# ## With BatchNorm: gradients explode
#
# BatchNorm puts the signal at a fixed point in one layer, for any weights. What grows is the
# gradient, by the same factor in every layer, and more on small batches. For a rectifier the factor
# does not depend on gamma; tanh comes near to 1 as gamma goes to 0, where it is linear.

# %%
gammas = np.geomspace(0.05, 4, 30)


def growth(activation, gamma, beta=0.0, num_samples=None):
    """Of squared gradients in a layer, [Dense, BatchNorm, Activation]."""
    block = (mf.Dense(100), mf.BatchNorm(gamma, beta, eps=0.0), mf.Activation(activation))
    return float(mf.fixed_point(mf.Sequential(block), num_samples=num_samples).growth)


with jax.enable_x64():
    curves = {name: [growth(name, gamma) for gamma in gammas] for name in ("relu", "tanh")}
    small = {n: growth("relu", 1.0, num_samples=n) for n in (4, 8, 32, 128)}
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for name, values in curves.items():
    axes.plot(gammas, values, label=name)
axes.set(xscale="log", xlabel="gamma", ylabel="growth of squared gradients a layer")
axes.legend(frameon=False)
print("relu, by batch size:", {n: round(value, 4) for n, value in small.items()})

# %% [markdown]
# ## Tuning by gradient
#
# Thirty layers multiply the squared gradient by 1.18^30 = 140 for tanh, by 1.47^30 = 100,000 for a
# rectifier. `tune` descends through the theory; where gamma alone cannot help it says so.


# %%
def deep(activation):
    """Thirty hidden layers with BatchNorm."""
    block = (mf.Dense(100), mf.BatchNorm(), mf.Activation(activation))
    hidden = mf.Repeat(mf.Sequential(block), 29)
    return mf.Network((64,), (*block, hidden, mf.Dense(10)))


objective = mf.objectives.unit_growth()
with jax.enable_x64():
    options = dict(num_samples=100, shared=True)
    tanh_net = mf.tune(deep("tanh"), objective, over="gamma", **options)
    stuck = mf.tune(deep("relu"), objective, over="gamma", **options)
    relu_net = mf.tune(deep("relu"), objective, over=("gamma", "beta"), **options)
print(stuck.message)
tanh_net

# %%
relu_net

# %% [markdown]
# ## Does it pay?
#
# Each network trained on digits at the learning rate that theory recommends for it: three seeds,
# five epochs, before and after.

# %%
samples = mf.data.load("digits", num_samples=1000, flatten=True)
figure, axes = plt.subplots(figsize=(5, 3.4), layout="constrained")
for label, network in {
    "tanh": deep("tanh"),
    "tanh, tuned": tanh_net.network,
    "relu": deep("relu"),
    "relu, tuned": relu_net.network,
}.items():
    rule = optax.sgd(mf.learning_rate(network, num_samples=100), momentum=0.9)
    run = mf.train(network, samples, optimizer=rule, seed=np.arange(3), epochs=5)
    axes.plot(range(1, 6), run.loss.mean(0), "o-", label=label)
axes.axhline(0.45, color="black", lw=0.8, ls="--", label="best constant output")
axes.set(yscale="log", xlabel="epoch", ylabel="training loss", xticks=range(1, 6))
_ = axes.legend(frameon=False)

# %% [markdown]
# At its recommended rate every network learns, and after five epochs each tuned one is ahead.
# Tuning makes gamma small; for a gamma below 0.5 `learning_rate` warns that it grows from its
# start, and recommends half of the smaller rate. The tuned ReLU network starts with a spike
# nevertheless.

# %% [markdown]
# ## A learning rate on demand
#
# Other questions are one call as well: the gamma with which this very network, on these very
# images, is stable up to a learning rate of 0.5.

# %%
net = mf.mlp([100] * 3, inputs=64, outputs=10, norm=mf.BatchNorm())
with jax.enable_x64():
    batch = np.asarray(samples[0][:100], float)
    wanted = mf.tune(net, mf.objectives.target_eta_max(0.5), data=batch, shared=True)
wanted
