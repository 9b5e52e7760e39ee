"""The demo's plots: both loss curves beside how much faster each batch size became, or which tasks conflict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

BEFORE, AFTER, SERVING = "#777777", "#0072B2", "#E69F00"  # of Okabe and Ito's palette
PAIRS = (("#009E73", "-"), ("#D55E00", "-"), ("#CC79A7", "--"))  # two of them often conflict in the same steps
Losses = tuple[Sequence[float], Sequence[float]]


def smooth(losses: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Step numbers and the mean over ``width`` steps around each."""
    width = max(1, min(width, len(losses)))
    means = np.convolve(losses, np.ones(width) / width, mode="valid")
    return np.arange(len(means)) + (width + 1) / 2, means


def _panels() -> tuple[Any, Any, Any]:
    """A figure and its two panels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure, left, right


def _draw_losses(axes: Any, losses: Losses, labels: tuple[str, str], title: str) -> None:
    width = len(losses[0]) // 20
    axes.plot(*smooth(losses[0], width), color=BEFORE, linewidth=6, alpha=0.5, label=labels[0])
    axes.plot(*smooth(losses[1], width), color=AFTER, linewidth=1.8, label=labels[1])
    axes.set_xlabel("training step")
    axes.set_ylabel("training loss")
    axes.set_title(title)
    axes.legend(frameon=False)


def _save(figure: Any, title: str, path: Path) -> None:
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def draw(path: Path, label: str, losses: Losses, speedups: Mapping[str, Mapping[int, float]], place: str) -> None:
    """Writes the plot of a model as it is and converted as a PNG.

    Args:
        path: the file.
        label: the model.
        losses: of each step, as the model is and converted.
        speedups: "training" and "serving" -> batch size -> times as fast.
        place: the machine.
    """
    figure, left, right = _panels()
    title = "The same model, seed and batches: the same training"
    _draw_losses(left, losses, ("as it is", "after mtlkernels.convert"), title)
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
    _save(figure, f"{label} on 2013 flights from New York. {place}", path)


def draw_surgery(path: Path, label: str, losses: Losses, conflicts: Mapping[str, Sequence[bool]], place: str) -> None:
    """Writes the plot of the trainings under PCGrad as a PNG.

    Args:
        path: the file.
        label: the model.
        losses: of each step, as the model is under the usual PCGrad, and converted under ``mtlkernels.optim.PCGrad``.
        conflicts: a pair of tasks -> whether its gradients conflict in each step of the second.
        place: the machine.
    """
    figure, left, right = _panels()
    title = "The same seed, batches and order of projections"
    _draw_losses(left, losses, ("as it is, the usual PCGrad", "converted, mtlkernels.optim.PCGrad"), title)
    width = max(1, len(losses[0]) // 10)
    for (pair, found), (colour, line) in zip(conflicts.items(), PAIRS, strict=True):
        at, shares = smooth([float(conflict) for conflict in found], width)
        right.plot(at, 100 * shares, line, color=colour, linewidth=1.8, label=pair)
    right.set_xlabel("training step")
    right.set_ylabel(f"share of steps, mean over {width} (%)")
    right.set_ylim(-3, 135)  # with room for the legend
    right.set_yticks(range(0, 101, 20))
    right.set_title("Pairs of tasks whose gradients conflict")
    right.legend(frameon=False, loc="upper right")
    _save(figure, f"{label} on 2013 flights from New York, under PCGrad. {place}", path)
