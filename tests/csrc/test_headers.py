"""Each header of the C++ kernels includes what it uses: it compiles alone."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.csrc import library

CPU = library.ROOT / "csrc" / "cpu"


HEADERS = sorted(str(path.relative_to(CPU)) for path in CPU.glob("*/*.h"))
# Of the newest instruction set, which every header can be compiled for.
TARGET = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mavx512bf16", "-mamx-tile"]
TARGET += ["-mamx-bf16", "-Wno-psabi"]

pytestmark = library.needs_compiler


def compile_only(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(library.COMPILER), "-std=gnu++20", "-fsyntax-only", "-Wall", "-Wextra", *TARGET, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module", autouse=True)
def _target(tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("target") / "empty.cpp"
    empty.touch()
    if compile_only(str(empty)).returncode != 0:
        pytest.skip("the compiler does not know AMX")


@pytest.mark.parametrize("header", HEADERS)
def test_compiles_alone(header: str, tmp_path: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    torch_headers = Path(torch.__file__).parent / "include"
    system = [torch_headers, torch_headers / "torch" / "csrc" / "api" / "include", sysconfig.get_path("include")]
    folders = [f"-I{CPU}", f"-I{CPU.parent}", *(f"-isystem{path}" for path in system)]
    run = compile_only(*folders, "-DMTLK_ISA=amx", "-Wno-unused-parameter", str(source))
    assert run.returncode == 0 and not run.stdout, run.stdout[:5000]
