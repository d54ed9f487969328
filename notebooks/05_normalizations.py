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
# # The normalization family
#
# BatchNorm's rivals each promise to repair it: at small batches, at large ones, or without a batch.
# Each is a layer like any other here: it goes into the same specification, has a theory, and builds
# a Flax module.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import meanfield_jax as mf

x, labels = mf.data.load("digits", num_samples=600, flatten=True)
x_test, labels_test = mf.data.load("digits", split="test", num_samples=300, flatten=True)

# %% [markdown]
# ## What theory says of each
#
# The largest stable learning rate of the same network with each norm, on 128 images of digits, in
# training mode. The gate of instance-enhancement BatchNorm starts at sigmoid(-1) = 0.27: it makes
# the network that much less steep.

# %%
norms = {
    "none": None,
    "BatchNorm": mf.BatchNorm(),
    "LayerNorm": mf.LayerNorm(),
    "GroupNorm": mf.GroupNorm(num_groups=10),
    "BatchGroupNorm": mf.BatchGroupNorm(num_groups=10),
    "cross-iteration": mf.CrossIterationBatchNorm(),
    "instance-enhancement": mf.InstanceEnhancementBatchNorm(),
    "LayerNorm + proxy norm": mf.ProxyNorm(mf.LayerNorm()),
}


def network(norm, depth=3):
    return mf.mlp([100] * depth, inputs=64, outputs=10, norm=norm)


for name, norm in norms.items():
    rate = mf.analyze(network(norm), data=x[:128]).eta_max()
    print(f"{name:24}{float(rate):.4f}")

# %% [markdown]
# ## Why BatchNorm depends on the batch
#
# On few samples their variance is uncertain, and dividing by it makes gradients explode with depth.
# LayerNorm, which never looks at other samples, has no such thing. Theory for i.i.d. inputs, ten
# layers:

# %%
sizes = np.array([8, 12, 16, 24, 32, 64, 128, 256, 512, 1024])
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name in ("BatchNorm", "BatchGroupNorm", "LayerNorm"):
    deep = network(norms[name], depth=10)
    values = [float(mf.analyze(deep, num_samples=int(n)).fisher.lambda_max) for n in sizes]
    axes.loglog(sizes, values, "o-", ms=4, label=name)
axes.set(xlabel="batch size", ylabel="largest eigenvalue of F")
axes.grid(alpha=0.25)
_ = axes.legend()
# %% [markdown]
# ## What LayerNorm does not do
#
# LayerNorm lets the mean of a channel over the data drift: with depth all samples become the same.
# P1 is the share of a signal's power that is the same for all inputs; here it is shown after the
# weights of each layer. Proxy norm, after the activation, takes out what the activation adds and
# never looks at the batch. What a bias adds it cannot know: there is none here.

# %%
deep = {"LayerNorm": mf.LayerNorm(), "LayerNorm + proxy norm": mf.ProxyNorm(mf.LayerNorm())}
deep["BatchNorm"] = mf.BatchNorm()
centred = jnp.asarray(x - x.mean(0))
figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
for name, norm in deep.items():
    spec = mf.mlp([100] * 20, inputs=64, outputs=10, norm=norm, bias_var=0.0)
    outputs = mf.diagnostics.activations(mf.build(spec, rngs=nnx.Rngs(0)), centred)
    weights = [i for i, layer in enumerate(spec.layers) if isinstance(layer, mf.Dense)]
    shares = [float(mf.diagnostics.power(outputs[f"layers/{i}"]).P1) for i in weights]
    axes.plot(np.arange(1, len(shares) + 1), shares, "o-", ms=4, label=name)
axes.set(xlabel="layer", ylabel="P1 after the weights", ylim=(0, 1))
axes.grid(alpha=0.25)
_ = axes.legend()
# %% [markdown]
# ## Side by side
#
# Predicted and measured eta_max, and what each learns in two epochs at its own best rate, chosen
# by the training loss; the same as `meanfield-jax compare` on the command line.

# %%
found = mf.compare(
    network(mf.BatchNorm()),
    (x, labels),
    test=(x_test, labels_test),
    norms=["none", "batch", "layer", "proxy"],
    batch_sizes=[8, 64],
    learning_rates=[0.003, 0.01, 0.03, 0.1, 0.3],
    draws=2,
)
columns = ["eta_max", "eta_max_measured", "best_rate", "best_loss", "best_test_accuracy"]
found[columns].to_dataframe().round(3)

# %%
figure = mf.plot_comparison(found)
figure

# %% [markdown]
# ## In a model of your own
#
# Every specification builds a module that stands in any Flax network.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(64, 50, rngs=rngs)
        self.norm = mf.ProxyNorm(mf.LayerNorm(), mf.Activation("gelu")).build((50,), rngs)
        self.last = nnx.Linear(50, 10, rngs=rngs)

    def __call__(self, x):
        return self.last(self.norm(self.first(x)))


model = Classifier(nnx.Rngs(0))
alone, together = model(jnp.asarray(x[:1])), model(jnp.asarray(x[:8]))[:1]
print("the same without its batch mates:", bool(jnp.allclose(alone, together, atol=1e-5)))
operator = mf.fisher_operator(model, jnp.asarray(x[:64]))
print("largest eigenvalue:", mf.top_eigenvalues(operator, 1).eigenvalues)
