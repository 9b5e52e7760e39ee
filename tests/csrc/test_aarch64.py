"""The C++ kernels compile for another processor, whose vectors the baseline's are there."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.csrc import library

CSRC = library.ROOT / "csrc"
COMPILER = next(filter(None, map(shutil.which, ("aarch64-linux-gnu-g++", "aarch64-linux-gnu-g++-12"))), None)
KERNELS = ("cpu/kernels.cpp", "cpu/level/chain_kernels.cpp", "cpu/level/layerwise_kernels.cpp")
HOST = ("cpu/level/level.cpp", "cpu/pcgrad/pcgrad.cpp", "cpu/runtime/instruction_sets.cpp")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a compiler for aarch64, which this machine lacks")


@pytest.mark.parametrize("source", KERNELS + HOST)
def test_compiles(source: str) -> None:
    headers = Path(torch.__file__).parent / "include"
    system = [f"-isystem{headers}", f"-isystem{headers / 'torch' / 'csrc' / 'api' / 'include'}"]
    own = ["-DMTLK_ISA=baseline", '-DMTLK_TARGETS="baseline"', f"-I{CSRC}", f"-I{CSRC / 'cpu'}", *system]
    what = ["-O0", "-c", "-o", os.devnull] if source in KERNELS else ["-fsyntax-only"]
    options = ["-std=gnu++20", *what, "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
    run = subprocess.run(
        [str(COMPILER), *options, *own, str(CSRC / source)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0 and not run.stdout, run.stdout[:5000]
