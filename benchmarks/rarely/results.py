"""What old weights did: means and spreads over seeds, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rarely.training import METHODS, PLAIN, Variant
from benchmarks.studies.results import COLOURS, auc_text, by_seed, data_note, gain_text, gains_over, lay_out, spread


def base_of(variant: Mapping[str, Any]) -> str:
    """What a variant is held against: its method with new weights in each step, and that against the plain sum."""
    return PLAIN.name if variant["every"] == 1 else Variant(variant["method"]).name


def angles(data: Mapping[str, Any], variant: str) -> np.ndarray:
    """[measurements, 3] of all seeds: the weights' age, the angle of their update, that of the plain sum's."""
    found = [row for run in data["runs"] if run["variant"] == variant for row in run["angles"]]
    return np.array(found, dtype=float).reshape(-1, 3)


def _cells(data: Mapping[str, Any], variant: Mapping[str, Any]) -> list[str]:
    name = variant["name"]
    auc, loss = by_seed(data, name, "auc"), by_seed(data, name, "loss")[:, -1]
    cells = [name, f"{data['milliseconds'][name]:.2f}"]
    measured = angles(data, name)
    cells += [f"{value:.1f}°" for value in measured[:, 1:].mean(0)] if len(measured) else ["", ""]
    cells.append(f"{loss.mean():.4f} ± {float(spread(loss)):.4f}")
    for task in range(auc.shape[1]):
        cells.append(auc_text(auc[:, task]))
        cells.append("" if name == PLAIN.name else gain_text(gains_over(data, name, base_of(variant))[:, task]))
    return cells


def show(data: Mapping[str, Any], markdown: bool) -> str:
    """A line a variant. Gains of a method are over the plain sum, those of k over the method, seed by seed."""
    head = ["shared gradients", "ms a step", "old to new weights", "plain sum to new weights", "loss at last"]
    for task in data["tasks"]:
        head += [f"AUC {task}", "gain ×1000"]
    lines = lay_out(head, [_cells(data, variant) for variant in data["variants"]], markdown)
    settings = data["settings"]
    notes = [
        f"Test AUC, mean ± standard deviation over {len(settings['seeds'])} seeds. Gains of a method are over the plain"
        " sum with the same first weights and batches, those of k over the method itself, * where the mean is larger"
        " than its standard deviation.",
        f"{data_note(data)}; {data['shared']:,} shared parameters.",
        "Angles: between the update by weights of an earlier batch, or by none, and the update by the weights of the"
        f" batch's own Gram matrix at the same parameters, means over one in {settings['probe']} of such steps.",
        f"ms a step: of {data['threads']} thread(s), on one batch, medians of all variants by turns.",
        f"Loss: the sum over tasks, in the last of {settings['windows']} stretches of the training.",
    ]
    return "\n".join([*lines, "", *notes])


def draw(data: Mapping[str, Any], place: str, path: Path) -> None:
    """What k does to every seed's AUC, and angles by the age of the weights."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours = dict(zip(METHODS, COLOURS[3:], strict=False))
    shown = [variant for variant in data["variants"] if variant["method"]]
    for at, variant in enumerate(shown):
        values = gains_over(data, variant["name"], PLAIN.name)
        for task in range(values.shape[1]):
            x = task + (at - (len(shown) - 1) / 2) * 0.08
            colour = colours[variant["method"]]
            left.plot(np.full(len(values), x), values[:, task], "o", color=colour, markersize=4, alpha=0.45)
            mean = values[:, task].mean()
            left.hlines(mean, x - 0.035, x + 0.035, color=colour, linewidth=3)
    left.axhline(0, color=COLOURS[0], linewidth=1.2)
    left.set_xticks(range(len(data["tasks"])), data["tasks"])
    left.set_ylabel("test AUC less that of the plain sum, in thousandths")
    every = ", ".join(str(variant["every"]) for variant in shown if variant["method"] == shown[0]["method"])
    left.set_title(f"A dot a seed, a bar their mean; from left to right k = {every}")
    oldest = max(variant["every"] for variant in shown)
    for method, colour in colours.items():
        found = angles(data, Variant(method, oldest).name)
        ages = np.unique(found[:, 0])
        right.plot(ages, [found[found[:, 0] == age, 1].mean() for age in ages], color=colour, linewidth=2, label=method)
        right.axhline(found[:, 2].mean(), color=colour, linestyle="--", linewidth=1.2, label=f"{method}: plain sum")
    right.set_xlabel("age of the weights, in steps")
    right.set_ylabel("angle to the update by new weights (°)")
    right.set_ylim(bottom=0)
    right.set_title(f"Updates by old weights, and the plain sum's, at k = {oldest}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2 * len(colours), frameon=False)
    figure.suptitle(f"MMoE on 2013 flights from New York: a Gram matrix in one step of k. {place}", fontsize=11)
    figure.savefig(path, dpi=130)
