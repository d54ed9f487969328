"""``meanfield-jax schema``."""

import dataclasses
import json
from typing import Annotated, Literal

import tyro

from meanfield_jax.cli.result import RESULTS


@dataclasses.dataclass(frozen=True)
class Schema:
    """Print the JSON Schema of what a command prints with --json."""

    command: Annotated[
        Literal[
            "analyze", "phase", "validate", "spectrum", "compare", "sweep", "check", "plot", "tune"
        ],
        tyro.conf.Positional,
    ]
    """The command."""

    def run(self) -> None:
        """Prints the schema."""
        print(json.dumps(RESULTS[self.command].schema(self.command), indent=2))
