"""What the ablation found: means and spreads over seeds, a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation.training import PLAIN
from benchmarks.studies.results import COLOURS, auc_text, by_seed, data_note, gain_text, gains_over, lay_out


def gains(data: Mapping[str, Any], variant: str) -> np.ndarray:
    """[seeds, T]: the AUC less that of the plain sum with the same weights and batches, in thousandths."""
    return gains_over(data, variant, PLAIN.name)


def _cells(data: Mapping[str, Any], variant: str) -> list[str]:
    auc = by_seed(data, variant, "auc")
    conflicts = by_seed(data, variant, "conflicts").mean(axis=(0, 2))
    cells = [variant]
    for task in range(auc.shape[1]):
        cells.append(auc_text(auc[:, task]))
        cells.append("" if variant == PLAIN.name else gain_text(gains(data, variant)[:, task]))
    return [*cells, f"{100 * conflicts[0]:.0f}%", f"{100 * conflicts.mean():.0f}%", f"{100 * conflicts[-1]:.0f}%"]


def show(data: Mapping[str, Any], markdown: bool) -> str:
    """A line a variant. Gains are over the plain sum, seed by seed."""
    head = ["shared gradients"]
    for task in data["tasks"]:
        head += [f"AUC {task}", "gain ×1000"]
    head += ["conflicts at first", "on average", "at last"]
    lines = lay_out(head, [_cells(data, variant) for variant in data["variants"]], markdown)
    return "\n".join([*lines, "", *_notes(data)])


def _notes(data: Mapping[str, Any]) -> list[str]:
    """What the table is about."""
    settings = data["settings"]
    plain = [run for run in data["runs"] if run["variant"] == PLAIN.name]
    lengths = ", ".join(f"{run['max_norm']:.3g}" for run in plain)
    clipped = np.array([run["clipped"] for run in plain]).mean(0)
    shares = ", ".join(f"{task} {100 * share:.0f}%" for task, share in zip(data["tasks"], clipped, strict=True))
    return [
        f"Test AUC, mean ± standard deviation over {len(settings['seeds'])} seeds; gains are over the plain sum with"
        " the same first weights and batches, * where the mean is larger than its standard deviation.",
        f"{data_note(data)}; {data['shared']:,} shared parameters.",
        f"max_norm, the median norm in the first {settings['norm_steps']} steps of each seed's plain sum: {lengths}."
        f" Longer in the plain sum were: {shares}.",
        "Conflicts: pairs of tasks whose gradients have a negative inner product, as a share, in the first, all and the"
        f" last of {settings['windows']} stretches of the training.",
    ]


def draw(data: Mapping[str, Any], place: str, path: Path) -> None:
    """Gains of every seed a task, and conflicts over the training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    variants = dict(zip(data["variants"], COLOURS, strict=True))
    others = [name for name in variants if name != PLAIN.name]
    for at, name in enumerate(others):
        values = gains(data, name)
        for task in range(values.shape[1]):
            x = task + (at - (len(others) - 1) / 2) * 0.15
            left.plot(np.full(len(values), x), values[:, task], "o", color=variants[name], markersize=5, alpha=0.45)
            mean = values[:, task].mean()
            left.hlines(mean, x - 0.06, x + 0.06, color=variants[name], linewidth=3)
    left.axhline(0, color=COLOURS[0], linewidth=1.2)
    left.set_xticks(range(len(data["tasks"])), data["tasks"])
    left.set_ylabel("test AUC less that of the plain sum, in thousandths")
    left.set_title("A dot a seed, a bar their mean; above zero is better")
    for name, colour in variants.items():
        conflicts = 100 * by_seed(data, name, "conflicts").mean(axis=2)
        steps = (np.arange(conflicts.shape[1]) + 0.5) * data["steps"] / conflicts.shape[1]
        right.plot(steps, conflicts.mean(0), color=colour, linewidth=2, label=name)
        right.fill_between(steps, conflicts.min(0), conflicts.max(0), color=colour, alpha=0.12, linewidth=0)
    right.set_xlabel("training step")
    right.set_ylabel("conflicting pairs of tasks (%)")
    right.set_ylim(bottom=0)
    right.set_title("Pairs with a negative inner product; bands: all seeds")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(variants), frameon=False)
    figure.suptitle(f"MMoE on 2013 flights from New York: what is done to the shared gradients. {place}", fontsize=11)
    figure.savefig(path, dpi=130)
