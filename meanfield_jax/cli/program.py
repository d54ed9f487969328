"""The program: parses the arguments and runs the command."""

import contextlib
import io
import os
import re
from typing import Any

import jax
import tyro

from meanfield_jax.cli.analyze import Analyze
from meanfield_jax.cli.check import Check
from meanfield_jax.cli.compare import Compare
from meanfield_jax.cli.phase import Phase
from meanfield_jax.cli.plot import Plot
from meanfield_jax.cli.schema import Schema
from meanfield_jax.cli.spectrum import Spectrum
from meanfield_jax.cli.start import Failure
from meanfield_jax.cli.sweep import Sweep
from meanfield_jax.cli.tune import Tune
from meanfield_jax.cli.validate import Validate
from meanfield_jax.errors import DataError, SpecError

# in the order of --help; a command is a dataclass of options with a method run()
COMMANDS = {
    "analyze": Analyze,
    "phase": Phase,
    "validate": Validate,
    "spectrum": Spectrum,
    "compare": Compare,
    "sweep": Sweep,
    "check": Check,
    "plot": Plot,
    "tune": Tune,
    "schema": Schema,
}

DESCRIPTION = (
    "Mean-field theory of neural networks, compared with real networks. "
    "--version prints the version."
)


def run(arguments: list[str]) -> None:
    """Runs the command line.

    Raises:
        Failure: if the command, an option or the data are not valid, or JAX has no device.
    """
    command = _parse(arguments)
    try:
        if command is not None:
            command.run()
    except (SpecError, DataError) as error:
        raise Failure(str(error), 2) from error
    except Exception:
        _check_devices()
        raise


def _check_devices() -> None:
    """Raises Failure if JAX has no device, from which all kinds of errors follow."""
    try:
        jax.devices()
    except Exception as error:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        cause = str(error) or "JAX finds no such device here"
        remedy = 'install JAX for it, as with pip install "meanfield_jax[cuda13]", or unset it'
        raise Failure(f"JAX_PLATFORMS={platforms!r}: {cause}; {remedy}", 1) from error


def _parse(arguments: list[str]) -> Any:
    """The command, or None after --help; an error message of tyro is shortened to one line."""
    said, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,  # pyright: ignore[reportArgumentType]
                prog="meanfield-jax",
                description=DESCRIPTION,
                args=arguments,
            )
    except SystemExit as stop:
        if stop.code:
            raise Failure(_one_line(errors.getvalue() or said.getvalue()), 2) from None
        print(said.getvalue(), end="")


def _one_line(message: str) -> str:
    """A boxed message with hints, reduced to its cause in one line without boxes and colours."""
    words = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{3,}", " ", message)
    cause = re.split(r"Perhaps you meant|For full helptext", words)[0]
    # the title of the box may be repeated by the text
    line = re.sub(r"^(.{4,}?) \1", r"\1", " ".join(cause.split()), flags=re.IGNORECASE)
    return line.rstrip(".") + "; see --help"
