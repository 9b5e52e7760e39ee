"""Each header of the C++ kernels includes what it uses: it compiles alone.

Those that include anything of PyTorch's bring its tensors in, which take seconds to read: they are read once.
"""

from __future__ import annotations

import re
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


def compile_with(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(library.COMPILER), "-std=gnu++20", "-Wall", "-Wextra", *TARGET, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compile_only(*arguments: str) -> subprocess.CompletedProcess[str]:
    return compile_with("-fsyntax-only", *arguments)


@pytest.fixture(scope="module", autouse=True)
def _target(tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("target") / "empty.cpp"
    empty.touch()
    if compile_only(str(empty)).returncode != 0:
        pytest.skip("the compiler does not know AMX")


TORCH = Path(torch.__file__).parent / "include"
FOLDERS = [f"-I{CPU}", f"-I{CPU.parent}"]
FOLDERS += [f"-isystem{path}" for path in (TORCH, TORCH / "torch/csrc/api/include", sysconfig.get_path("include"))]
OPTIONS = [*FOLDERS, "-DMTLK_ISA=amx", "-Wno-unused-parameter"]


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PyTorch's tensors, which the compiler has read."""
    header = tmp_path_factory.mktemp("tensors") / "tensors.h"
    header.write_text("#include <ATen/core/Tensor.h>\n")
    run = compile_with(*OPTIONS, "-x", "c++-header", str(header), "-o", f"{header}.gch")
    assert run.returncode == 0, run.stdout[:5000]
    return header


def includes_torch(header: str) -> bool:
    """Whether a header, or one that it includes, has tensors."""
    text = (CPU / header).read_text()
    inner = [name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE) if (CPU / name).exists()]
    return bool(re.search(r"^#include <(ATen|torch)/", text, re.MULTILINE)) or any(map(includes_torch, inner))


@pytest.mark.parametrize("header", HEADERS)
def test_compiles_alone(header: str, tmp_path: Path, tensors: Path) -> None:
    source = tmp_path / "alone.cpp"
    source.write_text(f'#include "{header}"\n')
    before = ["-include", str(tensors)] if includes_torch(header) else []
    run = compile_only(*OPTIONS, *before, str(source))
    assert run.returncode == 0 and not run.stdout, run.stdout[:5000]
