"""The directive ``{examples}``: the programs of the folder ``examples``, each with its docstring and its source."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

FOLDER = Path(__file__).resolve().parents[2] / "examples"


class Examples(SphinxDirective):
    """A section a program, in the order of their names."""

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(FOLDER))
        lines: list[str] = []
        for path in sorted(FOLDER.glob("*.py")):
            words = ast.get_docstring(ast.parse(path.read_text())) or ""
            lines += [f"**{path.name}**", "", *words.splitlines(), ""]
            lines += [f"```{{literalinclude}} /../examples/{path.name}", ":language: python", "```", ""]
        found = nodes.container()
        self.state.nested_parse(StringList(lines, source=str(FOLDER)), self.content_offset, found)
        return list(found.children)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("examples", Examples)
    return {"parallel_read_safe": True}
