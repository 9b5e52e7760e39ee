"""PCGrad by CUDA C++ kernels (csrc/cuda), a launch each: the Gram matrix, the projections, the weighted sum.

Needs the shared object ``mtlkernels/_cuda*.so``, see :mod:`mtlkernels._extension`. Never run on a GPU so far: tests run
the kernels on an emulated device (``tests/csrc``), and ``make check`` compiles them where there is nvcc.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mtlkernels._backends import has_triton
from mtlkernels.ops._layout import by_parameter, first_of, in_memory
from mtlkernels.ops._table import Table, has_fast_float64, on_device
from mtlkernels.ops.pcgrad.checks import any_of, check_coefficients, check_flat, check_steps

# As in csrc/common/chunks.h, elements.h and csrc/cuda/pcgrad.h.
MAX_TASKS = 64
CHUNK = 4096
_COUNTERS = 64
_ALIGNED = 256
_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
_MAX_BLOCKS = 1024
_TILE = 64


class Arguments(NamedTuple):
    """The gradients of a call as the kernels take them; ``grads`` and ``results`` are what ``table`` points to."""

    table: Table
    parameters: int
    chunks: int
    grads: list[Tensor | None]
    results: list[Tensor]


def arguments(grads: Sequence[Tensor | None], num_tasks: int, *, with_results: bool) -> Arguments:
    """Lays the parameters that have a gradient out as csrc/common/chunks.h says; with tensors for their results."""
    starts, sizes, formats, presents, addresses = [0], [], [], [], []
    walked: list[Tensor | None] = []
    results: list[Tensor] = []
    for column in by_parameter(in_memory(grads), num_tasks):
        like = first_of(column)
        if like is None:
            continue
        walked += column
        pointers = [0 if grad is None else grad.data_ptr() for grad in column]
        present = sum(1 << t for t, grad in enumerate(column) if grad is not None)
        if with_results:
            results.append(torch.empty_like(like))
        aligned = not any(address % 16 for address in (*pointers, *(result.data_ptr() for result in results[-1:])))
        size = like.numel()
        starts.append(starts[-1] + -(-size // CHUNK))
        sizes.append(size)
        formats.append(_KINDS[like.dtype] + (_ALIGNED if aligned else 0))
        presents.append(present - (1 << 64) if present >> 63 else present)
        addresses += pointers
    table = Table()
    for values in ([0] * _COUNTERS, starts, sizes, formats, presents):
        table.integers(values)
    table.pointers(results or [None] * len(sizes))
    table.integers(addresses)
    return Arguments(table, len(sizes), starts[-1], walked, results)


def slots(chunks: int, num_tasks: int) -> int:
    """How many partial sums the Gram matrix takes: for each block its tiles, of eight tasks by eight."""
    octets = 1 if num_tasks <= 8 else 2 if num_tasks <= 16 else 4 if num_tasks <= 32 else 8
    return min(max(chunks, 1), _MAX_BLOCKS) * (octets * (octets + 1) // 2) * _TILE


def takes(direction: str, args: tuple[Any, ...]) -> bool:
    """Whether the kernels serve a call with these arguments best.

    They are for up to 64 tasks. Their Gram matrix multiplies in float64; where that is slow, Triton's has a way around.
    """
    num_tasks: int = args[0].shape[0] if direction == "weights" else args[1]
    if num_tasks > MAX_TASKS:
        return False
    if direction != "gram" or not has_triton():
        return True
    return has_fast_float64(any_of(args[0]).device)


def gram(grads: Sequence[Tensor | None], num_tasks: int) -> Tensor:
    """See :func:`mtlkernels.ops.pcgrad.reference.gram`. At most 64 tasks, or a RuntimeError, as below."""
    _check_tasks(num_tasks)
    check_flat(grads, num_tasks)
    device = any_of(grads).device
    with on_device(device):
        call = arguments(grads, num_tasks, with_results=False)
        result = torch.empty(num_tasks, num_tasks, dtype=torch.float64, device=device)
        scratch = torch.empty(slots(call.chunks, num_tasks), dtype=torch.float64, device=device)
        # Blocks count themselves in the table, whose copy to the device brings the zeros, at a graph's replay too.
        torch.ops.mtlkernels_cuda.gram(call.table.to(device), call.parameters, call.chunks, scratch, result)
    return result


def weights(gram: Tensor, order: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """See :func:`mtlkernels.ops.pcgrad.reference.weights`."""
    include_self, max_norm, normalize, project, eps, mean = options
    check_steps(gram, order)
    num_tasks = gram.shape[0]
    _check_tasks(num_tasks)
    gram = gram.contiguous()
    steps = gram.new_empty((num_tasks, 0), dtype=torch.int64) if order is None else order.long().contiguous()
    rows, coefficients = torch.empty_like(gram), gram.new_empty(num_tasks)
    numbers = (-1.0 if max_norm is None else max_norm, eps, include_self, normalize, project, mean)
    torch.ops.mtlkernels_cuda.weights(gram, steps, rows, coefficients, *numbers)
    return rows, coefficients


def combine(grads: Sequence[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    """See :func:`mtlkernels.ops.pcgrad.reference.combine`."""
    _check_tasks(num_tasks)
    check_coefficients(grads, num_tasks, coefficients)
    device = coefficients.device
    with on_device(device):
        call = arguments(grads, num_tasks, with_results=True)
        table = call.table.to(device)
        torch.ops.mtlkernels_cuda.combine(table, call.parameters, call.chunks, coefficients.contiguous())
    return call.results


def _check_tasks(num_tasks: int) -> None:
    if num_tasks > MAX_TASKS:
        raise RuntimeError(
            f"pcgrad's 'cuda' implementation takes at most {MAX_TASKS} tasks, got {num_tasks}: leave use_backend out"
        )
