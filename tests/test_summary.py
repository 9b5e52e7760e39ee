"""What the end of a run says, in one process and in several."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TESTS = """
import pytest
from tests.summary import note_second_trial, note_those_of

@pytest.mark.skipif(True, reason="needs a second moon")
@pytest.mark.parametrize("n", range(3))
def test_skipped(n):
    pass

def test_skips():
    pytest.skip("needs a third")

@pytest.mark.parametrize("n", range(2))
def test_noted(n):
    note_second_trial("at a kink")

def test_another_process():
    note_those_of("== 1,002 cases needed a second, looser trial ==", "elsewhere")

def test_unnoted():
    pass
"""
LINES = ["     3  needs a second moon", "     1  needs a third", "test_whole.py, all of it: needs a fourth"]
NOTES = [" 1,002  elsewhere: test_some.py::test_another_process", "     2  at a kink: test_some.py::test_noted"]


@pytest.mark.parametrize("processes", [0, 2])
def test_of_a_run(tmp_path: Path, processes: int) -> None:
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole.py").write_text("import pytest\npytest.skip('needs a fourth', allow_module_level=True)")
    plugins = ["-p", "tests.summary", "-p", "no:cacheprovider", "-n", str(processes)]
    command = [sys.executable, "-m", "pytest", "--rootdir", str(tmp_path), *plugins, str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert run.returncode == 0, run.stdout
    lines = run.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if " skipped, and why " in line)
    assert lines[start + 1 : start + 4] == LINES, run.stdout
    assert " 1,004 cases needed a second, looser trial " in lines[start + 4]
    assert lines[start + 5 : start + 7] == NOTES, run.stdout
