"""The networks and batches that several test files share, and with them their compiled programs.

Other numbers (gamma, weight_var) share a program, too; another width, depth or activation does not.
"""

import math

import numpy as np

import meanfield_jax as mf

SMALL = mf.mlp([30, 20], inputs=8, outputs=3)
SMALL_NORM = mf.mlp([30], inputs=5, outputs=2, norm=mf.BatchNorm())
DIGITS = mf.mlp([64], inputs=64, outputs=10, norm=mf.BatchNorm())
"""For ``mf.data.load("digits", flatten=True)``."""
CNN = mf.cnn([4, 6], inputs=(8, 8, 3))
CNN_NORM = mf.cnn([4, 6], inputs=(8, 8, 3), norm=mf.BatchNorm())


def wide(**options) -> mf.Network:
    """784-1000-1000-1000-10, the network of the published reference values."""
    return mf.mlp([1000] * 3, inputs=784, outputs=10, **options)


def dense(norm: mf.Layer | None, activation="relu", width: int = 256, **options) -> mf.Network:
    """Two hidden layers, for comparisons with random networks."""
    return mf.mlp([width] * 2, inputs=20, outputs=4, activation=activation, norm=norm, **options)


def conv(norm: mf.Layer | None, head="flatten", width: int = 32, **options) -> mf.Network:
    """Two convolutions, for comparisons with random networks."""
    options = dict(inputs=(8, 8, 2), outputs=4) | options
    return mf.cnn([width] * 2, head=head, norm=norm, **options)


def correlated(num_samples: int, *shape: int, seed: int = 0) -> np.ndarray:
    """Samples of different lengths that share a few directions, as images do."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(num_samples, 3)) @ rng.normal(size=(3, math.prod(shape)))
    lengths = rng.uniform(0.3, 1, (num_samples, 1))
    return (lengths * (shared + rng.normal(size=shared.shape))).reshape(num_samples, *shape)
