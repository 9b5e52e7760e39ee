"""Runs the kernels under Triton's interpreter, in processes of their own: Triton decides when it is first imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.summary import note_those_of

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
# What one process runs: several may do so at a time, and each takes seconds to start.
FILES = (
    ("interpreted.py",),
    ("interpreted_norms.py", "interpreted_launches.py", "interpreted_pcgrad.py"),
    ("interpreted_recordings.py", "interpreted_memory.py", "interpreted_checker.py"),
)


@pytest.mark.parametrize("names", FILES, ids=", ".join)
def test_kernels_agree_with_the_reference(names: tuple[str, ...]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    own = ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]  # Triton 3.6's interpreter's
    paths = [f"tests/triton/{name}" for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *own, *paths]
    run = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = run.stdout.decode(errors="replace")
    assert run.returncode == 0, output[-10000:]
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output[-2000:]
    note_those_of(output, f"in {', '.join(names)}")
