"""The documentation: ``sphinx-build -W docs docs/_build``."""

import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import generate

import meanfield_jax

generate.write()

project = "meanfield_jax"
author = "The meanfield_jax authors"
html_show_copyright = False
version = release = meanfield_jax.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx-mathjax-offline"]
exclude_patterns = ["_build", "api/command_help.md"]
nitpicky = True

html_theme = "furo"
html_title = f"meanfield_jax {version}"
html_copy_source = False
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["style.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
napoleon_custom_sections = [("Accuracy", "notes_style"), ("Source", "notes_style")]

# types that annotations mention, and Python's own exceptions, have no page here
nitpick_ignore_regex = [("py:(class|exc|obj)", r"(?!meanfield_jax).*")]


def for_sphinx(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Makes a docstring, which is written to be read as it is, fit for Napoleon.

    Several names with one description are kept together, asterisks and bars are themselves, and
    what stands before a colon is not taken for the type of an attribute or of what is returned:
    Napoleon looks for it in the first line, which becomes an empty comment.
    """
    for index, line in enumerate(lines):
        line = re.sub(r"^\s*[a-z_]+(, [a-z_]+)+(?=: )", lambda m: m[0].replace(", ", ","), line)
        if not re.search(r">>>|\\|:math:|\.\. ", line):
            parts = re.split("(``.+?``)", line)
            parts[::2] = [re.sub(r"(\*(?=\w)|\|)", r"\\\1", part) for part in parts[::2]]
            line = "".join(parts)
        lines[index] = line
    for index in [i for i, line in enumerate(lines) if line.strip() == "Returns:"]:
        lines[index + 1 : index + 1] = [lines[index].replace("Returns:", "    .."), ""]
    if what in ("attribute", "property"):
        lines[:0] = ["..", ""]


def setup(app: Any) -> None:
    """Registers what runs before Napoleon."""
    app.connect("autodoc-process-docstring", for_sphinx, priority=400)
