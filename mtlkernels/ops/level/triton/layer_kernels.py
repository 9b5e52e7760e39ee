# mypy: ignore-errors
"""Kernels of the normalized mixture's forward pass; see also triton_functions.py.

A layer's product reads the pre-activations below, normalizes, activates and drops them on their way, and writes its own
pre-activations; with them, for a batch norm behind it, the mean and the spread of each column in each block of rows.
Offsets to a program's first row or column are 64-bit; offsets within its block are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import pointer, product, whole
from mtlkernels.ops.normalized_mixture.triton_functions import dice_statistics, hidden, row_statistics


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


@triton.jit(
    do_not_specialize=[
        "inputs",
        "weights",
        "biases",
        "outputs",
        "norm",
        "seed",
        "parts",
        "num_experts",
        "num_rows",
        "width",
        "depth",
        "layer",
        "threshold",
    ]
)
def normalized_layer(
    table,
    inputs,
    weights,
    biases,
    outputs,
    norm,
    seed,
    parts,
    num_experts,
    num_rows,
    width,
    depth,
    layer,
    threshold,
    factor,
    eps,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    CODE: tl.constexpr,
    DROPS: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The pre-activations of one layer of every expert.

    ``layer``, ``norm`` and what follows them belong to the layer below; without a norm, activation and dropout the
    inputs are read as they are. ``STATISTICS`` writes ``parts`` [row block, expert, 2, width]: means, and sums of
    squared distances to them.
    """
    width = whole(width, ALIGNED)
    depth = whole(depth, ALIGNED)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, width, ROWS, COLUMNS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    inside = rows < left_rows
    x = pointer(table, inputs + e, DTYPE, ALIGNED) + first * depth + rows[:, None] * depth + inner[None, :]
    weight = pointer(table, weights + e, DTYPE, ALIGNED) + first_column * depth
    weight = weight + columns[None, :] * depth + inner[:, None]
    of_norm = row_statistics(table, norm, e, num_experts, first, rows, inside, eps, NORM, ROWS)
    of_dice = dice_statistics(table, norm, e, num_experts, first, rows, inside, CODE, False, ROWS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, depth, DEPTH):
        there = inner < depth - k
        a = tl.load(x + k, mask=inside[:, None] & there[None, :], other=0.0)
        if NORM or CODE or DROPS:
            start = tl.zeros((), tl.int64) + k
            value = hidden(
                a.to(tl.float32), table, norm, seed, layer, e, num_experts, first, start, k + inner, there,
                of_norm, of_dice, eps, threshold, factor, SCALES, NORM, CODE, DROPS, ROWS, DEPTH,
            )  # fmt: skip
            a = tl.where(there[None, :], value, 0.0).to(DTYPE)
        b = tl.load(weight + k, mask=there[:, None] & (columns < left_columns)[None, :], other=0.0)
        acc = product(a, b, acc, PRECISION, UPCAST)
    address = tl.load(table + biases + e)
    if address != 0:
        added = address.to(tl.pointer_type(DTYPE)) + first_column + columns
        acc += tl.load(added, mask=columns < left_columns, other=0.0).to(tl.float32)[None, :]
    result = acc.to(DTYPE)
    mask = inside[:, None] & (columns < left_columns)[None, :]
    out = pointer(table, outputs + e, DTYPE, ALIGNED) + first * width + first_column
    tl.store(out + rows[:, None] * width + columns[None, :], result, mask=mask)
    if STATISTICS:
        value = tl.where(inside[:, None], result.to(tl.float32), 0.0)
        average = tl.sum(value, 0) / tl.minimum(left_rows, ROWS)
        distance = tl.where(inside[:, None], value - average[None, :], 0.0)
        at = (block.to(tl.int64) * num_experts + e) * 2 * width + first_column
        part = pointer(table, parts, tl.float32, ALIGNED) + at + columns
        tl.store(part, average, mask=columns < left_columns)
        tl.store(part + width, tl.sum(distance * distance, 0), mask=columns < left_columns)


@triton.jit(do_not_specialize=["parts", "norm", "num_experts", "num_rows", "width", "block_rows"])
def batch_statistics(
    table,
    parts,
    norm,
    num_experts,
    num_rows,
    width,
    block_rows,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Mean and biased variance of each column from those of blocks of rows, which ``normalized_layer`` wrote.

    First the mean of all, then each block's spread around that (Chan, Golub and LeVeque, 1979), in a fixed order.
    """
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, 1, width, 1, COLUMNS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    blocks = tl.cdiv(num_rows, block_rows)
    stride = (tl.zeros((), tl.int64) + num_experts) * 2 * width
    part = pointer(table, parts, tl.float32, False) + e * 2 * width + first_column
    part = part + rows[:, None] * stride + columns[None, :]
    step = stride * ROWS
    at = part
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for b in range(0, blocks, ROWS):
        mask = (b + rows < blocks)[:, None] & (columns < left_columns)[None, :]
        counts = tl.minimum(num_rows - (b + rows) * block_rows, block_rows).to(tl.float32)
        total += counts[:, None] * tl.load(at, mask=mask, other=0.0)
        at += step
    mean = tl.sum(total, 0) / num_rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    at = part
    for b in range(0, blocks, ROWS):
        mask = (b + rows < blocks)[:, None] & (columns < left_columns)[None, :]
        counts = tl.minimum(num_rows - (b + rows) * block_rows, block_rows).to(tl.float32)
        distance = tl.load(at, mask=mask, other=0.0) - mean[None, :]
        spread = tl.load(at + width, mask=mask, other=0.0)
        total += tl.where(mask, spread + counts[:, None] * distance * distance, 0.0)
        at += step
    inside = columns < left_columns
    offsets = first_column + columns
    tl.store(pointer(table, norm + e, tl.float32, False) + offsets, mean, mask=inside)
    variance = tl.sum(total, 0) / num_rows
    tl.store(pointer(table, norm + num_experts + e, tl.float32, False) + offsets, variance, mask=inside)


@triton.jit(do_not_specialize=["values", "norm", "num_experts", "num_rows", "width"])
def layer_statistics(
    table,
    values,
    norm,
    num_experts,
    num_rows,
    width,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Mean and biased variance of each row: a pass for the mean, a pass for the distances to it."""
    width = whole(width, ALIGNED)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    z = pointer(table, values + e, DTYPE, ALIGNED) + first * width + rows[:, None] * width + columns[None, :]
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
    tl.store(pointer(table, norm + e, tl.float32, False) + first + rows, mean, mask=inside)
    variance = tl.sum(total, 1) / tl.maximum(width, 1)
    tl.store(pointer(table, norm + num_experts + e, tl.float32, False) + first + rows, variance, mask=inside)


@triton.jit(
    do_not_specialize=["values", "outputs", "norm", "seed", "num_experts", "num_rows", "width", "layer", "threshold"]
)
def normalize(
    table,
    values,
    outputs,
    norm,
    seed,
    num_experts,
    num_rows,
    width,
    layer,
    threshold,
    factor,
    eps,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    CODE: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """What a layer gives, from its pre-activations: for the mixture, and for the gradient of the weights above."""
    width = whole(width, ALIGNED)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, width, ROWS, COLUMNS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    there = columns < left_columns
    mask = inside[:, None] & there[None, :]
    offsets = first * width + first_column + rows[:, None] * width + columns[None, :]
    z = tl.load(pointer(table, values + e, DTYPE, ALIGNED) + offsets, mask=mask, other=0.0).to(tl.float32)
    of_norm = row_statistics(table, norm, e, num_experts, first, rows, inside, eps, NORM, ROWS)
    of_dice = dice_statistics(table, norm, e, num_experts, first, rows, inside, CODE, False, ROWS)
    value = hidden(
        z, table, norm, seed, layer, e, num_experts, first, first_column, first_column + columns, there,
        of_norm, of_dice, eps, threshold, factor, SCALES, NORM, CODE, DROPS, ROWS, COLUMNS,
    )  # fmt: skip
    tl.store(pointer(table, outputs + e, DTYPE, ALIGNED) + offsets, value.to(DTYPE), mask=mask)
