"""Activation functions in NumPy and SciPy, each with its derivative, to hold ours against."""

import numpy as np
import scipy

SMOOTH = {
    "tanh": (np.tanh, lambda x: 1 / np.cosh(x) ** 2),
    "gelu": (
        lambda x: x * scipy.special.ndtr(x),
        lambda x: scipy.special.ndtr(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "silu": (
        lambda x: x * scipy.special.expit(x),
        lambda x: scipy.special.expit(x) * (1 + x * scipy.special.expit(-x)),
    ),
    "erf": (scipy.special.erf, lambda x: 2 / np.sqrt(np.pi) * np.exp(-(x**2))),
}
