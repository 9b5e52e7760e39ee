"""A child of a fork can make calls, whatever the parent's other threads were doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mtlkernels import _extension

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "fork") or not _extension.loaded(), reason="no fork, or no C++ kernels")
def test_children_of_a_fork_during_calls() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.ops.forking"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
