"""What importing the package costs."""

import subprocess
import sys

HEAVY = ("beartype", "matplotlib", "pandas", "pooch", "scipy.sparse", "xarray", "zarr")

CHILD = """
import resource, sys
import {modules}
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, *(name for name in {heavy} if name in sys.modules))
"""


def imported(modules: str) -> tuple[float, list[str]]:
    """CPU seconds of a fresh interpreter that imports these, and the heavy modules among them."""
    code = CHILD.format(modules=modules, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = done.stdout.split()
    return float(seconds), loaded


def test_heavy_libraries_are_loaded_when_they_are_used():
    assert imported("meanfield_jax.api")[1] == []


def test_importing_costs_little_more_than_its_core_packages():
    imported("meanfield_jax.api, jax, flax, optax")  # compiles the bytecode
    ours, core = (
        min(imported(modules)[0] for _ in range(3))
        for modules in ("meanfield_jax.api", "jax, flax, optax")
    )
    print(f"{ours:.2f} s against {core:.2f} s")
    assert ours < 1.7 * core
