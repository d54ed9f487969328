"""One file a layer family: the specification, its covariance/tangent rule, its Flax module."""

from meanfield_jax.layers.activation import Activation
from meanfield_jax.layers.base import LAYERS, Layer
from meanfield_jax.layers.batch_group_norm import BatchGroupNorm
from meanfield_jax.layers.batch_norm import BatchNorm
from meanfield_jax.layers.combine import Repeat, Residual, Sequential
from meanfield_jax.layers.conv import Conv
from meanfield_jax.layers.cross_iteration import CrossIterationBatchNorm
from meanfield_jax.layers.dense import Dense
from meanfield_jax.layers.group_norm import GroupNorm
from meanfield_jax.layers.head import Flatten, GlobalMeanPool
from meanfield_jax.layers.instance_enhancement import InstanceEnhancementBatchNorm
from meanfield_jax.layers.instance_norm import InstanceNorm
from meanfield_jax.layers.layer_norm import LayerNorm
from meanfield_jax.layers.norm import Norm
from meanfield_jax.layers.proxy_norm import ProxyNorm

__all__ = [
    "LAYERS",
    "Activation",
    "BatchGroupNorm",
    "BatchNorm",
    "Conv",
    "CrossIterationBatchNorm",
    "Dense",
    "Flatten",
    "GlobalMeanPool",
    "GroupNorm",
    "InstanceEnhancementBatchNorm",
    "InstanceNorm",
    "Layer",
    "LayerNorm",
    "Norm",
    "ProxyNorm",
    "Repeat",
    "Residual",
    "Sequential",
]
