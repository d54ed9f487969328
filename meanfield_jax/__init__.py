"""Differentiable mean-field theory of neural networks, checked against the real network."""

from meanfield_jax.errors import DataError, SpecError
from meanfield_jax.layers import (
    Activation,
    BatchNorm,
    Conv,
    Dense,
    Flatten,
    GlobalMeanPool,
    Layer,
    Repeat,
    Residual,
    Sequential,
)
from meanfield_jax.network import Network, cnn, mlp
from meanfield_jax.theory.learning_rate import eta_max
from meanfield_jax.theory.propagate import analyze, Theory
from meanfield_jax.empirical.model import build, calibrate, functional
from meanfield_jax.empirical.fisher import FisherOperator, fisher_operator
