"""What sanitizers are asked for, faults that they have to find, and programs under them that use the memory pool."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths, library_paths

from tests.csrc.library import COMPILER, HERE, ROOT

NAMES = {"address": "AddressSanitizer", "thread": "ThreadSanitizer"}
CHECKS = {
    "address": ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fsanitize-recover=address,undefined"),
    "thread": ("-fsanitize=thread",),
}
# Goes on after a report, so that one process finds several faults.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0:halt_on_error=0"}
# What of planted_faults.h each has to find, and the words that it says it in.
FAULTS = {
    "address": {
        "an overrun of a piece": "use-after-poison",
        "an overrun into a neighbour": "use-after-poison",
        "an overrun of all pieces": "use-after-poison",
        "a use after giving back": "use-after-poison",
        "an overflow": "signed integer overflow",
        "a misaligned access": "misaligned address",
        "a shift past the width": "shift exponent",
    },
    "thread": {"a race for a result": "data race", "a race after giving back": "data race"},
}


@functools.cache
def launcher(kind: str) -> tuple[str, ...] | None:
    """What has to stand before a program for it to start; None where this compiler or machine has no such sanitizer.

    ThreadSanitizers of before 2024 do not start where a kernel makes addresses as random as newer ones do.
    """
    if COMPILER is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "empty.cpp", Path(folder) / "empty"
        source.write_text("int main() {}\n")
        built = subprocess.run([COMPILER, *CHECKS[kind], str(source), "-o", str(target)], capture_output=True)
        if built.returncode:
            return None
        fixed = ("setarch", "-R") if shutil.which("setarch") else ()
        for prefix in ((), fixed):
            if not subprocess.run([*prefix, str(target)], capture_output=True).returncode:
                return prefix
    return None


def need(kind: str) -> None:
    """Skips what cannot be run."""
    if launcher(kind) is None:
        pytest.skip(f"needs {NAMES[kind]}, which this compiler or machine lacks")


def compile_with_pool(kind: str, source: Path, target: Path, *options: str) -> None:
    """Compiles what includes headers of csrc/cpu, and links it against PyTorch as the C++ kernels are."""
    folders = [*include_paths(), ROOT / "csrc", ROOT / "csrc" / "cpu", HERE]
    flags = ["-std=gnu++20", "-O1", "-g1", "-fno-omit-frame-pointer", "-fPIC", *CHECKS[kind]]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    libraries = [f"-L{path}" for path in library_paths()] + [f"-Wl,-rpath,{path}" for path in library_paths()]
    included = [part for folder in folders for part in ("-isystem", str(folder))]
    command = [*flags, abi, *included, str(source), "-o", str(target), *libraries, *options, "-lc10", "-ltorch_cpu"]
    subprocess.run([str(COMPILER), *command], check=True)


def run(
    kind: str, program: Path, names: Sequence[str] = (), options: Mapping[str, str] = OPTIONS
) -> subprocess.CompletedProcess[str]:
    command = [*(launcher(kind) or ()), str(program), *names]
    return subprocess.run(command, env={**os.environ, **options}, capture_output=True, text=True, errors="replace")


def not_found(kind: str, printed: str) -> list[str]:
    """The planted faults of a kind that no report is about, by what was printed while they were made."""
    parts = re.split(r"^planted: (.*)$", printed, flags=re.MULTILINE)
    reports = dict(zip(parts[1::2], parts[2::2], strict=True))
    return [name for name, words in FAULTS[kind].items() if words not in reports.get(name, "")]
