"""Ctrl-C during a call: KeyboardInterrupt comes when the call has returned, and everything that it wrote is whole."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import requires

ROOT = Path(__file__).parents[2]


@requires.cpp_kernels
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to threads, which this system lacks")
def test_interrupts_during_calls() -> None:
    """In a process of its own, whose main thread is the one that signals reach."""
    command = [sys.executable, "-W", "error", "-m", "tests.ops.interrupting"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
