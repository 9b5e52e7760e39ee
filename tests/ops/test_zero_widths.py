"""Every operator on layers of no features and batches of no rows, by every instruction set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtlkernels import _extension
from tests.summary import note_those_of

ROOT = Path(__file__).parents[2]


NAMES = ("reference", *_extension.instruction_sets())
THIRDS = NAMES[1:-1]  # which share their sources with the best: each checks a third, and three of them all


@pytest.mark.parametrize("name", NAMES)
def test_every_operator(name: str) -> None:
    """In a process of its own, which a division by zero would kill."""
    part = ("3", str(THIRDS.index(name) % 3)) if name in THIRDS else ("1", "0")
    command = [sys.executable, "-m", "tests.ops.zero_widths", name, *part]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " 0 failed" in run.stdout, run.stdout[-5000:]
    note_those_of(run.stdout, f"in zero_widths.py by {name}")
