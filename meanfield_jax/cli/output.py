"""What commands give back: files written wholly or not at all, results as plain JSON, failure."""

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
    """Finds out before the work whether the results can be written."""
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        cause = "its folder does not exist or cannot be written"
        raise problem(SpecError, "--output", str(output), cause, "name a file in a folder of yours")


def write(path: Path, save: Callable[[Path], Any]) -> str:
    """Writes a file wholly or not at all."""
    with _temporary(path) as unfinished:
        save(unfinished)
        unfinished.replace(path)
    return str(path)


def write_png(path: Path, figure: Figure) -> str:
    """Writes a picture wholly or not at all."""
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
    """A data set as plain dictionaries and lists; what is not finite as null."""

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
