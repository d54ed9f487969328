"""``meanfield-jax check``."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import tyro

from meanfield_jax.cli.output import ComputationError
from meanfield_jax.experiments.check import check_store


@dataclasses.dataclass(frozen=True)
class Check:
    """Check a sweep's store: what is whole, what can be computed again, and what is lost."""

    store: Annotated[Path, tyro.conf.Positional]
    """Folder that `meanfield-jax sweep` wrote."""
    json: bool = False
    """Print JSON instead of text."""

    def run(self) -> None:
        """Checks, prints what was found, and fails if anything is damaged."""
        found = check_store(self.store)
        if self.json:
            print(json.dumps(dict(store=str(self.store), **dataclasses.asdict(found)), indent=2))
        else:
            print(
                f"chunks: {found.whole} whole, {found.damaged} damaged, {found.missing} to be run"
            )
            for fault in found.faults:
                print(f"{fault.state}: {fault.file}; {fault.remedy}")
        if found.faults:
            lost = sum(fault.state == "lost" for fault in found.faults)
            count = f"{len(found.faults) - lost} repairable and {lost} lost"
            raise ComputationError(f"store={str(self.store)!r}: {count}; see above")
