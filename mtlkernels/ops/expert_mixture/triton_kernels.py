# mypy: ignore-errors
"""Kernels of the expert mixture's forward pass: grouped products over the experts, and what follows each of them.

Block rows are numbered outermost, then experts, then block columns: the programs at work at a time share a few blocks
of rows and all weights, so that the rows come from memory once and the weights from the L2 cache.
Offsets to a program's first row or column are 64-bit; offsets within its block are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import (
    activate,
    gate_logits,
    parts_to_add,
    pointer,
    probability,
    product,
    share_of,
    softmax_statistics,
    sum_of_parts,
    whole,
)


@triton.jit
def linear(
    x,
    weight,
    bias,
    first_column,
    left_rows,
    left_columns,
    depth,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``x W^T + b`` of a block, float32. ``x`` and ``weight`` are at its first row and first output.

    ``bias`` is the place in the table of the layer's bias, which may be null.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    x = x + rows[:, None] * depth + inner[None, :]
    weight = weight + columns[None, :] * depth + inner[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        a = tl.load(x + k, mask=(rows < left_rows)[:, None] & (inner < depth - k)[None, :], other=0.0)
        b = tl.load(weight + k, mask=(inner < depth - k)[:, None] & (columns < left_columns)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, UPCAST)
    address = tl.load(bias)
    if address != 0:
        added = address.to(tl.pointer_type(DTYPE)) + first_column + columns
        acc += tl.load(added, mask=columns < left_columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(
    do_not_specialize=["inputs", "weights", "biases", "outputs", "kept", "num_experts", "num_rows", "width", "depth"]
)
def layer_forward(
    table,
    inputs,
    weights,
    biases,
    outputs,
    kept,
    num_experts,
    num_rows,
    width,
    depth,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CODE: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One layer of every expert, activated; ``KEEP`` writes the activation's input too."""
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) // blocks
    e = block % num_experts
    first = (block // num_experts).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    x = pointer(table, inputs + e, DTYPE, ALIGNED) + first * depth
    weight = pointer(table, weights + e, DTYPE, ALIGNED) + first_column * depth
    bias = table + biases + e
    acc = linear(
        x, weight, bias, first_column, left_rows, left_columns, depth, DTYPE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    if KEEP:
        tl.store(pointer(table, kept + e, DTYPE, ALIGNED) + corner + offsets, acc.to(DTYPE), mask=mask)
    out = pointer(table, outputs + e, DTYPE, ALIGNED) + corner
    tl.store(out + offsets, activate(acc, CODE).to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=[
        "inputs",
        "weights",
        "biases",
        "outputs",
        "kept",
        "gates",
        "positions",
        "parts",
        "counters",
        "splits",
        "num_experts",
        "num_rows",
        "width",
        "depth",
    ]
)
def last_forward(
    table,
    inputs,
    weights,
    biases,
    outputs,
    kept,
    gates,
    positions,
    parts,
    counters,
    splits,
    num_experts,
    num_rows,
    width,
    depth,
    DTYPE: tl.constexpr,
    LOGITS: tl.constexpr,
    ALIGNED: tl.constexpr,
    CODE: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    KEEP: tl.constexpr,
    GATES: tl.constexpr,
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The last layer of every expert and all gates' weighted sums of them, held in registers.

    ``positions`` [K, E] holds an expert's place among a gate's logits, or -1. ``KEEP`` writes what the backward pass
    reads; without it no expert's output reaches memory. ``SPLIT``: ``splits`` programs share a block, each with some of
    the experts, and the last one to arrive adds what the others have stored in ``parts`` [block, split, gate].
    """
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    start = 0
    end = num_experts
    if SPLIT:
        share = tile % splits
        tile = tile // splits
        start, end = share_of(num_experts, share, splits)
    first = (tile // blocks).to(tl.int64) * ROWS
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    mask = inside[:, None] & (columns < left_columns)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    gates = table + gates

    maxima = ()
    totals = ()
    sums = ()
    for k in tl.static_range(GATES):
        logits, column_stride, low, high = gate_logits(gates, k, GATES, first, rows, LOGITS)
        maximum, total = softmax_statistics(logits, column_stride, high - low, inside, ROWS)
        maxima = maxima + (maximum,)
        totals = totals + (total,)
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)

    for e in range(start, end):
        x = pointer(table, inputs + e, DTYPE, ALIGNED) + first * depth
        layer = pointer(table, weights + e, DTYPE, ALIGNED) + first_column * depth
        bias = table + biases + e
        acc = linear(
            x, layer, bias, first_column, left_rows, left_columns, depth,
            DTYPE, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
        expert = activate(acc, CODE)
        if KEEP:
            out = pointer(table, kept + e, DTYPE, ALIGNED) + corner
            tl.store(out + offsets, (acc if FROM_INPUT else expert).to(DTYPE), mask=mask)
        mixed = ()
        for k in tl.static_range(GATES):
            position = tl.load(table + positions + k * num_experts + e)
            value = sums[k]
            if position >= 0:  # an expert that the gate does not see must not reach it, not even as 0 times infinity
                logits, column_stride, low, high = gate_logits(gates, k, GATES, first, rows, LOGITS)
                weight = probability(logits, column_stride, position, maxima[k], totals[k], inside)
                value += weight[:, None] * expert
            mixed = mixed + (value,)
        sums = mixed

    if SPLIT:
        area: tl.constexpr = ROWS * COLUMNS
        within = rows[:, None] * COLUMNS + columns[None, :]
        shared = pointer(table, parts, tl.float32, True) + tile.to(tl.int64) * splits * (GATES * area)
        for k in tl.static_range(GATES):
            tl.store(shared + (share * GATES + k) * area + within, sums[k])
        count = parts_to_add(table + counters + tile, splits)
        mask = mask & (rows < count * ROWS)[:, None]  # nothing but by the last to arrive
        for k in tl.static_range(GATES):
            value = sum_of_parts(shared + k * area, count, GATES * area, within)
            tl.store(pointer(table, outputs + k, DTYPE, ALIGNED) + corner + offsets, value.to(DTYPE), mask=mask)
    else:
        for k in tl.static_range(GATES):
            tl.store(pointer(table, outputs + k, DTYPE, ALIGNED) + corner + offsets, sums[k].to(DTYPE), mask=mask)
