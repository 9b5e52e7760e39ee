"""The directive ``{picture} NAME``: a drawing of :mod:`pictures` in the page, with the directive's text below it."""

from __future__ import annotations

from typing import Any

from docutils import nodes
from pictures import PICTURES
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Picture(SphinxDirective):
    """A figure, whose caption is the content."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in PICTURES:
            raise self.error(f"no picture {name!r}; there are {', '.join(PICTURES)}")
        figure = nodes.figure()
        figure += nodes.raw("", PICTURES[name]().svg(), format="html")
        paragraphs = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, paragraphs)
        figure += nodes.caption("", "", *(child for p in paragraphs.children for child in p.children))
        return [figure]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("picture", Picture)
    return {"parallel_read_safe": True}
