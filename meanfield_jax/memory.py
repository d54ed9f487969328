"""The memory available for computation."""

import math
import os
from collections.abc import Collection
from typing import Any


def memory_of(devices: Collection[Any]) -> float:
    """Total memory of the devices in bytes; infinite where the system does not report it."""
    if all(device.platform == "cpu" for device in devices):
        # CPU devices all use the machine's memory
        if not hasattr(os, "sysconf"):
            return math.inf
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    known = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices]
    return float(sum(known))
