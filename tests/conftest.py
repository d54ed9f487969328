"""What all tests share: how to ask for float64 and for strict broadcasting, without jax.config."""

import jax
import pytest


@pytest.fixture
def x64():
    """Computes in float64."""
    with jax.enable_x64():
        yield


@pytest.fixture
def strict_ranks():
    """An array never gains axes silently when it is combined with another."""
    with jax.numpy_rank_promotion("raise"):
        yield
