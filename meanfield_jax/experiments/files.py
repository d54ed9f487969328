"""Files of a store: on the disk before they count, read with a limit, and a lock for the writer."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path

from meanfield_jax.errors import SpecError, problem

try:
    import fcntl
except ImportError:  # no locks on this system
    fcntl = None

UNFINISHED = ".part"
"""The end of a name that is written, but not complete."""


class Memory(dict[str, bytes]):
    """Files that are kept in memory, by name."""

    def read(self, name: str, limit: int) -> bytes | None:
        """The content of a file; None if there is none."""
        return self.get(name)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Keeps the files."""
        self.update(files)

    def create(self, files: Mapping[str, bytes]) -> None:
        """Keeps the files, and no others."""
        self.clear()
        self.update(files)

    @property
    def name(self) -> str:
        """What messages call it."""
        return "memory"

    def top(self) -> set[str]:
        """First parts of the names."""
        return {name.split("/")[0] for name in self}


class Folder:
    """Files in a folder, named by their path in it.

    Attributes:
        path: The folder, which need not exist.
        name: What messages call it.
    """

    def __init__(self, path: Path, name: str = ""):
        self.path, self.name, self._prefix = path, name or str(path), f"{path}/"

    def read(self, name: str, limit: int) -> bytes | None:
        """Returns the content of a file; None if it is missing, no file, too long or unreadable.

        Raises:
            PermissionError: if it may not be read.
        """
        try:
            # without O_NONBLOCK, opening a named pipe would wait for ever
            handle = os.open(f"{self._prefix}{name}", os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except PermissionError:
            raise
        except OSError:
            return None
        try:
            state = os.fstat(handle)
            if not stat.S_ISREG(state.st_mode) or state.st_size > limit:
                return None
            content = b""
            while len(content) < state.st_size and (more := os.read(handle, state.st_size)):
                content += more
            return content
        except OSError:
            return None
        finally:
            os.close(handle)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Writes files, each completely or not at all; when it returns, all are on the disk.

        Raises:
            OSError: if one of them cannot be written.
        """
        paths = [self.path / name for name in files]
        folders = {folder for path in paths for folder in self._folders(path)}
        unfinished = [path.with_name(path.name + UNFINISHED) for path in paths]
        for path, content in zip(unfinished, files.values(), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, content)
        for path in unfinished:
            synchronize(path)
        for path, final in zip(unfinished, paths, strict=True):
            path.replace(final)
        for folder in folders:
            synchronize(folder)

    def create(self, files: Mapping[str, bytes]) -> None:
        """Makes the folder with all files at once; what was there before is removed.

        Raises:
            OSError: if one of them cannot be written; then there is no folder.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unborn = Folder(beside(self, "new"))
        shutil.rmtree(unborn.path, ignore_errors=True)
        unborn.write(files)
        if self.path.is_dir():
            shutil.rmtree(self.path)
        unborn.path.rename(self.path)
        synchronize(self.path.parent)

    def top(self) -> set[str]:
        """Names of what is directly in the folder."""
        return {path.name for path in self.path.iterdir()} if self.path.is_dir() else set()

    def _folders(self, path: Path) -> Iterator[Path]:
        """The folders whose entries change when a file is made: its own, and those above new ones.

        Yields:
            Each of them, up to this folder.
        """
        yield path.parent
        while path.parent != self.path and not path.parent.exists():
            path = path.parent
            yield path.parent


def files_at(location: str | Path | None) -> Folder | Memory:
    """Returns the files of a store; None: in memory.

    Raises:
        SpecError: if the location is a URL, or the empty name.
    """
    if location is None:
        return Memory()
    name = os.fspath(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", name):
        cause = "it is a URL, where files cannot be locked and written to the disk at once"
        raise problem(SpecError, "store", name, cause, "use a folder, and copy it when it is done")
    if os.path.normpath(name) in (".", "..", "/") or "\0" in name:
        raise problem(SpecError, "store", name, "it names no folder", "use a name such as run.zarr")
    return Folder(Path(os.path.realpath(name)), name)


def beside(folder: Folder, what: str) -> Path:
    """A hidden name next to a store, such as that of its lock."""
    return folder.path.with_name(f".{folder.path.name}.{what}")


def write_file(path: Path, content: bytes) -> None:
    """Writes one file; every byte of a store on disk passes through here."""
    path.write_bytes(content)


def synchronize(path: Path) -> None:
    """Returns when a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows does not open folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(files: Folder | Memory) -> Generator[None]:
    """Keeps a second sweep out of a store, also before it exists; a killed process lets go."""
    if fcntl is None or isinstance(files, Memory):
        yield
        return
    path = beside(files, "lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, files.name)
    except OSError as error:
        remedy = "use a location that can be written"
        raise OSError(f"store={files.name!r}: {error.strerror or error}; {remedy}") from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _acquire(path: Path, store: str) -> int:
    """An open handle that holds the lock at this path, and not one that was removed meanwhile."""
    assert fcntl is not None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        except BlockingIOError:
            os.close(handle)
            cause, remedy = "another sweep is writing to it", "wait for it, or use another name"
            raise problem(SpecError, "store", store, cause, remedy) from None
        except FileNotFoundError:
            pass
        os.close(handle)
