"""The site's configuration: ``make docs`` builds it, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import mtlkernels  # noqa: E402

project = "mtlkernels"
author = "the authors of mtlkernels"
release = version = mtlkernels.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "picture",
    "examples",
]
exclude_patterns = ["_build", "_ext"]

html_theme = "furo"
html_title = f"mtlkernels {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_copyright = False
# A page that is opened as a file may not fetch the others, from which summaries are made.
html_show_search_summary = False
# Without a host of fonts or scripts: what a page needs lies beside it.
html_theme_options = {"navigation_with_keys": True}

myst_heading_anchors = 3
myst_links_external_new_tab = False

nitpicky = True
# What is not this package's is nowhere to be linked to without a network, and what is private has no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(?!mtlkernels).*"),
    (r"py:.*", r"mtlkernels\.ops\..*"),
    (r"py:.*", r"mtlkernels\.(\w+\.)*_\w+\..*"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
copybutton_exclude = ".linenos, .gp, .go"


def leave_room(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    """Pages of wide tables are as wide as the window."""
    if page.startswith("performance/") and page != "performance/index":
        context["meta"] = {**(context["meta"] or {}), "hide-toc": True}


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", leave_room, priority=100)  # before the theme looks
