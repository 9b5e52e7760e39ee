"""A progress bar for terminals; elsewhere one line when the work is done."""

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
    SECONDS = 0.2  # between two drawings

    def __init__(self, label: str, total: int, stream: TextIO | None = None) -> None:
        self.label, self.total = label, total
        self.stream = stream or sys.stdout
        self.start = time.perf_counter()
        self._drawn = 0.0

    def __call__(self, step: int, loss: float) -> None:
        """Reports that ``step`` steps are done, and the last one's loss."""
        now = time.perf_counter()
        done = step == self.total
        if not done and (not self.stream.isatty() or now - self._drawn < self.SECONDS):
            return
        self._drawn = now
        filled = self.WIDTH * step // self.total
        bar = "#" * filled + "." * (self.WIDTH - filled)
        line = f"  {self.label:<10} [{bar}] {step}/{self.total} steps  loss {loss:.4f}  {now - self.start:.0f} s"
        start = "\r" if self.stream.isatty() else ""
        self.stream.write(start + line + ("\n" if done else ""))
        self.stream.flush()
