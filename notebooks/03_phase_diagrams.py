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
# # Phase diagrams of training
#
# Which learning rates train, and which diverge, depends on the scale gamma of BatchNorm. Theory
# draws the boundary in milliseconds; a sweep finds it by training at every point of a grid. Here
# both on scikit-learn's digits, small enough for a laptop.

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import meanfield_jax as mf
from meanfield_jax.cli.tables import sweep_table
from meanfield_jax.experiments import diagram

samples = mf.data.load("digits", num_samples=1000, flatten=True)
test = mf.data.load("digits", split="test", flatten=True)
net = mf.mlp([100] * 2, inputs=64, outputs=10, norm=mf.BatchNorm())
grid = dict(
    gamma=[0.25, 0.5, 1.0, 2.0, 4.0],
    learning_rate=np.geomspace(1e-3, 10, 17),
    seed=range(3),
)
store = Path(tempfile.mkdtemp()) / "digits.zarr"
result = mf.sweep(net, samples, grid, store=store, test=test, epochs=5)
result

# %% [markdown]
# ## The picture
#
# The test loss after five epochs, averaged over three seeds, white where any of them diverged. The
# lines are theory: BatchNorm in training mode is what decides the stability of training.

# %%
mf.plot_sweep(result)

# %% [markdown]
# ## The boundary as a number
#
# How far the boundary lies from the predicted one, for each meaning of the Fisher matrix. The
# grid's step is a factor of 1.78, so a ratio is known to within a factor of 1.33 either way. Beyond
# `eta_max` the loss is thrown up, the curvature falls, and training may go on: ratios above
# one are expected.

# %%
sweep_table(result)

# %% [markdown]
# ## Interrupted, and resumed
#
# Every chunk of cells is written before it counts. A file that was cut short is found by its
# checksum, and only its chunk is computed again, to the same bits.

# %%
chunk = next(path for path in sorted((store / "loss" / "c").rglob("*")) if path.is_file())
chunk.write_bytes(chunk.read_bytes()[:10])
damaged = mf.load_sweep(store)
print("runs missing:", int((damaged.diverged_at == -2).sum()), "of", damaged.diverged_at.size)
resumed = mf.sweep(net, samples, grid, store=store, test=test, epochs=5, resume=True)
print("the same as before:", resumed.identical(result))

# %% [markdown]
# ## Any axis
#
# Depth and width are axes like any other; each of their values is compiled by itself. In training
# mode the boundary of this network depends on its width, and hardly on its depth.

# %%
shapes = dict(depth=[1, 3], width=[50, 200], learning_rate=np.geomspace(1e-2, 10, 10), seed=[0, 1])
deeper = mf.sweep(net, samples, shapes, epochs=3)
figure, axes = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
for depth in shapes["depth"]:
    at = deeper.sel(depth=depth)
    axes.plot(at.width, diagram.boundary(at), "o", label=f"measured, depth {depth}")
    axes.plot(at.width, at.eta_max_batch, label=f"theory, depth {depth}")
axes.set(xscale="log", yscale="log", xlabel="width", ylabel="largest stable learning rate")
axes.set_xticks(shapes["width"], [str(width) for width in shapes["width"]])
axes.set_xticks([], minor=True)
_ = axes.legend(frameon=False)
