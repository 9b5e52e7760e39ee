"""Compiles csrc/common, and csrc/cuda's kernels on an emulated device, with the system's compiler; calls them."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mtlkernels.testing import poisoned_outputs

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
OPTIONS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-shared", "-fPIC")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler, which this machine lacks")


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled once a process."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "library.so"
        subprocess.run([str(COMPILER), *OPTIONS, str(HERE / "library.cpp"), "-o", str(target)], check=True)
        library = ctypes.CDLL(str(target))
    library.to_float.restype = ctypes.c_float
    library.to_float.argtypes = [ctypes.c_ushort]
    for name in ("to_half", "to_bfloat16"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_ushort, [ctypes.c_float]
    library.gram_slots.restype = ctypes.c_longlong
    library.reads_too_early.restype = ctypes.c_double
    for name in ("gram", "weights", "combine", "returns_before_a_barrier", "takes_different_barriers"):
        getattr(library, name).restype = ctypes.c_char_p
    return library


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def integer(value: int) -> ctypes.c_longlong:
    return ctypes.c_longlong(value)


def chunk_at(table: Tensor, parameters: int, tasks: int, index: int, start: int) -> tuple[int, int, int]:
    """The parameter, first element and number of elements of a chunk, looked for from parameter ``start`` on."""
    found = torch.empty(3, dtype=torch.int64)
    load().chunk_at(pointer(table), integer(parameters), tasks, integer(index), integer(start), pointer(found))
    parameter, first, count = found.tolist()
    return parameter, first, count


@contextmanager
def operators(seed: int = 0) -> Iterator[None]:
    """Within the block the operators of mtlkernels_cuda run on CPU tensors, so that their launchers do.

    Their schemas are those that csrc/cuda/pcgrad.cpp registers. ``seed`` picks the order in which blocks
    and threads run. What is allocated holds NaN.
    """

    def gram(table: Tensor, parameters: int, chunks: int, slots: Tensor, out: Tensor) -> None:
        tasks = out.shape[0]
        assert slots.numel() >= load().gram_slots(integer(chunks), tasks)
        counts = integer(parameters), tasks, integer(chunks)
        _check(load().gram(pointer(table), *counts, pointer(slots), pointer(out), seed))

    def weights(
        gram: Tensor, order: Tensor, rows: Tensor, coefficients: Tensor, max_norm: float, eps: float, *flags: bool
    ) -> None:
        tensors = [pointer(tensor) for tensor in (gram, order, rows, coefficients)]
        numbers = [ctypes.c_double(max_norm), ctypes.c_double(eps), *map(ctypes.c_bool, flags)]
        _check(load().weights(*tensors, gram.shape[0], order.shape[1], *numbers, seed))

    def combine(table: Tensor, parameters: int, chunks: int, coefficients: Tensor) -> None:
        counts = integer(parameters), coefficients.numel(), integer(chunks)
        _check(load().combine(pointer(table), *counts, pointer(coefficients), seed))

    source = (ROOT / "csrc" / "cuda" / "pcgrad.cpp").read_text()
    with torch.library._scoped_library("mtlkernels_cuda", "FRAGMENT") as made, poisoned_outputs():
        for found in re.findall(r"library\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", source):
            schema = "".join(re.findall(r"\"([^\"]*)\"", found))
            if not hasattr(torch.ops.mtlkernels_cuda, schema[: schema.index("(")]):
                made.define(schema)
        for name, function in (("gram", gram), ("weights", weights), ("combine", combine)):
            made.impl(name, function, "CPU")
        yield


def _check(error: bytes | None) -> None:
    if error is not None:
        raise AssertionError(error.decode())
