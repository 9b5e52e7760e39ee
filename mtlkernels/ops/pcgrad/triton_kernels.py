# mypy: ignore-errors
"""Kernels of PCGrad but for the Gram matrix's: finding a chunk, the projections, the weighted sum.

Parameters are cut into chunks of ROWS * COLUMNS * DEPTH elements, a program each. Neighbours lie in neighbouring lanes,
so that whatever the alignment a warp reads whole lines. ``starts`` holds each parameter's first chunk, ``tasks`` the
addresses of its gradients, T a parameter, 0 for None.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import kernel


@triton.jit
def find_chunk(table, chunk, starts, sizes, num_parameters, CHUNK: tl.constexpr):
    """The parameter that a chunk belongs to, the chunk's first element in it, and how many elements it has."""
    lanes = tl.arange(0, 128)
    parameter = tl.full((), -1, tl.int32)
    for first in range(0, num_parameters, 128):
        start = tl.load(table + starts + first + lanes, mask=first + lanes < num_parameters, other=0x7FFFFFFFFFFFFFFF)
        parameter += tl.sum((start <= chunk).to(tl.int32), 0)
    offset = (chunk - tl.load(table + starts + parameter)) * CHUNK
    return parameter, offset, tl.minimum(tl.load(table + sizes + parameter) - offset, CHUNK).to(tl.int32)


@kernel(tensors=4)
def project_tasks(
    gram, order, rows, coefficients, num_tasks, num_steps, max_norm, eps,
    CLIP: tl.constexpr, NORMALIZE: tl.constexpr, INCLUDE_SELF: tl.constexpr, MEAN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All projections on T x T coefficients, every task's at the same time, in one program; as in the reference.

    ``max_norm`` and ``eps`` are the bits of float64 numbers, as a kernel would take a float for float32.
    """
    i = tl.arange(0, ROWS)
    k = tl.arange(0, COLUMNS)
    inside = (i < num_tasks)[:, None] & (k < num_tasks)[None, :]
    square = tl.load(gram + k * (num_tasks + 1), mask=k < num_tasks, other=0.0)
    norm = tl.sqrt(square)
    scale = tl.full((COLUMNS,), 1.0, tl.float64)
    if CLIP:
        limit = max_norm.to(tl.int64).to(tl.float64, bitcast=True)
        scale = tl.where(norm > limit, limit / tl.where(norm > limit, norm, 1.0), scale)
    if NORMALIZE:
        clipped = scale * norm
        mean = tl.sum(clipped, 0) / num_tasks.to(tl.float64)
        scale = tl.where(clipped == 0.0, scale, scale * mean / tl.where(clipped == 0.0, 1.0, clipped))
    taken = (i[:, None] == k[None, :]).to(tl.float64)
    for step in range(num_steps):
        other = tl.load(order + i * num_steps + step, mask=i < num_tasks, other=0)
        valid = (other >= 0) & (other < num_tasks)
        other = tl.where(valid, other, 0)
        hot = other[:, None] == k[None, :]
        original = tl.load(gram + other[:, None] * num_tasks + k[None, :], mask=inside, other=0.0)
        scaled = tl.sum(tl.where(hot, scale[None, :], 0.0), 1)[:, None] * original * scale[None, :]
        denominator = tl.sum(tl.where(hot, scaled, 0.0), 1)
        inner = tl.sum(tl.where(taken != 0.0, taken * scaled, 0.0), 1)  # who has no part in it must not make it NaN
        applies = (inner < 0.0) & (denominator != 0.0)
        if not INCLUDE_SELF:
            applies = applies & (other != i)
        shifted = denominator + eps.to(tl.int64).to(tl.float64, bitcast=True)
        factor = tl.where(applies, inner / tl.where(denominator == 0.0, 1.0, shifted), 0.0)
        factor = tl.where(valid, factor, float("nan"))
        taken -= tl.where(hot | (valid == 0)[:, None], factor[:, None], 0.0)
    taken = tl.where(inside, taken * scale[None, :], 0.0)
    tl.store(rows + i[:, None] * num_tasks + k[None, :], taken, mask=inside)
    total = tl.sum(taken, 0)
    if MEAN:
        total = total / num_tasks.to(tl.float64)
    tl.store(coefficients + k, total, mask=k < num_tasks)


@kernel(tensors=2)
def combine_chunks(
    table, coefficients, starts, sizes, tasks, outputs, num_parameters, num_tasks,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``sum_t coefficients_t * g_t`` in float64, for one chunk; a missing gradient's coefficient is not used."""
    chunk = tl.program_id(0)
    parameter, offset, limit = find_chunk(table, chunk, starts, sizes, num_parameters, ROWS * COLUMNS * DEPTH)
    tasks += parameter * num_tasks
    out = tl.load(table + outputs + parameter).to(tl.pointer_type(DTYPE)) + offset
    lanes = tl.arange(0, ROWS * COLUMNS)
    for row in range(0, limit, ROWS * COLUMNS):
        total = tl.zeros((ROWS * COLUMNS,), tl.float64)
        for t in range(num_tasks):
            address = tl.load(table + tasks + t)
            coefficient = tl.where(address != 0, tl.load(coefficients + t), 0.0)
            elements = tl.where(address != 0, limit, 0)
            pointers = address.to(tl.pointer_type(DTYPE)) + offset + row + lanes
            total += coefficient * tl.load(pointers, mask=row + lanes < elements, other=0.0).to(tl.float64)
        if tl.float64 != DTYPE:
            total = total.to(tl.float32)  # as PyTorch's own conversion from float64 to half precision does
        tl.store(out + row + lanes, total.to(DTYPE), mask=row + lanes < limit)
