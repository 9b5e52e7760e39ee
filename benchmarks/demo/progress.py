"""A progress bar for terminals; elsewhere, as in a pipe or a file, a line every few seconds."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Counts steps towards a known number.

    Args:
        label: what is being done.
        total: the number of steps.
        stream: where to write; by default what is standard output at that time.
    """

    WIDTH = 30
    SECONDS = 0.2  # between two drawings on a terminal
    SECONDS_ELSEWHERE = 5.0  # between two lines

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label, self.total = label, total
        self.stream = stream or sys.stdout
        self.start = time.perf_counter()
        # A terminal gets its bar at the first step.
        self._drawn = 0.0 if self.stream.isatty() else self.start

    def __call__(self, step: int, loss: float) -> None:
        """Reports that ``step`` steps are done, and the last one's loss."""
        now = time.perf_counter()
        done, terminal = step == self.total, self.stream.isatty()
        if not done and now - self._drawn < (self.SECONDS if terminal else self.SECONDS_ELSEWHERE):
            return
        self._drawn = now
        filled = self.WIDTH * step // self.total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"  {self.label:<10} [{bar}] {step}/{self.total} steps  loss {loss:.4f}  {now - self.start:.0f} s"
        self.stream.write(("\r" if terminal else "") + line + ("\n" if done or not terminal else ""))
        self.stream.flush()
