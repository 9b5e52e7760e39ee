"""PCGrad on NVIDIA GPUs through Triton: two launches for the Gram matrix, one for the weights, one for the result.

The passes over the parameters take one launch for each dtype among them: pointer types and the products' precision are
then fixed when a kernel is compiled. Most models have one dtype. The Gram matrix's parts are added up in a launch of
their own rather than by the program that finishes last: the counter that tells it so would have to be zeroed first,
in a launch too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mtlkernels.ops import _triton
from mtlkernels.ops._layout import by_parameter, first_of, in_memory
from mtlkernels.ops._table import has_fast_float64
from mtlkernels.ops._triton import Table, Tile, launch
from mtlkernels.ops.pcgrad import reference
from mtlkernels.ops.pcgrad.checks import any_of, check_coefficients, check_flat, check_steps
from mtlkernels.ops.pcgrad.triton_gram import gram_chunks, gram_sum
from mtlkernels.ops.pcgrad.triton_kernels import combine_chunks, project_tasks

DTYPES = _triton.DTYPES | {torch.float64: tl.float64}
# Tasks whose products stay in a thread's registers: up to 36 sums. More tasks are cut into groups, between two of which
# there are 36 or 64 sums.
MAX_GROUP = 8
# Whose projection one program holds in registers: of 100 tasks it would spill, and of 512 take minutes to compile.
MAX_PROJECTED = 64
GROUPS = (6, 8)
# Chunks of 128 lanes x 24 elements, which keep a GPU busy from 1M parameters on.
#
# In float32 a lane adds up 4 products, 4 roundings, and 6 such sums, 5 more; 128 lanes meet in 7 steps. These 16
# roundings are 9.5e-7 of ``|g_i| |g_j|`` if all go one way, and some 1e-8 as they do go; what follows is float64.
# Four elements of 8 tasks are enough loads on their way.
GRAM = Tile(rows=128, columns=4, depth=6, warps=4, stages=1)
SUM = Tile(rows=128, columns=4, depth=1, warps=4, stages=1)
COMBINE = Tile(rows=128, columns=8, depth=4, warps=4, stages=1)


def columns_between(group: int, wide: bool) -> int:
    """How many elements of each gradient a lane takes at a time in the products between two groups of tasks.

    Of 16 tasks, beside 64 sums in float64, one: 16 loads on their way. With two, Triton 3.6 spilled on sm_90.
    """
    return GRAM.columns if not wide else 1 if group == MAX_GROUP else 2


def projection_tile(num_tasks: int) -> Tile:
    """T x T coefficients, 8 a thread up to 32 tasks; up to 16 tasks are one warp, whose sums need no barrier.

    As few as 4 a thread for up to 64 tasks, as the compiler spilled some of 8 on sm_120.
    """
    size = max(8, triton.next_power_of_2(num_tasks))
    if size > 32:
        return Tile(rows=size, columns=size, depth=1, warps=32, stages=1)
    return Tile(rows=size, columns=size, depth=1, warps=max(1, size * size // 256), stages=1, registers=255)


def group_size(num_tasks: int) -> int:
    """The number of tasks in a group: all, or the smaller of the sizes that makes the fewest groups."""
    if num_tasks <= MAX_GROUP:
        return num_tasks
    return min(GROUPS, key=lambda size: (triton.cdiv(num_tasks, size), size))


def is_wide(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products are computed in float64.

    Where float64 runs at half the rate of float32, exact products take a quarter of the time that the gradients take to
    arrive (8 tasks, H100), and cost no more than float32 ones with their scaling. On other GPUs they would take several
    times as long as the gradients do.
    """
    return dtype == torch.float64 or has_fast_float64(device)


def by_dtype(
    table: Table, columns: Sequence[Sequence[Tensor | None]], outputs: Sequence[Tensor], chunk: int
) -> list[tuple[torch.dtype, int, tuple[int, ...]]]:
    """Appends the parameters, those that have elements, to the table.

    Returns:
        For each dtype the number of chunks, and what kernels take: where in the table the starts, the sizes, the tasks'
        addresses and those of ``outputs`` are, and the number of parameters.
    """
    members: dict[torch.dtype, list[tuple[int, int]]] = {}
    for p, column in enumerate(columns):
        like = first_of(column)
        if like is not None and like.numel():
            members.setdefault(like.dtype, []).append((p, like.numel()))
    dtypes: list[tuple[torch.dtype, int, tuple[int, ...]]] = []
    for dtype, sized in members.items():
        starts = [0]
        for _, size in sized:
            starts.append(starts[-1] + triton.cdiv(size, chunk))
        places = (
            table.integers(starts[:-1]),
            table.integers(size for _, size in sized),
            table.pointers(grad for p, _ in sized for grad in columns[p]),
            table.pointers(outputs[p] for p, _ in sized) if outputs else 0,
        )
        dtypes.append((dtype, starts[-1], (*places, len(sized))))
    return dtypes


def gram(grads: Sequence[Tensor | None], num_tasks: int) -> Tensor:
    """As the reference: [T, T] in float64."""
    check_flat(grads, num_tasks)
    device = any_of(grads).device
    columns = by_parameter(in_memory(grads), num_tasks)
    group = group_size(num_tasks)
    single = group == num_tasks
    firsts = range(0, num_tasks, group)
    pairs = [(first, second) for second in firsts for first in firsts if first <= second]
    table = Table()
    at_pairs = table.integers(first for pair in pairs for first in pair)
    dtypes = by_dtype(table, columns, [], GRAM.rows * GRAM.columns * GRAM.depth)
    num_parts = sum(chunks for _, chunks, _ in dtypes)
    parts = torch.empty((num_tasks, num_tasks, num_parts), dtype=torch.float64, device=device)
    result = torch.empty((num_tasks, num_tasks), dtype=torch.float64, device=device)
    first_part = 0
    with _triton.on_device(device):
        entries = table.to(device)
        for dtype, chunks, (*places, _, number) in dtypes:
            wide = is_wide(dtype, device)
            constants = {"DTYPE": DTYPES[dtype], "WIDE": wide, "GROUP": group, "SINGLE": single}
            constants["BETWEEN"] = columns_between(group, wide)
            args = (entries, parts, first_part, num_parts, *places, at_pairs, number, num_tasks, len(pairs))
            launch(gram_chunks, chunks * len(pairs), GRAM, *args, **constants)
            first_part += chunks
        launch(gram_sum, num_tasks * num_tasks, SUM, parts, result, num_parts, num_tasks)
    return result


def bits(value: float) -> Any:
    """The bits of a float64 number, as an integer."""
    return struct.unpack("q", struct.pack("d", value))[0]


def weights(gram: Tensor, order: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
    """As the reference: the projected gradients' coefficients [T, T], and the result's [T], in float64.

    Of more than MAX_PROJECTED tasks they are the reference's: of them only the passes over the parameters are Triton's.
    """
    if gram.shape[0] > MAX_PROJECTED:
        return reference.weights(gram, order, *options)
    include_self, max_norm, normalize, project, eps, mean = options
    check_steps(gram, order)
    num_tasks = gram.shape[0]
    gram = gram.contiguous()
    rows, coefficients = torch.empty_like(gram), torch.empty_like(gram[0])
    if not project or order is None:
        order = gram.new_empty((num_tasks, 0), dtype=torch.int64)
    steps = order.to(torch.int64).contiguous()
    clip = max_norm is not None and max_norm >= 0
    numbers = (num_tasks, steps.shape[1], bits(max_norm if clip else 0.0), bits(eps))
    flags = {"CLIP": clip, "NORMALIZE": normalize, "INCLUDE_SELF": include_self, "MEAN": mean}
    with _triton.on_device(gram.device):
        launch(project_tasks, 1, projection_tile(num_tasks), gram, steps, rows, coefficients, *numbers, **flags)
    return rows, coefficients


def combine(grads: Sequence[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    """As the reference: one tensor a parameter, in the dtype and the layout of its gradients."""
    check_coefficients(grads, num_tasks, coefficients)
    columns = by_parameter(in_memory(grads), num_tasks)
    results = [torch.empty_like(next(grad for grad in column if grad is not None)) for column in columns]
    coefficients = coefficients.contiguous()
    table = Table()
    dtypes = by_dtype(table, columns, results, COMBINE.rows * COMBINE.columns * COMBINE.depth)
    if dtypes:
        with _triton.on_device(coefficients.device):
            entries = table.to(coefficients.device)
            for dtype, chunks, places in dtypes:
                args = (entries, coefficients, *places, num_tasks)
                launch(combine_chunks, chunks, COMBINE, *args, DTYPE=DTYPES[dtype])
    return results
