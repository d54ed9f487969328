"""What all tests share: kept programs, float64, checks of shapes and ranks, bounded memory."""

import gc
import os
from pathlib import Path

import compile_cache
import shape_checks

compile_cache.start()
shape_checks.start()
# for the workers, which start later: NumPy's waiting threads would take the other workers' cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

pytest_plugins = ["compile_report"]


def pytest_collection_finish():
    """Collects garbage less often, because tracing makes millions of objects that stay alive."""
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Shows of a failed test what it said, less what loading programs says."""
    report = yield
    report.sections = [
        (name, compile_cache.without_harmless(text)) for name, text in report.sections
    ]
    return report


@pytest.fixture
def x64():
    """Computes in float64."""
    with jax.enable_x64():
        yield


@pytest.fixture(autouse=True)
def strict_ranks():
    """An array never gains axes silently when it is combined with another."""
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def compiles_anew():
    """Nothing comes from programs kept, here or on disk: for what measures compilation."""
    jax.clear_caches()
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.fixture(autouse=True)
def bounded_memory_maps():
    """Drops compiled programs before their memory maps reach Linux's limit of 65,530 a process."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
