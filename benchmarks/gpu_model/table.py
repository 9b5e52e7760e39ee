"""Predictions as a Markdown table, and as what a JSON file holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.gpu_model.card import Card
from benchmarks.gpu_model.model import ASSUMPTIONS, MEMORY, RESOURCES, Prediction

HEAD = (
    "launch",
    "tile",
    "warps, stages",
    "programs",
    "at a time",
    "waves",
    "tensor cores",
    "registers",
    "shared KiB",
    *(f"{name} µs" for name in (*RESOURCES, MEMORY)),
    "one program µs",
    "binds",
    "total µs",
    "of peak",
)


@dataclass(frozen=True)
class Pass:
    """A forward or a backward pass: its name, the rows of its batch, and its launches."""

    name: str
    rows: int
    launches: Sequence[Prediction]

    @property
    def total(self) -> float:
        """Microseconds."""
        return sum(launch.total for launch in self.launches)

    def share(self, peak: float) -> float:
        return sum(launch.flop for launch in self.launches) / (1e-6 * self.total * peak)


def _row(launch: Prediction, peak: float) -> list[str]:
    tile = launch.tile
    return [
        launch.kernel,
        f"{tile.rows}x{tile.columns}x{tile.depth}",
        f"{tile.warps}, {tile.stages}",
        str(launch.programs),
        str(launch.resident),
        f"{launch.waves:.2f}",
        launch.product,
        str(launch.registers),
        f"{launch.shared / 1024:.0f}",
        *(f"{bound:.0f}" for bound in launch.bounds.values()),
        f"{launch.alone:.1f}",
        launch.binds,
        f"{launch.total:.0f}",
        f"{100 * launch.share(peak):.0f}%",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown(passes: Sequence[Pass], card: Card) -> str:
    """The passes, a table each, and what all of it rests on."""
    lines = [f"A model of one {card.name}, from compiled code; no kernel has run on it."]
    for each in passes:
        head = f"{each.name}, {each.rows} rows: {each.total:.0f} µs, {100 * each.share(card.peak):.0f}% of the peak"
        lines += ["", f"**{head}**", "", _line(HEAD), _line(["---"] * len(HEAD))]
        lines += [_line(_row(launch, card.peak)) for launch in each.launches]
    lines += ["", "Assumptions:", "", *(f"- {text}" for text in ASSUMPTIONS)]
    lines += [f"- `{name}` {getattr(card, name)}: {source}." for name, source in card.sources.items()]
    return "\n".join(lines)


def as_json(passes: Sequence[Pass], card: Card) -> dict[str, Any]:
    return {
        "card": asdict(card),
        "assumptions": ASSUMPTIONS,
        "passes": [
            {"name": each.name, "rows": each.rows, "us": each.total, "share": each.share(card.peak)}
            | {"launches": [asdict(launch) | {"share": launch.share(card.peak)} for launch in each.launches]}
            for each in passes
        ],
    }
