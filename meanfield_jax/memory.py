"""How much memory there is to compute in."""

import math
import os
from collections.abc import Collection
from typing import Any


def memory_of(devices: Collection[Any]) -> float:
    """Bytes that the devices have together; infinite where the system does not say."""
    if all(device.platform == "cpu" for device in devices):
        # they share the machine's
        if not hasattr(os, "sysconf"):
            return math.inf
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    known = [(device.memory_stats() or {}).get("bytes_limit", math.inf) for device in devices]
    return float(sum(known))
