"""Every operator on layers of no features and batches of no rows, by every instruction set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.summary import note_those_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("half", [0, 1])
def test_every_operator(half: int) -> None:
    """In processes of their own, which a division by zero would kill."""
    command = [sys.executable, "-m", "tests.ops.zero_widths", "2", str(half)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " 0 failed" in run.stdout, run.stdout[-5000:]
    note_those_of(run.stdout, f"in zero_widths.py, half {half}")
