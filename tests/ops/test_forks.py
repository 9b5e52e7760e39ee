"""A child of a fork can make calls, whatever the parent has computed and its other threads were doing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import requires

ROOT = Path(__file__).parents[2]


pytestmark = [
    requires.cpp_kernels,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks, which this system lacks"),
]


def run(module: str) -> None:
    command = [sys.executable, "-W", "error", "-m", module]
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert found.returncode == 0, found.stdout[-5000:]


def test_children_of_a_fork_during_calls() -> None:
    run("tests.ops.forking")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' runtimes see to it themselves")
def test_children_of_a_process_that_computed_on_several_threads() -> None:
    run("tests.ops.preforking")
