"""A small SVG writer. Colours are the theme's, so that pictures follow it from light to dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

INK = "var(--color-foreground-primary)"
QUIET = "var(--color-foreground-muted)"
PAPER = "var(--color-background-secondary)"
# A task each, and what tasks share. Strong enough to be read on white and on black.
TASKS = ("#3b82c4", "#d9752b")
SHARED = "#3f9a5f"
AGAINST = "#c8484a"

Point = tuple[float, float]


class Drawing:
    """Collects shapes; sizes are in units of the picture, about a pixel on a wide screen.

    Args:
        width, height: of the picture. 460 units fill a telephone, where text of size 15 can still be read.
        label: what the picture shows, for those who cannot see it.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self._shapes: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, *,
        fill: str = PAPER, stroke: str = QUIET, opacity: float = 1.0, dashed: bool = False, corner: float = 5,
    ) -> None:  # fmt: skip
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}" fill="{fill}"'
            f' fill-opacity="{opacity:g}" stroke="{stroke}" stroke-width="1.4"{dashes}/>'
        )

    def text(
        self, x: float, y: float, words: str, *,
        size: float = 15, anchor: str = "middle", colour: str = INK, bold: bool = False,
    ) -> None:  # fmt: skip
        weight = ' font-weight="600"' if bold else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" fill="{colour}"{weight}>'
            f"{escape(words)}</text>"
        )

    def named(self, x: float, y: float, width: float, height: float, words: str, colour: str, **text: float) -> None:
        """A tinted box with words in its middle."""
        self.box(x, y, width, height, fill=colour, stroke=colour, opacity=0.16)
        self.text(x + width / 2, y + height / 2 + 5, words, **text)

    def line(self, start: Point, end: Point, *, colour: str = QUIET, width: float = 1.4, dashed: bool = False) -> None:
        dashes = ' stroke-dasharray="4 4"' if dashed else ""
        self._shapes.append(
            f'<line x1="{start[0]:g}" y1="{start[1]:g}" x2="{end[0]:g}" y2="{end[1]:g}" stroke="{colour}"'
            f' stroke-width="{width:g}"{dashes}/>'
        )

    def arrow(self, start: Point, end: Point, *, colour: str = QUIET, width: float = 1.4, dashed: bool = False) -> None:
        """A line with a head at its end."""
        dx, dy = end[0] - start[0], end[1] - start[1]
        length = (dx * dx + dy * dy) ** 0.5
        along, across = (dx / length, dy / length), (-dy / length, dx / length)
        head = 5 + 2 * width
        neck = (end[0] - head * along[0], end[1] - head * along[1])
        wing = 0.45 * head
        self.line(start, neck, colour=colour, width=width, dashed=dashed)
        corners = (
            end,
            (neck[0] + wing * across[0], neck[1] + wing * across[1]),
            (neck[0] - wing * across[0], neck[1] - wing * across[1]),
        )
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self._shapes.append(f'<polygon points="{points}" fill="{colour}"/>')

    def curve(self, points: Sequence[Point], *, colour: str, width: float = 2.0) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>')

    def svg(self) -> str:
        """The picture as an element of a page."""
        return (
            f'<svg class="picture" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}"'
            f' style="max-width: {self.width:g}px" role="img" aria-label="{escape(self.label)}">'
            f"{''.join(self._shapes)}</svg>"
        )
