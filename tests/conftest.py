"""What all tests share: how to ask for float64 and for strict broadcasting, without jax.config."""

from pathlib import Path

import jax
import pytest

pytest_plugins = ["compile_report"]


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


@pytest.fixture(autouse=True)
def bounded_memory_maps():
    """Drops compiled programs before their memory maps reach Linux's limit of 65,530 a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
