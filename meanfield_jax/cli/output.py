"""Where commands write: paths checked before the work, files written completely or not at all."""

import contextlib
import functools
import os
import stat
import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from meanfield_jax.errors import SpecError, problem

PICTURES = (".png", ".pdf", ".svg")
"""Endings of pictures; the first one unless the user asks for another."""


class ComputationError(RuntimeError):
    """A computation ended without a usable result."""


def check_folder(output: Path, option: str = "--output") -> None:
    """Raises SpecError, before any work is done, if the folder of the results refuses them."""
    if not os.path.isdir(output.parent) or not os.access(output.parent, os.W_OK):
        cause = "its folder does not exist or cannot be written to"
        remedy = "use a path in a folder that exists and can be written to"
        raise problem(SpecError, option, str(output), cause, remedy)


def outputs(option: str, given: Path, *endings: str) -> list[Path]:
    """The files to write, one for each ending; checked before any work is done.

    Args:
        option: The option with which the path was given, for messages.
        given: The path, with one of the endings or without.
        endings: Endings of the files, such as ``".nc"``; ``".png"`` stands for any picture.

    Returns:
        The paths in the order of the endings.

    Raises:
        SpecError: if one of them cannot be written, or the path has another ending.
    """
    known = [*endings, *(PICTURES if ".png" in endings else ())]
    stem = given.with_suffix("") if given.suffix in known else given
    # 0.5 in run-0.5 is not an ending
    if not given.name or (stem == given and given.suffix[1:2].isalpha()):
        cause = "its ending is unknown" if given.name else "it does not name a file"
        names = " or ".join(dict.fromkeys(known))
        remedy = f"use a name that ends in {names}, or one without an ending"
        raise problem(SpecError, option, str(given), cause, remedy)
    check_folder(given, option)
    chosen = {".png": given.suffix} if given.suffix in PICTURES else {}
    files = [stem.with_name(stem.name + chosen.get(ending, ending)) for ending in endings]
    for file in files:
        if (cause := _obstacle(file)) is not None:
            raise problem(SpecError, option, str(file), cause, "use another name")
    return files


def _obstacle(file: Path) -> str | None:
    """Why a file cannot be written in a folder that can be; None if nothing is known."""
    try:
        return "it is a folder" if stat.S_ISDIR(file.stat().st_mode) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def local_store(text: str) -> Path:
    """The folder of a sweep; raises SpecError if the text does not name a local folder."""
    if not text.strip():
        raise problem(SpecError, "store", text, "it is empty", "use the name of a folder")
    if "://" in text:
        cause = "a store has to be a local folder, whose files can be locked and replaced at once"
        raise problem(SpecError, "store", text, cause, "sweep into a folder and copy it afterwards")
    return Path(text)


def write(path: Path, save: Callable[[Path], Any]) -> str:
    """Writes a file completely or not at all, and returns its path."""
    try:
        with _temporary(path) as unfinished:
            save(unfinished)
            unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    return str(path)


def write_picture(path: Path, figure: Figure) -> str:
    """Writes a picture, of the kind that its ending says, and returns its path."""
    return write(path, functools.partial(figure.savefig, format=path.suffix[1:], dpi=160))


@contextlib.contextmanager
def _temporary(path: Path) -> Generator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".meanfield-jax-")
    os.close(handle)
    os.chmod(name, 0o666 & ~_umask())
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
