"""The layers, one file per family: specification, covariance and tangent rule, Flax module."""

from meanfield_jax.layers.activation import Activation as Activation
from meanfield_jax.layers.base import LAYERS as LAYERS
from meanfield_jax.layers.base import Layer as Layer
from meanfield_jax.layers.batch_group_norm import BatchGroupNorm as BatchGroupNorm
from meanfield_jax.layers.batch_norm import BatchNorm as BatchNorm
from meanfield_jax.layers.combine import Repeat as Repeat
from meanfield_jax.layers.combine import Residual as Residual
from meanfield_jax.layers.combine import Sequential as Sequential
from meanfield_jax.layers.concat import Concat as Concat
from meanfield_jax.layers.conv import Conv as Conv
from meanfield_jax.layers.cross_iteration import CrossIterationBatchNorm as CrossIterationBatchNorm
from meanfield_jax.layers.dense import Dense as Dense
from meanfield_jax.layers.dropout import Dropout as Dropout
from meanfield_jax.layers.group_norm import GroupNorm as GroupNorm
from meanfield_jax.layers.head import Flatten as Flatten
from meanfield_jax.layers.head import GlobalMeanPool as GlobalMeanPool
from meanfield_jax.layers.instance_enhancement import (
    InstanceEnhancementBatchNorm as InstanceEnhancementBatchNorm,
)
from meanfield_jax.layers.instance_norm import InstanceNorm as InstanceNorm
from meanfield_jax.layers.layer_norm import LayerNorm as LayerNorm
from meanfield_jax.layers.mix_positions import MixPositions as MixPositions
from meanfield_jax.layers.norm import Norm as Norm
from meanfield_jax.layers.offset import Offset as Offset
from meanfield_jax.layers.pool import AvgPool as AvgPool
from meanfield_jax.layers.pool import MaxPool as MaxPool
from meanfield_jax.layers.product import Product as Product
from meanfield_jax.layers.proxy_norm import ProxyNorm as ProxyNorm
from meanfield_jax.layers.rms_norm import RMSNorm as RMSNorm
from meanfield_jax.layers.scale import Scale as Scale
from meanfield_jax.layers.self_attention import SelfAttention as SelfAttention

__all__ = ["Layer", *LAYERS]  # pyright: ignore[reportUnsupportedDunderAll]
