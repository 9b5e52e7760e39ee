"""Compiles csrc/cuda for every architecture, without a GPU, and shows what each kernel uses.

    python -m tests.cuda.compile [--arch 80 90 100]

A row a kernel and architecture: registers a thread, bytes of stack, of spilled registers written and read, of shared
memory. Then the registration of the operators is compiled against this torch's stable ABI. Fails if anything
spills, uses the stack or does not compile. Does nothing where there is no nvcc.
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "csrc" / "cuda" / "pcgrad.cu"
REGISTRATION = ROOT / "csrc" / "cuda" / "pcgrad.cpp"
ARCHITECTURES = (80, 90, 100)
KERNELS = ("gram<1>", "gram<2>", "gram<4>", "gram<8>", "weights", "combine")
COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes, in bytes but for the registers."""

    kernel: str
    registers: int
    stack: int
    stores: int
    loads: int
    shared: int

    @property
    def fails(self) -> bool:
        return self.stack + self.stores + self.loads > 0


_PROPERTIES = re.compile(
    r"Function properties for (?P<name>\w+)\s+"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\s+"
    r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>[^\n]*)"
)


def parse(report: str) -> Iterator[Usage]:
    """The kernels in what ``ptxas -v`` says."""
    for found in _PROPERTIES.finditer(report):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        figures = (int(found[name]) for name in ("registers", "stack", "stores", "loads"))
        yield Usage(readable(found["name"]), *figures, int(shared[1]) if shared else 0)


def readable(mangled: str) -> str:
    """``gram<8>`` of the mangled name of ``gram_kernel<8>``."""
    name = re.search(r"([a-z]+)_kernel(?:ILi(\d+)E)?", mangled)
    if name is None:
        return mangled
    return f"{name[1]}<{name[2]}>" if name[2] else name[1]


def nvcc() -> str | None:
    return shutil.which("nvcc")


def supported(compiler: str) -> set[int]:
    """The architectures that this nvcc knows."""
    listed = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    return {int(number) for number in re.findall(r"compute_(\d+)", listed)}


def compile_kernels(compiler: str, architecture: int) -> tuple[list[Usage], str]:
    """What each kernel takes, and the compiler's complaint if there is one."""
    command = [compiler, "-std=c++17", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run([*command, str(SOURCE), "-o", f"{folder}/cubin"], capture_output=True, text=True)
    found = sorted(parse(run.stderr), key=lambda usage: usage.kernel)
    if run.returncode:
        return found, run.stderr
    missing = set(KERNELS) - {usage.kernel for usage in found}
    return found, f"not found in ptxas's report: {sorted(missing)}" if missing else ""


def compile_registration() -> str:
    """The C++ compiler's complaint about the operators' registration, if there is one."""
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return "there is no C++ compiler"
    options = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Wno-unused-parameter"]
    includes = [option for path in include_paths() for option in ("-isystem", path)]
    run = subprocess.run([compiler, *options, *includes, str(REGISTRATION)], capture_output=True, text=True)
    return run.stderr if run.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES)
    args = parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        print("csrc/cuda: not compiled, as there is no nvcc")
        return 0
    known = supported(compiler)
    compiled, failures = [architecture for architecture in args.arch if architecture in known], 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        registration = pool.submit(compile_registration)
        found = list(pool.map(functools.partial(compile_kernels, compiler), compiled))
    print("arch  registers  stack  spill stores  spill loads  shared  kernel")
    for architecture in sorted({*args.arch} - known):
        print(f"{architecture:>4}  this nvcc does not know it")
    for architecture, (usages, error) in zip(compiled, found, strict=True):
        for u in usages:
            figures = f"{u.registers:>9}  {u.stack:>5}  {u.stores:>12}  {u.loads:>11}  {u.shared:>6}"
            print(f"{architecture:>4}  {figures}  {u.kernel}", flush=True)
            failures += u.fails
        if error:
            print(f"{architecture:>4}  {error}")
            failures += 1
    if error := registration.result():
        print(f"registration: {error}")
        failures += 1
    listed = ", ".join(f"sm_{architecture}" for architecture in compiled) or "no architecture"
    print(f"csrc/cuda compiled for {listed}: {failures} spill or fail")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
