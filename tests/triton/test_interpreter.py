"""Runs the kernels under Triton's interpreter, in processes of their own: Triton decides when it is first imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
FILES = ("interpreted.py", "interpreted_norms.py", "interpreted_launches.py", "interpreted_pcgrad.py")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[str], Path]]]:
    """A process for each file, all at once, and where its output goes: the interpreter uses one core."""
    folder = tmp_path_factory.mktemp("interpreter")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    found = {}
    for name in FILES:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/triton/{name}"]
        path = folder / f"{name}.txt"
        with path.open("w") as out:
            run = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, text=True)
        found[name] = (run, path)
    yield found
    for run, _ in found.values():
        run.kill()
        run.wait()


@pytest.mark.parametrize("name", FILES)
def test_kernels_agree_with_the_reference(name: str, runs: dict[str, tuple[subprocess.Popen[str], Path]]) -> None:
    run, path = runs[name]
    code = run.wait()
    output = path.read_text()
    assert code == 0, output[-10000:]
    assert re.search(r"\d+ passed", output) and "skipped" not in output, output[-2000:]
