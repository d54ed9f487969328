"""``meanfield-jax check``."""

import dataclasses
from typing import Annotated

import numpy as np
import tyro
import xarray as xr

from meanfield_jax.cli.output import ComputationError, local_store
from meanfield_jax.cli.result import print_json
from meanfield_jax.experiments.check import Check as Found
from meanfield_jax.experiments.check import check_store


@dataclasses.dataclass(frozen=True)
class Check:
    """Check a sweep's store: what is whole, what can be computed again, and what is lost."""

    store: Annotated[str, tyro.conf.Positional]
    """Folder that `meanfield-jax sweep` wrote."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        """Checks, prints what was found, and fails if anything is damaged."""
        found = check_store(local_store(self.store))
        if self.json:
            print_json("check", self._dataset(found))
        else:
            unknown = f", {found.unknown} there, but not checked" * (found.unknown > 0)
            counts = f"{found.whole} whole, {found.damaged} damaged, {found.missing} to be run"
            print(f"chunks: {counts}{unknown}")
            for fault in found.faults:
                print(f"{fault.state}: {fault.file}; {fault.remedy}")
        if found.faults:
            lost = sum(fault.state == "lost" for fault in found.faults)
            count = f"{len(found.faults) - lost} repairable and {lost} lost"
            raise ComputationError(f"store={self.store!r}: {count}; see above")

    def _dataset(self, found: Found) -> xr.Dataset:
        columns = {
            name: ("fault", np.array([getattr(fault, name) for fault in found.faults], dtype=str))
            for name in ("file", "state", "remedy")
        }
        names = ("whole", "damaged", "missing", "unknown")
        counts = {name: getattr(found, name) for name in names}
        return xr.Dataset(columns, attrs=dict(store=self.store, **counts))
