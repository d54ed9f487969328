"""The program: parses the arguments, runs the command and returns an exit status."""

import contextlib
import io
import os
import re
import sys
from typing import Any, NoReturn

import jax
import tyro

from meanfield_jax.cli.analyze import Analyze
from meanfield_jax.cli.check import Check
from meanfield_jax.cli.compare import Compare
from meanfield_jax.cli.phase import Phase
from meanfield_jax.cli.plot import Plot
from meanfield_jax.cli.spectrum import Spectrum
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
}


def entry() -> NoReturn:
    """Runs the program and exits with the status of :func:`main`.

    After an interruption XLA may still be computing in the background, and shutting Python down
    meanwhile would crash, so the process is then ended at once. So is one of several processes that
    failed, since JAX would wait for the others to end, too.
    """
    status = main()
    if status == 130 or (status and jax.distributed.is_initialized()):
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    command = _parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(command, int):
        return command
    try:
        command.run()
    except (SpecError, DataError) as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; no incomplete file is left", 130)
    except BrokenPipeError:
        sys.stdout = None
        return 1
    except (RuntimeError, MemoryError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 1)
    return 0


def _parse(arguments: list[str]) -> Any:
    """The command, or an exit status; an error message of tyro is shortened to one line."""
    said, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            return tyro.extras.subcommand_cli_from_dict(
                COMMANDS,  # pyright: ignore[reportArgumentType]
                prog="meanfield-jax",
                description="Mean-field theory of neural networks, compared with real networks",
                args=arguments,
            )
    except SystemExit as stop:
        if not stop.code:
            print(said.getvalue(), end="")
            return 0
        return _fail(_one_line(errors.getvalue() or said.getvalue()), 2)


def _one_line(message: str) -> str:
    """A boxed message with hints, reduced to its cause in one line without boxes and colours."""
    words = re.sub(r"\x1b\[[0-9;]*m|[─-╿]|-{3,}", " ", message)
    cause = re.split(r"Perhaps you meant|For full helptext", words)[0]
    # the title of the box may be repeated by the text
    return re.sub(r"^(.{4,}?) \1", r"\1", " ".join(cause.split())) + "; see --help"


def _fail(message: str, status: int) -> int:
    print(f"meanfield-jax: {message}", file=sys.stderr)
    return status
