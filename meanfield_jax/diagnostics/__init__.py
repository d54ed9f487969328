"""Signals, gradients and statistics inside a network, measured on any Flax model."""

from meanfield_jax.diagnostics.capture import activations
from meanfield_jax.diagnostics.gradients import (
    gradient_noise,
    gradient_tails,
    gradients,
    input_dependence,
)
from meanfield_jax.diagnostics.signal import Power, moments, power
from meanfield_jax.diagnostics.statistics import (
    StatisticsError,
    batch_statistics_error,
    statistics_error,
)

__all__ = [
    "Power",
    "StatisticsError",
    "activations",
    "batch_statistics_error",
    "gradient_noise",
    "gradient_tails",
    "gradients",
    "input_dependence",
    "moments",
    "power",
    "statistics_error",
]
