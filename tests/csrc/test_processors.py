"""The choice among instruction sets on other processors, by an emulator: of x86 it has those up to AVX2."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from mtlkernels import _extension
from tests.csrc import library

CSRC = library.ROOT / "csrc"
EMULATOR = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
SETS = ("avx2", "avx512", "avx512bf16", "amx")

pytestmark = [
    library.needs_compiler,
    pytest.mark.skipif(platform.machine() != "x86_64", reason="needs an x86-64 compiler, which this machine lacks"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """choice.cpp, compiled with every instruction set."""
    target = tmp_path_factory.mktemp("choice") / "choice"
    options = ["-std=c++20", "-O1", f"-I{CSRC}", f"-I{CSRC / 'cpu'}", '-DMTLK_TARGETS="all"']
    options += ["-DMTLK_X86", "-DMTLK_AVX512BF16", "-DMTLK_AMX"]
    source = Path(__file__).parent / "choice.cpp"
    subprocess.run([str(library.COMPILER), *options, str(source), "-o", str(target)], check=True)
    return target


def chosen(*command: str) -> tuple[list[str], str]:
    """The instruction sets that were found, and the one that serves."""
    *found, best = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()
    return found, best


@pytest.mark.skipif(EMULATOR is None, reason="needs qemu-x86_64, which this machine lacks")
@pytest.mark.parametrize(
    "model, count",
    [
        ("Nehalem", 0),
        ("SandyBridge", 0),  # AVX without AVX2
        ("Haswell,-avx2", 0),
        ("Haswell,-fma", 0),
        ("Haswell,-f16c", 0),
        ("Haswell", 1),
        ("EPYC", 1),
    ],
)
def test_emulated(program: Path, model: str, count: int) -> None:
    expected = ["baseline", *SETS[:count]]
    assert chosen(str(EMULATOR), "-cpu", model, str(program)) == (expected, expected[-1])


def test_this_processor(program: Path) -> None:
    """A build that compiled all of them finds those that the kernels' build does, and takes the best."""
    found, best = chosen(str(program))
    assert found[0] == "baseline" and best == found[-1]
    if compiled := _extension.build_facts().get("compiled for", "").split():
        sets = [name for name in _extension.instruction_sets() if name != "split"]
        assert [name for name in found if name in compiled] == sets
