"""The host's time for a level's calls on a GPU, by a driver that launches nothing: see ``benchmarks/gpu_host``.

Workload A's level in bfloat16, whose experts are more and more: served, and a forward and a backward pass. Beside it
stands what PyTorch itself takes to carry as many tensors through an autograd Function that does nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.case import Study


def run(device: torch.device, quick: bool) -> dict[str, Any]:
    """The device does not matter: there is none. Triton is imported here."""
    from benchmarks.gpu_host import calls

    experts, count = (calls.EXPERTS[:1], 5) if quick else (calls.EXPERTS, calls.CALLS)
    widths = calls.SMALL if quick else calls.WIDTHS
    return {"targets": calls.TARGETS, "rows": [calls.measure(each, calls.ROWS, count, widths) for each in experts]}


def show(found: Mapping[str, Any], markdown: bool) -> str:
    from benchmarks.gpu_host import calls

    return calls.table(found["rows"])


def draw(found: Mapping[str, Any], place: str, path: Path) -> None:
    """Microseconds against the number of experts."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for call in found["rows"][0]["microseconds"]:
        times = [row["microseconds"][call]["median"] for row in found["rows"]]
        axes.plot([row["experts"] for row in found["rows"]], times, "o-", label=call)
    axes.set(
        xlabel="experts", ylabel="host, µs a call", ylim=(0, None), title=f"The host's part of a call on a GPU\n{place}"
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


STUDY = Study(
    name="gpu-host",
    title="The host's time for a call on a GPU, with a driver that launches nothing",
    run=run,
    show=show,
    draw=draw,
)
