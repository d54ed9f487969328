"""Output of commands: files written completely or not at all, results as JSON, and failure."""

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from meanfield_jax.errors import SpecError, problem


class ComputationError(RuntimeError):
    """A computation ended without a usable result."""


def check_folder(output: Path) -> None:
    """Raises SpecError, before any work is done, if the results cannot be written."""
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        cause = "its folder does not exist or cannot be written to"
        remedy = "use a path in a folder that exists and can be written to"
        raise problem(SpecError, "--output", str(output), cause, remedy)


def write(path: Path, save: Callable[[Path], Any]) -> str:
    """Writes a file completely or not at all, and returns its path."""
    with _temporary(path) as unfinished:
        save(unfinished)
        unfinished.replace(path)
    return str(path)


def write_png(path: Path, figure: Figure) -> str:
    """Writes a picture completely or not at all, and returns its path."""
    return write(path, functools.partial(figure.savefig, format="png", dpi=160))


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
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


def plain(dataset: xr.Dataset) -> dict[str, Any]:
    """A data set as plain dictionaries and lists, with None for numbers that are not finite."""

    def convert(value: Any) -> Any:
        if isinstance(value, list):
            return [convert(item) for item in value]
        if isinstance(value, float) and not np.isfinite(value):
            return None
        return value.item() if isinstance(value, np.generic) else value

    variables = {
        str(name): dict(dims=list(array.dims), values=convert(array.values.tolist()))
        for name, array in dataset.variables.items()
    }
    return dict(attributes={k: convert(v) for k, v in dataset.attrs.items()}, variables=variables)
