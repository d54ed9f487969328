"""One file a layer family: the specification, its covariance/tangent rule, its Flax module."""

from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import LAYERS, Layer
from meanfield_jax.layers.batch_norm import BatchNorm
from meanfield_jax.layers.combine import Repeat, Residual, Sequential
from meanfield_jax.layers.conv import Conv
from meanfield_jax.layers.dense import Dense
from meanfield_jax.layers.head import Flatten, GlobalMeanPool
from meanfield_jax.layers.norm import Norm

__all__ = [
    "LAYERS",
    "Activation",
    "BatchNorm",
    "Conv",
    "Dense",
    "Flatten",
    "GlobalMeanPool",
    "Layer",
    "Norm",
    "Repeat",
    "Residual",
    "Sequential",
]
