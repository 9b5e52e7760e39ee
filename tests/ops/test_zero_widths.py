"""Every operator on layers of no features and batches of no rows, by every instruction set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mtlkernels import _extension

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["reference", *_extension.instruction_sets()])
def test_every_operator(name: str) -> None:
    """In a process of its own, which a division by zero would kill."""
    command = [sys.executable, "-m", "tests.ops.zero_widths", name]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0 and " 0 failed" in run.stdout, run.stdout[-5000:]
