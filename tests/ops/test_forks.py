"""A child of a fork can make calls, whatever the parent's other threads were doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import requires

ROOT = Path(__file__).parents[2]


@requires.cpp_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks, which this system lacks")
def test_children_of_a_fork_during_calls() -> None:
    command = [sys.executable, "-W", "error", "-m", "tests.ops.forking"]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout[-5000:]
