"""An allocation that fails somewhere in a call ends the call, not the process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests import requires
from tests.csrc import library

pytestmark = [
    library.needs_compiler,
    requires.cpp_kernels,
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library"),
]


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """failing.cpp as a library to preload."""
    target = tmp_path_factory.mktemp("failing") / "failing.so"
    source = Path(__file__).parent / "failing.cpp"
    subprocess.run([str(library.COMPILER), *library.OPTIONS, str(source), "-o", str(target), "-ldl"], check=True)
    return target


@pytest.mark.parametrize("threads", [1, 3])
def test_each_allocation_of_every_operator(shim: Path, threads: int) -> None:
    """In a process of its own: std::terminate, or memory that is given back twice, would end it."""
    command = [sys.executable, "-m", "tests.csrc.failing_memory", str(threads)]
    environment = os.environ | {"LD_PRELOAD": str(shim)}
    run = subprocess.run(
        command, cwd=library.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0 and run.stdout.endswith("all calls have passed\n"), run.stdout[-5000:]
