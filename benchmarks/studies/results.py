"""Means and spreads over seeds, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

COLOURS = ("#777777", "#E69F00", "#CC79A7", "#0072B2", "#009E73", "#D55E00")  # of Okabe and Ito's palette
UNIT = 1e-3  # of differences in AUC


def by_seed(data: Mapping[str, Any], variant: str, key: str) -> np.ndarray:
    """[seeds, ...]: what each training of a variant gave."""
    return np.array([run[key] for run in data["runs"] if run["variant"] == variant], dtype=float)


def spread(values: np.ndarray) -> np.ndarray:
    """The standard deviation over seeds."""
    result: np.ndarray = values.std(axis=0, ddof=1) if len(values) > 1 else np.full(values.shape[1:], np.nan)
    return result


def gains_over(data: Mapping[str, Any], variant: str, base: str) -> np.ndarray:
    """[seeds, T]: the AUC less that of another variant with the same seed, in thousandths."""
    difference: np.ndarray = (by_seed(data, variant, "auc") - by_seed(data, base, "auc")) / UNIT
    return difference


def auc_text(values: np.ndarray) -> str:
    """Mean and spread of one task's."""
    return f"{values.mean():.4f} ± {float(spread(values)):.4f}"


def gain_text(values: np.ndarray) -> str:
    """Mean and spread, and a mark where the mean is larger."""
    mean, deviation = values.mean(), float(spread(values))
    return f"{mean:+.2f} ± {deviation:.2f}{' *' if abs(mean) > deviation else ''}"


def lay_out(head: Sequence[str], grid: Sequence[Sequence[str]], markdown: bool) -> list[str]:
    """The lines of a table: Markdown's, or aligned columns."""
    if markdown:
        rule = ["---", *(["---:"] * (len(head) - 1))]
        return [f"| {' | '.join(line)} |" for line in [head, rule, *grid]]
    widths = [max(len(line[column]) for line in [head, *grid]) for column in range(len(head))]
    lines = ["  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)).rstrip() for line in [head, *grid]]
    lines.insert(1, "-" * max(map(len, lines)))
    return lines


def data_note(data: Mapping[str, Any]) -> str:
    """What all variants were trained on, and how."""
    settings = data["settings"]
    return (
        f"{data['train']:,} flights to train, {data['test']:,} to test, {settings['epochs']} epochs of batches of"
        f" {settings['batch']}, Adam {settings['learning_rate']:g}"
    )
