# mypy: ignore-errors
"""Kernels of a layerwise level's forward pass; see also layerwise_functions.py.

A layer's product reads the pre-activations below, normalizes, activates and drops them on their way, and writes its own
pre-activations; with them, for a batch norm behind it, the mean and the spread of each column in each block of rows.
Offsets to a program's first row or column are 64-bit; offsets within its block are not. ``layers`` is where the runs of
a layer's experts start in the table, and ``factor`` and ``eps`` are the layer's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import NONE, kernel, multiply, operand, pointer, whole
from mtlkernels.ops.level.triton.chain_kernels import add_bias
from mtlkernels.ops.level.triton.layerwise_functions import (
    ENTRIES,
    NO_NORM,
    hidden,
    layer_of,
    read_hidden,
    row_statistics,
)


@triton.jit
def corner_of(num_experts, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The program's block: expert, row block, first row and column, and how many are left of both."""
    blocks = tl.cdiv(width, COLUMNS)
    block = tl.program_id(0) // blocks
    e = block % num_experts
    first = (block // num_experts).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    return e, block // num_experts, first, first_column, left_rows, left_columns


@kernel()
def layerwise_product(
    table, inputs, weights, biases, outputs, layers, parts, num_experts, num_rows, width, depth, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, STATISTICS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The pre-activations of one layer of every expert.

    ``layers``, ``factor``, ``eps`` and ``LAYER`` are of the layer below; without a norm, activation and dropout the
    inputs are read as they are. ``STATISTICS`` writes ``parts`` [row block, expert, 2, width]: means, and sums of
    squared distances to them.
    """
    width = whole(width, KIND)
    depth = whole(depth, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, width, ROWS, COLUMNS)
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    inside = rows < left_rows
    there = columns < left_columns
    x = operand(table, inputs + e, KIND) + first * depth + rows[:, None] * depth + inner[None, :]
    weight = operand(table, weights + e, KIND) + first_column * depth + columns[None, :] * depth + inner[:, None]
    state = (layer, first, row_statistics(layer, first, rows, inside, LAYER, False, ROWS))
    as_is: tl.constexpr = LAYER.norm == NO_NORM and LAYER.activation == NONE and not LAYER.drops
    READ: tl.constexpr = None if as_is else read_hidden
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(acc, x, weight, None, inside, there, 0, depth, KIND, DEPTH, READ, state, LAYER)
    result = add_bias(acc, tl.load(table + biases + e), first_column, there, KIND, COLUMNS).to(KIND.dtype)
    out = operand(table, outputs + e, KIND) + first * width + first_column
    tl.store(out + rows[:, None] * width + columns[None, :], result, mask=inside[:, None] & there[None, :])
    if STATISTICS:
        value = tl.where(inside[:, None], result.to(tl.float32), 0.0)
        average = tl.sum(value, 0) / tl.minimum(left_rows, ROWS)
        distance = tl.where(inside[:, None], value - average[None, :], 0.0)
        at = (block.to(tl.int64) * num_experts + e) * 2 * width + first_column
        part = pointer(table, parts, tl.float32, KIND.aligned) + at + columns
        tl.store(part, average, mask=there)
        tl.store(part + width, tl.sum(distance * distance, 0), mask=there)


@kernel()
def batch_statistics(
    table, parts, layers, num_experts, num_rows, width, block_rows,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each column from those of blocks of rows, which ``layerwise_product`` wrote.

    First the mean of all, then each block's spread around that (Chan, Golub and LeVeque, 1979), in a fixed order.
    """
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, 1, width, 1, COLUMNS)
    entry = table + layers + ENTRIES * e
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = columns < left_columns
    blocks = tl.cdiv(num_rows, block_rows)
    stride = (tl.zeros((), tl.int64) + num_experts) * 2 * width
    part = pointer(table, parts, tl.float32) + e * 2 * width + first_column
    part = part + rows[:, None] * stride + columns[None, :]
    step = stride * ROWS
    at = part
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b in range(0, blocks, ROWS):
        mask = (b + rows < blocks)[:, None] & inside[None, :]
        counts = tl.minimum(num_rows - (b + rows) * block_rows, block_rows).to(tl.float32)
        total += counts[:, None] * tl.load(at, mask=mask, other=0.0)
        at += step
    mean = tl.sum(total, 0) / num_rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    at = part
    for b in range(0, blocks, ROWS):
        mask = (b + rows < blocks)[:, None] & inside[None, :]
        counts = tl.minimum(num_rows - (b + rows) * block_rows, block_rows).to(tl.float32)
        distance = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        spread = tl.load(at + width, mask=mask, other=0.0)
        total += tl.where(mask, spread + counts[:, None] * distance * distance, 0.0)
        at += step
    offsets = first_column + columns
    tl.store(pointer(entry, 0, tl.float32) + offsets, mean, mask=inside)
    tl.store(pointer(entry, 1, tl.float32) + offsets, tl.sum(total, 0) / num_rows, mask=inside)


@kernel()
def layer_statistics(
    table, values, layers, num_experts, num_rows, width,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of each row: a pass for the mean, a pass for the distances to it."""
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    entry = table + layers + ENTRIES * e
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    z = operand(table, values + e, KIND) + first * width + rows[:, None] * width + columns[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, COLUMNS):
        mask = inside[:, None] & (columns < width - k)[None, :]
        total += tl.load(z + k, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / tl.maximum(width, 1)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, COLUMNS):
        mask = inside[:, None] & (columns < width - k)[None, :]
        distance = tl.load(z + k, mask=mask, other=0.0).to(tl.float32) - mean[:, None]
        total += tl.where(mask, distance * distance, 0.0)
    tl.store(pointer(entry, 0, tl.float32) + first + rows, mean, mask=inside)
    variance = tl.sum(total, 1) / tl.maximum(width, 1)
    tl.store(pointer(entry, 1, tl.float32) + first + rows, variance, mask=inside)


@kernel()
def normalize(
    table, values, outputs, layers, num_experts, num_rows, width, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What a layer gives, from its pre-activations: for the mixture, and for the gradient of the weights above."""
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, width, ROWS, COLUMNS)
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    there = columns < left_columns
    mask = inside[:, None] & there[None, :]
    offsets = first * width + first_column + rows[:, None] * width + columns[None, :]
    z = tl.load(operand(table, values + e, KIND) + offsets, mask=mask, other=0.0).to(tl.float32)
    of_rows = row_statistics(layer, first, rows, inside, LAYER, False, ROWS)
    value = hidden(z, layer, first, first_column, first_column + columns, there, of_rows, LAYER, ROWS, COLUMNS)
    tl.store(operand(table, outputs + e, KIND) + offsets, value.to(KIND.dtype), mask=mask)
