"""Compiled programs are kept from one test run to the next, in the user's cache folder.

Imported before JAX, whose settings come from the environment, so that the processes that tests
start share them. A folder that is already set is used as it is.
"""

import hashlib
import os
import platform
import shlex
from importlib.metadata import version
from pathlib import Path

LIMIT = 2**30
"""Bytes kept of all machines and versions together; the oldest entries go first."""

SETTINGS = {
    # small programs, too: there are thousands
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}

HARMLESS = "cpu_aot_loader.cc", "+prefer-no-"
"""Marks of a line on stderr that jaxlib 0.10 prints for each program it loads.

prefer-no-gather and prefer-no-scatter are preferences of LLVM for a processor and no features of
it: the loader looks for them among the processor's and does not find them, on the very machine
that compiled. Lines on true features lack the second mark.
"""


def machine() -> str:
    """What programs are compiled for: versions, and the processor with its features."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    told_apart = [platform.machine(), *processor, version("jaxlib")]
    digest = hashlib.sha256("\n".join(told_apart).encode()).hexdigest()[:12]
    return f"jax-{version('jax')}-{digest}"


def start() -> None:
    """Sets the environment; without a folder that can be written there is no cache."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(home) / "meanfield_jax" / "tests" / machine()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        bound(folder.parent)


def print_settings() -> None:
    """The settings as a shell's commands, for programs other than tests."""
    start()
    for name in ("JAX_COMPILATION_CACHE_DIR", *SETTINGS):
        if name in os.environ:
            print(f"export {name}={shlex.quote(os.environ[name])}")


def bound(folder: Path, limit: int = LIMIT) -> None:
    """Removes the oldest files below a folder until the others fit into the limit."""
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    excess = sum(stat.st_size for _, stat in files) - limit
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime):
        if excess <= 0:
            return
        path.unlink(missing_ok=True)
        excess -= stat.st_size


def without_harmless(text: str) -> str:
    """The text less the lines that mean nothing, see ``HARMLESS``."""
    lines = text.splitlines(keepends=True)
    return "".join(line for line in lines if not all(mark in line for mark in HARMLESS))
