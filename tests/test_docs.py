"""What is shown to users runs: docstring examples, the README's blocks, the notebooks' sources."""

import doctest
import importlib
import json
import pkgutil
import re
from pathlib import Path

import pytest

import meanfield_jax

ROOT = Path(__file__).parent.parent
MODULES = [
    info.name
    for info in pkgutil.walk_packages(meanfield_jax.__path__, "meanfield_jax.")
    if not info.name.endswith("__main__")
]
SLOW = ("meanfield_jax.experiments.", "meanfield_jax.objectives", "meanfield_jax.layers.proxy_norm")
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
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


def test_the_readme_has_blocks():
    assert len(BLOCKS) > 1


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_each_readme_block_runs_by_itself(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_readme_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), path


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
