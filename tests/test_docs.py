"""What is shown to users runs: examples in docstrings, README and documentation, notebooks."""

import doctest
import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import pytest

import meanfield_jax
from meanfield_jax.cli import program

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

import generate  # noqa: E402
import render  # noqa: E402

MODULES = [
    info.name
    for info in pkgutil.walk_packages(meanfield_jax.__path__, "meanfield_jax.")
    if not info.name.endswith("__main__")
]
SLOW = ("meanfield_jax.experiments.", "meanfield_jax.objectives", "meanfield_jax.layers.proxy_norm")
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
BLOCKS = BLOCK.findall(README)
DOCS = ROOT / "docs"
PAGES = [path for path in render.PAGES if BLOCK.search(path.read_text())]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(SLOW) else ())
        for name in MODULES
    ],
)
def test_docstring_examples_run(name):
    result = doctest.testmod(
        importlib.import_module(name),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert result.failed == 0


def test_public_names_exist_and_are_documented():
    for name in meanfield_jax.__all__:
        assert getattr(meanfield_jax, name).__doc__, name


def test_the_readme_is_one_screen_with_code():
    assert BLOCKS
    assert len(README.splitlines()) <= 90


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_each_readme_block_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_blocks_of_a_page_run_one_after_another(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCK.findall(page.read_text()):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", render.PAGES, ids=lambda path: str(path.relative_to(DOCS)))
def test_the_results_on_a_page_are_those_of_the_benchmarks(page):
    text = page.read_text()
    assert render.rendered(text) == text, "run python docs/render.py"
    marks = re.findall(r"<!-- (result:|end of result)", text)
    assert marks == ["result:", "end of result"] * (len(marks) // 2)


def test_the_citation_is_of_this_version():
    assert f"\nversion: {meanfield_jax.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_public_name_is_in_the_reference():
    named = [name for _, names in generate.REFERENCE.values() for name in names]
    assert len(named) == len(set(named))
    assert {name for name in named if "." not in name} == set(meanfield_jax.__all__)


def test_every_command_has_its_help():
    text = generate.command_line()
    assert re.findall(r"^## (.*)", text, re.MULTILINE) == list(program.COMMANDS)
    assert text.count("usage: meanfield-jax") == len(program.COMMANDS) + 1


@pytest.mark.parametrize("page", [ROOT / "README.md", *render.PAGES], ids=lambda path: path.stem)
def test_pictures_exist(page):
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text()):
        assert (page.parent / path).is_file(), path


def cells(source: str) -> list[str]:
    """The code cells of a percent script."""
    parts = re.split(r"^# %%", source, flags=re.MULTILINE)[1:]
    return [part.partition("\n")[2].strip() for part in parts if "[markdown]" not in part[:20]]


@pytest.mark.parametrize("source", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_executed_from_its_source(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert ["".join(cell["source"]).strip() for cell in code] == cells(source.read_text())
    assert all(cell["execution_count"] for cell in code)
    assert all(out["output_type"] != "error" for cell in code for out in cell["outputs"])
