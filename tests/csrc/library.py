"""Compiles csrc/common, and csrc/cuda's kernels on an emulated device, with the system's compiler; calls them."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mtlkernels.ops.pcgrad import cuda

HERE = Path(__file__).parent
COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
OPTIONS = ("-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


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


def gram(grads: Sequence[Tensor | None], tasks: int, seed: int = 0) -> Tensor:
    """The Gram matrix by csrc/cuda's kernel; ``seed`` picks the order in which blocks and threads run."""
    call = cuda.arguments(grads, tasks, with_results=False)
    table = call.table.to(torch.device("cpu"))
    slots = torch.full((cuda.slots(call.chunks, tasks),), torch.nan, dtype=torch.float64)
    out = torch.full((tasks, tasks), torch.nan, dtype=torch.float64)
    _check(
        load().gram(
            pointer(table), integer(call.parameters), tasks, integer(call.chunks), pointer(slots), pointer(out), seed
        )
    )
    return out


def weights(
    gram: Tensor,
    order: Tensor,
    include_self: bool,
    max_norm: float | None,
    normalize: bool,
    project: bool,
    eps: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The projections by csrc/cuda's kernel."""
    tasks = gram.shape[0]
    rows, coefficients = torch.full_like(gram, torch.nan), torch.full_like(gram[0], torch.nan)
    tensors = [pointer(tensor) for tensor in (gram, order, rows, coefficients)]
    norm = ctypes.c_double(-1.0 if max_norm is None else max_norm)
    flags = [ctypes.c_bool(flag) for flag in (include_self, normalize, project, mean)]
    _check(load().weights(*tensors, tasks, order.shape[1], norm, ctypes.c_double(eps), *flags, 0))
    return rows, coefficients


def combine(grads: Sequence[Tensor | None], tasks: int, coefficients: Tensor, seed: int = 0) -> list[Tensor]:
    """The weighted sums by csrc/cuda's kernel."""
    call = cuda.arguments(grads, tasks, with_results=True)
    table = call.table.to(torch.device("cpu"))
    for result in call.results:
        result.fill_(torch.nan)
    _check(
        load().combine(
            pointer(table), integer(call.parameters), tasks, integer(call.chunks), pointer(coefficients), seed
        )
    )
    return call.results


def _check(error: Any) -> None:
    if error is not None:
        raise AssertionError(error.decode())
