"""What the processor multiplies at best: products that touch registers alone, on as many threads as PyTorch has."""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("peak.cpp")
# The instructions that multiply a dtype; the fastest counts. float16 is multiplied as float32.
INSTRUCTIONS = {
    "float64": ("fma_float64",),
    "float32": ("fma_float32",),
    "float16": ("fma_float32",),
    "bfloat16": ("fma_float32", "dot_bfloat16", "tile_bfloat16"),
}
_CALL_SECONDS = 0.02


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The probes, compiled for this processor; None without a compiler."""
    own = shlex.split(os.environ.get("CXX", ""))[:1]
    compiler = next(filter(None, map(shutil.which, (*own, "c++", "g++", "clang++"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak.so"
        command = [compiler, "-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", str(SOURCE), "-o", str(target)]
        compilation = subprocess.run(command, capture_output=True, text=True)
        if compilation.returncode:
            warnings.warn(
                f"the register peak is unknown: {SOURCE.name} failed to compile: {compilation.stderr}", stacklevel=2
            )
            return None
        library = ctypes.CDLL(str(target))
    for name in {name for names in INSTRUCTIONS.values() for name in names}:
        getattr(library, name).restype = ctypes.c_double
        getattr(library, name).argtypes = [ctypes.c_int64]
    return library


def register_peak(dtype: str, seconds: float) -> float:
    """FLOP/s of all threads in ``seconds`` of trying; 0 where it cannot be known."""
    library = _library()
    if library is None or dtype not in INSTRUCTIONS:
        return 0.0
    probes = [getattr(library, name) for name in INSTRUCTIONS[dtype]]
    probes = [probe for probe in probes if probe(1)]
    threads = torch.get_num_threads()
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for probe in probes:
            start = time.perf_counter()
            probe(100_000)
            rounds = max(1, int(100_000 * _CALL_SECONDS / (time.perf_counter() - start)))
            end = time.perf_counter() + seconds / len(probes)
            while time.perf_counter() < end:
                start = time.perf_counter()
                flop = sum(pool.map(probe, [rounds] * threads))  # a call holds no lock of Python's
                best = max(best, flop / (time.perf_counter() - start))
    return best
