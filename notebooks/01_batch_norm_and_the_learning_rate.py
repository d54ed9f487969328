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
# # Batch normalization and the largest stable learning rate
#
# Gradient descent on the squared loss blows up when the learning rate passes
# $\eta_{\max} = 2(1+\mu)/\lambda_{\max}$, with $\lambda_{\max}$ the largest eigenvalue of the
# Fisher information matrix and $\mu$ the momentum. Mean-field theory gives $\lambda_{\max}$ of a
# wide random network without building it. Here we predict it, see how BatchNorm's scale $\gamma$
# moves it, measure it on a real network, and train on both sides of the bound.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx

import meanfield_jax as mf

# %% [markdown]
# ## Theory: one network, a millisecond
#
# A network is data. This one is fully connected with a BatchNorm before each ReLU.

# %%
net = mf.mlp([300] * 3, inputs=64, outputs=10, norm=mf.BatchNorm(gamma=1.0))
net

# %%
theory = mf.analyze(net)
print("largest stable learning rate:", theory.eta_max(momentum=0.9))
theory.to_xarray()[["q", "q_xy", "q_hat", "q_hat_xy"]].to_dataframe()

# %% [markdown]
# ## How gamma changes it, with gradients
#
# Numbers of the specification are leaves of a pytree: build it inside `jax.vmap`, `jax.grad`.


# %%
def eta_max(gamma):
    net = mf.mlp([300] * 3, inputs=64, outputs=10, norm=mf.BatchNorm(gamma=gamma))
    return mf.analyze(net).eta_max(momentum=0.9)


gamma = jnp.linspace(0.1, 3, 200)
rate, slope = jax.vmap(jax.value_and_grad(eta_max))(gamma)
vanilla = mf.analyze(mf.mlp([300] * 3, inputs=64, outputs=10)).eta_max(momentum=0.9)

fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
axes[0].semilogy(gamma, rate, label="with BatchNorm")
axes[0].axhline(float(vanilla), ls=":", color="gray", label="without")
axes[0].set(xlabel="gamma", ylabel="largest stable learning rate")
axes[0].legend(frameon=False)
axes[1].plot(gamma, gamma * slope / rate)
axes[1].set(xlabel="gamma", ylabel="d log eta_max / d log gamma")
plt.show()

# %% [markdown]
# A smaller scale allows a larger step, up to a floor set by the biases; beyond gamma = 1 the rate
# falls as $\gamma^{-2}$.
#
# ## Measurement: a real network on real images
#
# The same specification builds the Flax network. Lanczos finds the top of its Fisher matrix on 500
# images of handwritten digits.

# %%
x, labels = mf.data.load("digits", num_samples=500, flatten=True)
x = jnp.asarray(x)
model = mf.build(net, rngs=nnx.Rngs(0))
operator = mf.fisher_operator(model, x, statistics="batch")
top = mf.top_eigenvalues(operator, k=12).raise_if_failed()
predicted = mf.analyze(net, num_samples=500)
print("measured: ", np.round(np.asarray(top.eigenvalues), 1))
print("predicted:", round(float(predicted.fisher.outlier), 1), "ten times")

# %% [markdown]
# Ten outliers, one for each output, far above the rest: the theory's picture. It assumes i.i.d.
# inputs with unit variance, which images are not; BatchNorm in training mode hardly minds.
#
# ## Three meanings of the Fisher matrix
#
# What is differentiated when the network normalizes by its batch? In training, mean and variance
# depend on the parameters (`"batch"`). In evaluation they are constants (`"frozen"`). The published
# recursion (`"wei2019"`) lies between the two. Only the first decides whether training is stable.

# %%
gaussian, _ = mf.data.load("gaussian", num_samples=500, shape=(64,))
result = mf.validate(net, jnp.asarray(gaussian), gammas=(0.25, 0.5, 1.0, 2.0), draws=2)
mf.plot_validation(result)

# %% [markdown]
# ## Training on both sides of the bound
#
# Full-batch heavy ball on the squared loss, at several multiples of the predicted rate.

# %%
targets = jax.nn.one_hot(labels, 10)
apply, params = mf.functional(model)


@jax.jit
def train(learning_rate):
    def loss(params):
        return jnp.sum((apply(params, x) - targets) ** 2) / (2 * len(x))

    def step(carry, _):
        params, velocity = carry
        value, gradient = jax.value_and_grad(loss)(params)
        velocity = jax.tree.map(lambda v, g: 0.9 * v - learning_rate * g, velocity, gradient)
        return (jax.tree.map(jnp.add, params, velocity), velocity), value

    start = (params, jax.tree.map(jnp.zeros_like, params))
    return jax.lax.scan(step, start, length=100)[1]


eta = predicted.eta_max(momentum=0.9)
for multiple in (0.5, 0.9, 1.1, 1.3):
    plt.semilogy(train(multiple * eta), label=f"{multiple} x predicted eta_max")
plt.gca().set(xlabel="step", ylabel="squared loss", ylim=(1e-3, 1e4))
plt.legend(frameon=False)
plt.show()

# %% [markdown]
# Below the bound the loss falls; above it the loss is thrown up first. `meanfield-jax validate`
# makes the comparison for the paper's network, as a table and a picture.
