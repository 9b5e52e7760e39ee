"""csrc/cuda's kernels with blocks at the same time, under ThreadSanitizer, which has to find the faults of the file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.csrc import sanitizers
from tests.csrc.library import COMPILER, HERE, needs_compiler

pytestmark = needs_compiler
# Without a trace of calls, which fibers, that all are one thread to the sanitizer, would mix up.
QUIET = ("--param", "tsan-instrument-func-entry-exit=0")
OPTIONS = ("-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-fsanitize=thread", *QUIET)
A_RACE = 66  # ThreadSanitizer's exit status
FAULTS = ("no fence before a counter", "no fence behind a counter", "two blocks at one address")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sanitizers.need("thread")
    target = tmp_path_factory.mktemp("program") / "blocks_at_once"
    subprocess.run([str(COMPILER), *OPTIONS, str(HERE / "blocks_at_once.cpp"), "-o", str(target)], check=True)
    return target


def run(program: Path, name: str) -> subprocess.CompletedProcess[str]:
    options = os.environ | {"TSAN_OPTIONS": "halt_on_error=1:symbolize=0"}
    command = [*(sanitizers.launcher("thread") or ()), str(program), name]
    return subprocess.run(command, env=options, capture_output=True, text=True, timeout=300)


def test_the_kernels_as_they_are(program: Path) -> None:
    found = run(program, "as they are")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(program: Path, fault: str) -> None:
    found = run(program, fault)
    assert found.returncode == A_RACE, found.stdout + found.stderr
    assert "data race" in found.stderr
