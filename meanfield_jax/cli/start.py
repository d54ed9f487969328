"""How the program starts and ends: signals, errors in one line, exit statuses.

Only the standard library is imported here, so that all of this holds while JAX is being imported,
and if that fails.
"""

import contextlib
import errno
import os
import signal
import sys
import warnings
from typing import NoReturn

from meanfield_jax import __version__

TRACEBACK = "MEANFIELD_JAX_TRACEBACK"
"""If this environment variable is set, an error is shown with its traceback."""

UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF)
"""Errors of writing."""

LONGEST = 2000
"""Characters of the longest error."""


class Failure(Exception):
    """An error that a command reports, with its exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Stopped(KeyboardInterrupt):
    """SIGINT or SIGTERM came while a command was running."""


class _Signals:
    """What SIGINT and SIGTERM do.

    While a command runs, the first one raises Stopped, so that unfinished files are removed. At
    any other time, and the second one, ends the process at once.
    """

    running = False
    received: int | None = None

    def handle(self) -> None:
        """Takes over both signals, unless they are ignored, as in a background job."""
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._stop)
        sys.unraisablehook = self._again

    def _stop(self, number: int, _frame: object) -> None:
        if not self.running or self.received is not None:
            os._exit(128 + number)
        self.received = number
        raise Stopped

    def _again(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Ends the process if Stopped was raised where Python ignores exceptions."""
        if isinstance(unraisable.exc_value, Stopped):
            os._exit(128 + (self.received or signal.SIGINT))
        sys.__unraisablehook__(unraisable)


signals = _Signals()


def entry() -> NoReturn:
    """Runs the program and exits with the status of :func:`main`.

    The process ends without shutting Python down, because XLA may still be computing in the
    background after an interruption, and because a broken stdout would change the status.
    """
    signals.handle()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries; what a user should know is an error
    _open_missing_streams()
    status = main()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
    os._exit(status)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if sys.stdout is None:
            raise Failure("stdout: it is closed; redirect it to a file or to /dev/null", 1)
        if given == ["--version"]:
            print(f"meanfield-jax {__version__}")
        else:
            from meanfield_jax.cli.program import run

            signals.running = True
            run(given)
        sys.stdout.flush()
    except BaseException as error:
        signals.running = False
        if TRACEBACK in os.environ:
            sys.excepthook(type(error), error, error.__traceback__)
        message, status = _described(error)
        _say(message)
        return status
    signals.running = False
    return 0


def _described(error: BaseException) -> tuple[str, int]:
    """The line that tells of an error, which may be empty, and the exit status."""
    if isinstance(error, KeyboardInterrupt) or signals.received is not None:
        number = signals.received or signal.SIGINT
        word = "terminated" if number == signal.SIGTERM else "interrupted"
        return f"{word}; no incomplete file is left", 128 + number
    if isinstance(error, (BrokenPipeError, SystemExit)):
        return "", 1  # nobody reads the output any more; Rich turns the first into the second
    if isinstance(error, Failure):
        return str(error), error.status
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno in UNWRITABLE:
        # commands write named files, and stdout
        text = f"{error.filename or 'stdout'}: {error.strerror}"
    if isinstance(error, MemoryError):
        return f"not enough memory: {text}; use fewer samples, a smaller network or grid", 1
    fault = isinstance(error, (RecursionError, NotImplementedError))
    if isinstance(error, (OSError, RuntimeError)) and not fault:
        return text, 1
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    code = place and place.tb_frame.f_code
    where = f"{os.path.basename(code.co_filename)}:{place.tb_lineno}" if place and code else "?"
    remedy = f"please report it with its traceback, which {TRACEBACK}=1 shows"
    return f"a fault of the program, {type(error).__name__}: {text} ({where}); {remedy}", 1


def _say(message: str) -> None:
    """Prints an error in one line on stderr, if that is possible."""
    printable = "".join(letter if letter.isprintable() else " " for letter in message)
    line = " ".join(printable.split())
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}"
    with contextlib.suppress(OSError):
        if line:
            print(f"meanfield-jax: {line}", file=sys.stderr, flush=True)


def _open_missing_streams() -> None:
    """Opens /dev/null in place of closed streams, so that no file gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
