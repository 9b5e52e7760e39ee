"""The demo's plot: both loss curves, and how much faster each batch size became."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

BEFORE, AFTER, SERVING = "#777777", "#0072B2", "#E69F00"  # of Okabe and Ito's palette


def smooth(losses: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Step numbers and the mean over ``width`` steps around each."""
    width = max(1, min(width, len(losses)))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def draw(
    path: Path,
    label: str,
    losses: tuple[Sequence[float], Sequence[float]],
    speedups: Mapping[str, Mapping[int, float]],
    place: str,
) -> None:
    """Writes the plot as a PNG.

    Args:
        path: the file.
        label: the model.
        losses: of each step, as the model is and converted.
        speedups: "training" and "serving" -> batch size -> times as fast.
        place: the machine.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    width = len(losses[0]) // 20
    left.plot(*smooth(losses[0], width), color=BEFORE, linewidth=6, alpha=0.5, label="as it is")
    left.plot(*smooth(losses[1], width), color=AFTER, linewidth=1.8, label="after mtlkernels.convert")
    left.set_xlabel("training step")
    left.set_ylabel("training loss")
    left.set_title("The same model, seed and batches: the same training")
    left.legend(frameon=False)
    sizes = list(speedups["serving"])
    for offset, (name, colour) in zip((-0.2, 0.2), (("training", AFTER), ("serving", SERVING)), strict=True):
        at = [sizes.index(size) + offset for size in speedups[name]]
        bars = right.bar(at, list(speedups[name].values()), 0.38, color=colour, label=name)
        right.bar_label(bars, fmt="%.2f×", fontsize=8, padding=2)
    right.axhline(1.0, color=BEFORE, linewidth=1.2)
    right.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    right.set_xlabel("batch size (rows)")
    right.set_ylabel("times as fast as it is")
    right.set_title("A whole step of the model, median")
    right.margins(y=0.18)
    right.legend(frameon=False, ncols=2, loc="upper right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{label} on 2013 flights from New York. {place}", fontsize=11)
    figure.savefig(path, dpi=130)
