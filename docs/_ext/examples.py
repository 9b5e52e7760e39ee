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
    """A section a file: programs in the order of their names, then what they share."""

    def run(self) -> list[nodes.Node]:
        sources = {path: path.read_text() for path in sorted(FOLDER.glob("*.py"))}
        return [self._section(path, sources[path]) for path in sorted(sources, key=lambda p: _is_shared(sources[p]))]

    def _section(self, path: Path, source: str) -> nodes.section:
        self.env.note_dependency(str(path))
        section = nodes.section(ids=[nodes.make_id(path.stem)], names=[path.stem])
        section += nodes.title(path.name, path.name)
        words = ast.get_docstring(ast.parse(source)) or ""
        lines = [*words.splitlines(), "", f"```{{literalinclude}} /../examples/{path.name}", ":language: python", "```"]
        self.state.nested_parse(StringList(lines, source=str(path)), self.content_offset, section)
        return section


def _is_shared(source: str) -> bool:
    return "__main__" not in source


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("examples", Examples)
    return {"parallel_read_safe": True}
