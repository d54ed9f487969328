"""What a command line may ask for: more than this is a mistake, or needs the Python interface."""

import dataclasses
import math
from typing import Any

import jax

from meanfield_jax.errors import SpecError, problem
from meanfield_jax.memory import memory_of
from meanfield_jax.network import Network

MOST = 10**6
"""Largest value of an option that counts something."""

MOST_OF = dict(depth=1000, seed=2**31 - 1)
"""The same of some options: layers that are written out take seconds each to compile."""

MOST_CELLS = 2**22
"""Cells of a grid."""

REMEDY = "pass less, or use the Python interface"


def check_counts(command: Any) -> None:
    """Raises SpecError if a whole number among the options is above its limit."""
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if dataclasses.is_dataclass(value):
            check_counts(value)
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int):
                check_count(f"--{field.name.replace('_', '-')}", field.name, number)


def check_count(argument: str, name: str, value: int) -> None:
    """Raises SpecError if a number is above the limit of what it counts."""
    most = MOST_OF.get(name, MOST)
    if abs(value) > most:
        raise problem(SpecError, argument, value, f"it is above the limit of {most:,}", REMEDY)


def check_cells(argument: str, *sizes: int) -> None:
    """Raises SpecError if a grid of these sizes has too many cells."""
    if (cells := math.prod(sizes)) > MOST_CELLS:
        cause = f"the grid has more than {MOST_CELLS:,} cells"
        raise problem(SpecError, argument, cells, cause, REMEDY)


def check_memory(network: Network, num_samples: int, copies: int) -> None:
    """Raises SpecError if networks and samples cannot fit into the memory of the device.

    Args:
        network: The network.
        num_samples: Number of its inputs.
        copies: How often its parameters are in memory at the same time, at the least.
    """
    numbers = copies * network.num_parameters + num_samples * math.prod(network.input_shape)
    memory = memory_of(jax.local_devices()[:1])
    if 4 * numbers > memory:
        gigabytes = f"{4 * numbers / 2**30:.3g} GiB"
        cause = f"it takes more than the {memory / 2**30:.3g} GiB of this device"
        raise problem(SpecError, "memory", gigabytes, cause, "use a smaller network or fewer runs")
