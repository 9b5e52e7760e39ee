"""Builds the C++ kernels with instruments of the compiler, and runs commands with that build.

Each build is a copy of the checkout in ``build/<kind>``, in which the extension is built in place: kinds are "address"
(AddressSanitizer and UndefinedBehaviorSanitizer), "thread" (ThreadSanitizer) and "coverage" (gcov). Kernels for
instructions that this processor lacks are not compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.csrc import sanitizers

ROOT = Path(__file__).parents[1]
COPIED = (
    "csrc",
    "mtlkernels",
    "tests",
    "benchmarks",
    "setup.py",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "lib", "_build.json")
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
# What has to be loaded before everything else, as Python itself is not instrumented.
RUNTIMES = {"address": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so",), "coverage": ()}
OPTIONS = {
    # Python and PyTorch keep much until they end. GCC 12 aligns frames that outlive their functions to 32 bytes, and
    # then takes them to be aligned to the 64 that vectors of AVX-512 want.
    "address": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=1:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    },
    # Goes on after a report, as the runtime may wait for itself where it is to end the process.
    "thread": {"TSAN_OPTIONS": f"suppressions={ROOT / 'tests' / 'sanitize' / 'thread.supp'}"},
    "coverage": {},
}


def place(kind: str) -> Path:
    return ROOT / "build" / kind


def copy(kind: str) -> None:
    """Brings the copy up to date; files keep their times, so that only what has changed is compiled."""
    for name in COPIED:
        source, target = ROOT / name, place(kind) / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=NOT_COPIED, dirs_exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)


def build(kind: str, *options: str) -> None:
    """Builds the copy's extension; ``options`` are cmake's.

    Raises:
        SystemExit: it failed.
    """
    copy(kind)
    asked = [f"-DMTLK_INSTRUMENT={kind}", *options]
    if "amx_bf16" not in Path("/proc/cpuinfo").read_text():
        asked.append("-DMTLK_COMPILES_AMX=OFF")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=place(kind), env={**os.environ, "CMAKE_ARGS": " ".join(asked)})
    if done.returncode or not list(place(kind).glob("mtlkernels/lib/*/libmtlkernels.so")):
        raise SystemExit(f"the build with MTLK_INSTRUMENT={kind} failed")


def environment(kind: str) -> dict[str, str]:
    """In which Python loads the build."""
    paths = [
        subprocess.run([str(COMPILER), f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in RUNTIMES[kind]
    ]
    changed = {"PYTHONPATH": str(place(kind)), "LD_PRELOAD": " ".join(path.strip() for path in paths), **OPTIONS[kind]}
    return {**os.environ, **changed}


def command(kind: str, arguments: Sequence[str]) -> list[str]:
    return [*((kind in sanitizers.CHECKS and sanitizers.launcher(kind)) or ()), sys.executable, *arguments]


def run(kind: str, arguments: Sequence[str], **changed: str) -> int:
    """Runs Python with these arguments in the copy, with the build loaded; its exit status."""
    return subprocess.run(command(kind, arguments), cwd=place(kind), env={**environment(kind), **changed}).returncode


def output(kind: str, arguments: Sequence[str], changed: Mapping[str, str] = {}) -> tuple[int, str]:  # noqa: B006
    """As :func:`run`; its exit status and all that it printed."""
    done = subprocess.run(
        command(kind, arguments),
        cwd=place(kind),
        env={**environment(kind), **changed},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    return done.returncode, done.stdout
