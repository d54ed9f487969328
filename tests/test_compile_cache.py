"""Where compiled programs are kept between test runs, how many, and what is silenced."""

import os
import subprocess
import sys
from pathlib import Path

import compile_cache
import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).parent
LINE = "E1 cpu_aot_loader.cc:195] Target machine feature {} is not  supported on the host\n"


def settings(**environment: str) -> str:
    """What a shell is told to set in this environment."""
    command = "import compile_cache; compile_cache.print_settings()"
    kept = {name: os.environ[name] for name in ("PATH",)}
    return subprocess.run(
        [sys.executable, "-c", command],
        env=kept | environment,
        cwd=HERE,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_the_folder_is_the_users(tmp_path):
    expected = tmp_path / "meanfield_jax" / "tests" / compile_cache.machine()
    assert f"JAX_COMPILATION_CACHE_DIR={expected}\n" in settings(XDG_CACHE_HOME=str(tmp_path))
    assert expected.is_dir()
    at_home = settings(HOME=str(tmp_path))
    assert f"JAX_COMPILATION_CACHE_DIR={tmp_path}/.cache/meanfield_jax/tests/" in at_home


def test_a_folder_that_is_set_is_used_and_small_programs_are_kept_there(tmp_path):
    given = settings(JAX_COMPILATION_CACHE_DIR="/elsewhere", XDG_CACHE_HOME=str(tmp_path))
    assert "JAX_COMPILATION_CACHE_DIR=/elsewhere\n" in given
    assert "MIN_COMPILE_TIME_SECS=0" in given
    assert not list(tmp_path.iterdir())


def test_without_a_folder_that_can_be_made_there_is_none(tmp_path):
    file = tmp_path / "file"
    file.touch()
    assert "CACHE_DIR" not in settings(XDG_CACHE_HOME=str(file))


def test_another_version_or_processor_has_a_folder_of_its_own(monkeypatch):
    here = compile_cache.machine()
    monkeypatch.setattr(compile_cache, "version", lambda package: "9.9")
    other = compile_cache.machine()
    assert other != here
    assert other.startswith("jax-9.9-")
    monkeypatch.setattr(compile_cache.platform, "machine", lambda: "other")
    assert compile_cache.machine() != other


def test_the_oldest_entries_go_first(tmp_path):
    for age in range(5):
        path = tmp_path / f"version-{age % 2}" / f"entry-{age}"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10)
        os.utime(path, (1000 - age, 1000 - age))
    compile_cache.bound(tmp_path, 25)
    assert sorted(path.name for path in tmp_path.rglob("entry-*")) == ["entry-0", "entry-1"]


def test_only_preferences_of_the_compiler_are_silenced():
    preference, feature = LINE.format("+prefer-no-gather"), LINE.format("+avx512f")
    text = f"before\n{preference}{feature}after\n"
    assert compile_cache.without_harmless(text) == f"before\n{feature}after\n"


def test_what_measures_compilation_does_without(compiles_anew):
    events = []
    listener = lambda event, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_listener(listener)
    try:
        for _ in range(2):
            jax.clear_caches()
            np.asarray(jax.jit(lambda x: x + 1)(jnp.ones(3)))
    finally:
        jax.monitoring.unregister_event_listener(listener)
    assert not any("compilation_cache/cache_" in event for event in events)
