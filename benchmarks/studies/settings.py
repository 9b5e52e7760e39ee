"""How much the studies train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What all studies have to choose.

    Args:
        seeds: each a training of every variant.
        epochs, batch: passes over the training period, rows a step.
        learning_rate: Adam's.
        rows: flights, evenly over the year; all by default.
        windows: stretches of the training over which what is seen in its steps is averaged.
    """

    seeds: Sequence[int] = (1, 2, 3, 4, 5)
    epochs: int = 2
    batch: int = 512
    learning_rate: float = 1e-3
    rows: int | None = None
    windows: int = 20
