# mypy: ignore-errors
"""Kernels of the expert mixture: grouped products over the experts, each with what comes before or after it fused.

Block rows are numbered outermost, then experts, then block columns: the programs at work at a time share a few blocks
of rows and all weights, so that the rows come from memory once and the weights from the L2 cache.
Offsets to a program's first row or column are 64-bit; offsets within its block are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import (
    activate,
    derivative,
    gate_logits,
    pointer,
    probability,
    product,
    softmax_statistics,
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
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The last layer of every expert and all gates' weighted sums of them, held in registers.

    ``positions`` [K, E] holds an expert's place among a gate's logits, or -1. ``KEEP`` writes what the backward pass
    reads; without it no expert's output reaches memory.
    """
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
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
        logits, column_stride, start, end = gate_logits(gates, k, GATES, first, rows, LOGITS)
        maximum, total = softmax_statistics(logits, column_stride, end - start, inside, ROWS)
        maxima = maxima + (maximum,)
        totals = totals + (total,)
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)

    for e in range(num_experts):
        x = pointer(table, inputs + e, DTYPE, ALIGNED) + first * depth
        weight = pointer(table, weights + e, DTYPE, ALIGNED) + first_column * depth
        bias = table + biases + e
        acc = linear(
            x, weight, bias, first_column, left_rows, left_columns, depth,
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
                logits, column_stride, start, end = gate_logits(gates, k, GATES, first, rows, LOGITS)
                share = probability(logits, column_stride, position, maxima[k], totals[k], inside)
                value += share[:, None] * expert
            mixed = mixed + (value,)
        sums = mixed

    for k in tl.static_range(GATES):
        out = pointer(table, outputs + k, DTYPE, ALIGNED) + corner
        tl.store(out + offsets, sums[k].to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=[
        "grads",
        "weights",
        "members",
        "outputs",
        "kept",
        "activated",
        "num_groups",
        "num_rows",
        "width",
        "depth",
    ]
)
def input_gradient(
    table,
    grads,
    weights,
    members,
    outputs,
    kept,
    activated,
    num_groups,
    num_rows,
    width,
    depth,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CODE: tl.constexpr,
    ACTIVATED: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``sum_e d_e W_e`` over the experts of each group, times the derivative of the activation below.

    ``members`` lists num_groups + 1 offsets, then the experts of all groups: for a network's inputs a group is the
    experts that read a stream, which lie side by side along the depth of one product; below other layers a group is one
    expert. ``kept`` is what the forward pass saved of the layer below (unused if ``CODE`` is 0); ``ACTIVATED`` writes
    its activation, for the gradient of the weights.
    """
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    blocks = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) // blocks
    group = block % num_groups
    first = (block // num_groups).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    start = tl.load(table + members + group).to(tl.int32)
    end = tl.load(table + members + group + 1).to(tl.int32)
    for i in range(start, end):
        e = tl.load(table + members + num_groups + 1 + i)
        grad = pointer(table, grads + e, DTYPE, ALIGNED) + first * depth
        grad = grad + rows[:, None] * depth + inner[None, :]
        weight = pointer(table, weights + e, DTYPE, ALIGNED) + first_column
        weight = weight + inner[:, None] * width + columns[None, :]
        step = (tl.zeros((), tl.int64) + DEPTH) * width
        for k in range(0, depth, DEPTH):
            a = tl.load(grad, mask=(rows < left_rows)[:, None] & (inner < depth - k)[None, :], other=0.0)
            b = tl.load(weight, mask=(inner < depth - k)[:, None] & (columns < left_columns)[None, :], other=0.0)
            acc = product(a, b, acc, PRECISION, UPCAST)
            grad += DEPTH
            weight += step
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    if CODE or ACTIVATED:
        saved = tl.load(pointer(table, kept + group, DTYPE, ALIGNED) + corner + offsets, mask=mask, other=0.0)
        saved = saved.to(tl.float32)
        acc = acc * derivative(saved, CODE)
        if ACTIVATED:
            out = pointer(table, activated + group, DTYPE, ALIGNED) + corner
            tl.store(out + offsets, activate(saved, CODE).to(DTYPE), mask=mask)
    tl.store(pointer(table, outputs + group, DTYPE, ALIGNED) + corner + offsets, acc.to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["layers", "num_layers", "num_experts", "num_rows"])
def weight_gradient(
    table,
    layers,
    num_layers,
    num_experts,
    num_rows,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    NEED_BIASES: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """``d^T x`` and the column sums of d, of every layer of every expert, with the batch along the depth.

    ``layers`` holds seven entries a layer: its first program, its outputs, its inputs, and where the addresses of the
    experts' d [B, outputs], x [B, inputs], weight and bias gradients start.
    """
    layer = 0
    for i in range(1, num_layers):
        layer = tl.where(tl.program_id(0) >= tl.load(table + layers + 7 * i), i, layer)
    entry = table + layers + 7 * layer
    tile = tl.program_id(0) - tl.load(entry).to(tl.int32)
    height = whole(tl.load(entry + 1).to(tl.int32), ALIGNED)
    width = whole(tl.load(entry + 2).to(tl.int32), ALIGNED)
    blocks = tl.cdiv(width, COLUMNS) if NEED_WEIGHTS else 1
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    tile = tile // blocks
    e = tile % num_experts
    first = (tile // num_experts).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    left_rows = (height - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    grad = pointer(table, tl.load(entry + 3) + e, DTYPE, ALIGNED) + first
    if NEED_WEIGHTS:
        left = grad + inner[None, :] * height + rows[:, None]
        right = pointer(table, tl.load(entry + 4) + e, DTYPE, ALIGNED) + first_column
        right = right + inner[:, None] * width + columns[None, :]
        left_step = (tl.zeros((), tl.int64) + DEPTH) * height
        right_step = (tl.zeros((), tl.int64) + DEPTH) * width
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, num_rows, DEPTH):
            a = tl.load(left, mask=(rows < left_rows)[:, None] & (inner < num_rows - k)[None, :], other=0.0)
            b = tl.load(right, mask=(inner < num_rows - k)[:, None] & (columns < left_columns)[None, :], other=0.0)
            acc = product(a, b, acc, PRECISION, UPCAST)
            left += left_step
            right += right_step
        out = pointer(table, tl.load(entry + 5) + e, DTYPE, ALIGNED) + first * width + first_column
        mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
        tl.store(out + rows[:, None] * width + columns[None, :], acc.to(DTYPE), mask=mask)
    if NEED_BIASES:  # noqa: SIM102 (this is decided when compiling, the next one is not)
        # A pass of its own, by the first of the programs that share these rows: summed beside the product, d would have
        # to be in registers as well as in shared memory.
        if first_column == 0:
            part = grad + inner[:, None] * height + rows[None, :]
            part_step = (tl.zeros((), tl.int64) + DEPTH) * height
            total = tl.zeros((DEPTH, ROWS), tl.float32)
            for k in range(0, num_rows, DEPTH):
                there = (inner < num_rows - k)[:, None] & (rows < left_rows)[None, :]
                total += tl.load(part, mask=there, other=0.0).to(tl.float32)
                part += part_step
            sums = pointer(table, tl.load(entry + 6) + e, DTYPE, ALIGNED) + first
            tl.store(sums + rows, tl.sum(total, 0).to(DTYPE), mask=rows < left_rows)
