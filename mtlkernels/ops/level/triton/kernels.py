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

# How many logits of the gates that read a stream a program computes: few, as there are few, beside many experts.
GATE_COLUMNS = tl.constexpr(32)


@triton.jit
def multiply(
    x,
    weight,
    left_rows,
    left_columns,
    depth,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``x W^T`` of a block, float32, of pointers to where it starts: x [ROWS, DEPTH] and W [DEPTH, COLUMNS]."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        a = tl.load(x + k, mask=(rows < left_rows)[:, None] & (inner < depth - k)[None, :], other=0.0)
        b = tl.load(weight + k, mask=(inner < depth - k)[:, None] & (columns < left_columns)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, UPCAST)
    return acc


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
    acc = multiply(x, weight, left_rows, left_columns, depth, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH)
    address = tl.load(bias)
    if address != 0:
        added = address.to(tl.pointer_type(DTYPE)) + first_column + columns
        acc += tl.load(added, mask=columns < left_columns, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def expert_layer(
    table,
    inputs,
    weights,
    biases,
    outputs,
    kept,
    e,
    block,
    first,
    left_rows,
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
    """A block of columns of one expert's layer; ``first`` is its first row."""
    first_column = block.to(tl.int64) * COLUMNS
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


@triton.jit
def gate_layer(
    table,
    gates,
    num_tiles,
    tile,
    first,
    left_rows,
    depth,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Some of the logits of the gates that read a stream, whatever gates they belong to.

    ``gates`` holds the address of the logits, the length W of their rows, three entries a tile (the address of its
    stream, its first column, and how many it has), W addresses of rows of weights, and W of biases, which may be null.
    """
    entry = table + gates + 2 + 3 * tile
    first_column = tl.load(entry + 1).to(tl.int32)
    left_columns = tl.load(entry + 2).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    at = table + gates + 2 + 3 * num_tiles + first_column + columns
    weight = tl.load(at, mask=columns < left_columns, other=0).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        weight = tl.multiple_of(weight, 16)
    x = pointer(entry, 0, DTYPE, ALIGNED) + first * depth + rows[:, None] * depth + inner[None, :]
    acc = multiply(
        x, weight[None, :] + inner[:, None], left_rows, left_columns, depth, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    width = tl.load(table + gates + 1).to(tl.int32)
    bias = tl.load(at + width, mask=columns < left_columns, other=0)
    acc += tl.load(bias.to(tl.pointer_type(DTYPE)), mask=bias != 0, other=0.0).to(tl.float32)[None, :]
    out = pointer(table, gates, DTYPE, False) + first * width + first_column
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    tl.store(out + rows[:, None] * width + columns[None, :], acc.to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=[
        "inputs",
        "weights",
        "biases",
        "outputs",
        "kept",
        "gates",
        "gate_tiles",
        "num_experts",
        "num_rows",
        "width",
        "depth",
    ]
)
def layer_forward(
    table,
    inputs,
    weights,
    biases,
    outputs,
    kept,
    gates,
    gate_tiles,
    num_experts,
    num_rows,
    width,
    depth,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CODE: tl.constexpr,
    KEEP: tl.constexpr,
    GATE_LAYERS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One layer of every expert, activated; ``KEEP`` writes the activation's input too.

    ``GATE_LAYERS``: behind the experts' programs of a block of rows come ``gate_tiles`` of gates that are linear layers
    of the same inputs; ``gates`` is described by ``gate_layer``.
    """
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    of_experts = num_experts * blocks
    programs = of_experts
    if GATE_LAYERS:
        programs += gate_tiles
    first = (tl.program_id(0) // programs).to(tl.int64) * ROWS
    place = tl.program_id(0) % programs
    left_rows = (num_rows - first).to(tl.int32)
    if GATE_LAYERS:
        if place < of_experts:
            expert_layer(
                table, inputs, weights, biases, outputs, kept, place // blocks, place % blocks, first, left_rows,
                width, depth, DTYPE, ALIGNED, CODE, KEEP, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
        else:
            gate_layer(
                table, gates, gate_tiles, place - of_experts, first, left_rows, depth,
                DTYPE, ALIGNED, PRECISION, UPCAST, ROWS, GATE_COLUMNS, DEPTH,
            )  # fmt: skip
    else:
        expert_layer(
            table, inputs, weights, biases, outputs, kept, place // blocks, place % blocks, first, left_rows,
            width, depth, DTYPE, ALIGNED, CODE, KEEP, PRECISION, UPCAST, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


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
