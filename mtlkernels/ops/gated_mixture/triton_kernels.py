# mypy: ignore-errors
"""Kernels of the gated mixture. Memory-bound: every tile of an expert is brought from memory once a program.

Experts are found by an entry in the table: address, stride from row to row, stride from expert to expert; features are
contiguous. That serves [B, E, H] tensors as well as the [E, B, H] scratch of a level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import (
    FEW_MEMBERS,
    activation_gradient,
    activation_of,
    gate_logits,
    kernel,
    operand,
    pointer,
    probability,
    softmax_statistics,
    some_logits,
    whole,
)


@triton.jit
def of_members(values, stride, start, size, inside):
    """Pointers to a value a row, ``values``, for a few members of a gate from ``start`` on; which of them there are."""
    members = start + tl.arange(0, FEW_MEMBERS)
    return values[:, None] + (members * stride)[None, :], inside[:, None] & (members < size)[None, :]


@triton.jit
def sum_of_blocks(values, block_stride, blocks, stride, start, size, inside):
    """What these point to, added up over blocks of columns."""
    total = tl.zeros((inside.shape[0], FEW_MEMBERS), tl.float32)
    for block in range(blocks):
        at, mask = of_members(values + block * block_stride, stride, start, size, inside)
        total += tl.load(at, mask=mask, other=0.0)
    return total


@kernel()
def mix_forward(
    table, outputs, gates, experts, num_gates, num_rows, width,
    KIND: tl.constexpr, LOGITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``y_k = sum_e softmax(logits_k)_e * experts_e`` for all gates, in a block of rows and columns a program.

    The gates come one after another, so that any number of them fits; what they share is read again from cache.
    """
    width = whole(width, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    inside = rows < num_rows - first
    mask = inside[:, None] & (columns < width)[None, :]
    row_stride = whole(tl.load(table + experts + 1), KIND)
    expert_stride = whole(tl.load(table + experts + 2), KIND)
    tiles = operand(table, experts, KIND) + first * row_stride
    tiles = tiles + (rows * row_stride)[:, None] + columns[None, :]
    gates = table + gates
    for k in range(num_gates):
        logits, column_stride, start, end = gate_logits(gates, k, num_gates, first, rows, LOGITS)
        some = some_logits(logits, column_stride, 0, end - start, inside)
        maximum, total = softmax_statistics(logits, column_stride, end - start, inside, some)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for j in range(start, end):
            expert = tl.load(gates + 4 * num_gates + 1 + j)
            weight = probability(logits, column_stride, j - start, maximum, total, inside)
            tile = tl.load(tiles + expert * expert_stride, mask=mask, other=0.0).to(tl.float32)
            acc += weight[:, None] * tile
        out = operand(table, outputs + k, KIND) + first * width
        tl.store(out + rows[:, None] * width + columns[None, :], acc.to(KIND.dtype), mask=mask)


@kernel(tensors=3)
def mix_backward(
    table, weights, inner, grad_outputs, gates, seen, saved, grad_experts, grad_logits,
    num_gates, num_experts, num_members, num_rows, width,
    KIND: tl.constexpr, LOGITS: tl.constexpr, CODE: tl.constexpr, NEED_EXPERTS: tl.constexpr, NEED_LOGITS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """All gradients of a mixture, in a block of rows a program; ``CODE`` is an activation before it, undone here too.

    With p the softmax of a gate's logits and g_e = <dy, experts_e>: d experts_e = sum over gates of p_e * dy, and
    d logits_e = p_e * (g_e - sum_j p_j * g_j). ``weights`` [S, B] holds p and ``inner`` [column blocks, S, B] the parts
    of g, float32, with S the members of all gates; a program uses its own rows of them only. ``seen`` lists for each
    expert the gates that mix it: E + 1 starts, then the gates, then their places among the S; then come the offsets of
    the experts in ``saved``, where others may be stacked too. ``grad_logits`` lists addresses of the gates' gradients,
    then the strides of their rows, then their lengths: zeros follow what gates have.
    """
    width = whole(width, KIND)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    inside = rows < num_rows - first
    gates = table + gates
    seen = table + seen
    stride = num_rows.to(tl.int64)
    weights += first + rows
    inner += first + rows

    if NEED_EXPERTS or NEED_LOGITS:
        for k in range(num_gates):
            logits, column_stride, start, end = gate_logits(gates, k, num_gates, first, rows, LOGITS)
            some = some_logits(logits, column_stride, 0, end - start, inside)
            maximum, total = softmax_statistics(logits, column_stride, end - start, inside, some)
            for j in range(0, end - start, FEW_MEMBERS):
                some = some_logits(logits, column_stride, j, end - start, inside)
                at, mask = of_members(weights + start * stride, stride, j, end - start, inside)
                tl.store(at, tl.exp(some - maximum[:, None]) / total[:, None], mask=mask)
        tl.debug_barrier()  # each thread reads what others of its program have written

    row_stride = whole(tl.load(table + saved + 1), KIND)
    grad_row_stride = whole(tl.load(table + grad_experts + 1), KIND)
    grad_expert_stride = whole(tl.load(table + grad_experts + 2), KIND)
    tiles = operand(table, saved, KIND) + first * row_stride
    tiles = tiles + (rows * row_stride)[:, None]
    grads = operand(table, grad_experts, KIND) + first * grad_row_stride
    grads = grads + (rows * grad_row_stride)[:, None]
    for e in range(num_experts):
        start = tl.load(seen + e).to(tl.int32)
        end = tl.load(seen + e + 1).to(tl.int32)
        at = tiles + whole(tl.load(seen + num_experts + 1 + 2 * num_members + e), KIND)
        for block in range(tl.cdiv(width, COLUMNS)):
            columns = block * COLUMNS + tl.arange(0, COLUMNS)
            mask = inside[:, None] & (columns < width)[None, :]
            kept = tl.load(at + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            expert = activation_of(kept, CODE)
            grad = tl.zeros((ROWS, COLUMNS), tl.float32)
            for i in range(start, end):
                gate = tl.load(seen + num_experts + 1 + i)
                member = tl.load(seen + num_experts + 1 + num_members + i)
                dy = operand(table, grad_outputs + gate, KIND) + first * width
                dy = tl.load(dy + rows[:, None] * width + columns[None, :], mask=mask, other=0.0).to(tl.float32)
                if NEED_LOGITS:
                    part = inner + (block * num_members + member) * stride
                    tl.store(part, tl.sum(dy * expert, 1), mask=inside)
                if NEED_EXPERTS:
                    weight = tl.load(weights + member * stride, mask=inside, other=0.0)
                    grad += weight[:, None] * dy
            if NEED_EXPERTS:
                grad = activation_gradient(grad, kept, CODE)
                tl.store(grads + e * grad_expert_stride + columns[None, :], grad.to(KIND.dtype), mask=mask)

    if NEED_LOGITS:
        tl.debug_barrier()
        blocks = tl.cdiv(width, COLUMNS)
        for k in range(num_gates):
            start = tl.load(gates + 3 * num_gates + k).to(tl.int32)
            end = tl.load(gates + 3 * num_gates + k + 1).to(tl.int32)
            size = end - start
            mean = tl.zeros((ROWS,), tl.float32)
            for j in range(0, size, FEW_MEMBERS):
                at, mask = of_members(weights + start * stride, stride, j, size, inside)
                dots = sum_of_blocks(inner + start * stride, num_members * stride, blocks, stride, j, size, inside)
                mean += tl.sum(tl.load(at, mask=mask, other=0.0) * dots, 1)
            row_stride = tl.load(table + grad_logits + num_gates + k)
            length = tl.load(table + grad_logits + 2 * num_gates + k).to(tl.int32)
            out = pointer(table, grad_logits + k, LOGITS) + (first + rows) * row_stride
            for j in range(0, length, FEW_MEMBERS):
                at, mask = of_members(weights + start * stride, stride, j, size, inside)
                dots = sum_of_blocks(inner + start * stride, num_members * stride, blocks, stride, j, size, inside)
                grad = tl.where(mask, tl.load(at, mask=mask, other=0.0) * (dots - mean[:, None]), 0.0)
                members = j + tl.arange(0, FEW_MEMBERS)
                there = inside[:, None] & (members < length)[None, :]
                tl.store(out[:, None] + members[None, :], grad.to(LOGITS), mask=there)
