# mypy: ignore-errors
"""Kernels of the normalized mixture for what Dice needs to know of whole rows.

y = x (p + (1 - p) a) with p = sigmoid(u), u = (x - mean) q and q = 1 / sqrt(sum((x - mean)^2 + eps)), over a row. With
these two numbers of each row Dice is an activation like the others, which whoever reads the pre-activations applies.
Its gradient needs two more: of w, the gradient of u, the mean over the row and the sum of w u; that of x through u is
then q (w - mean(w) - u sum(w u)).
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import pointer, whole
from mtlkernels.ops.normalized_mixture.triton_functions import (
    dice_gradient,
    dice_statistics,
    hidden,
    kept,
    normalized,
    row_statistics,
    slopes_of,
)
from mtlkernels.ops.normalized_mixture.triton_kernels import corner_of


@triton.jit(
    do_not_specialize=["values", "outputs", "norm", "seed", "num_experts", "num_rows", "width", "layer", "threshold"]
)
def dice_rows(
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
    dice_eps,
    DTYPE: tl.constexpr,
    SCALES: tl.constexpr,
    ALIGNED: tl.constexpr,
    NORM: tl.constexpr,
    CODE: tl.constexpr,
    DROPS: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Mean and factor of each row; with ``HIDDEN``, then, what the layer gives: its rows are at hand."""
    width = whole(width, ALIGNED)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    offsets = first * width + rows[:, None] * width + columns[None, :]
    z = pointer(table, values + e, DTYPE, ALIGNED) + offsets
    of_norm = row_statistics(table, norm, e, num_experts, first, rows, inside, eps, NORM, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    for squares in tl.static_range(2):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, COLUMNS):
            there = columns < width - k
            mask = inside[:, None] & there[None, :]
            value = tl.load(z + k, mask=mask, other=0.0).to(tl.float32)
            _, x = normalized(
                value, table, norm, e, num_experts, k + columns, there, of_norm, eps, SCALES, NORM, COLUMNS
            )
            distance = x - mean[:, None]
            total += tl.where(mask, distance * distance if squares else distance, 0.0)
        if squares:
            of_dice = mean, tl.where(inside, 1.0 / tl.sqrt_rn(tl.sum(total, 1) + tl.maximum(width, 1) * dice_eps), 0.0)
        else:
            mean = tl.sum(total, 1) / tl.maximum(width, 1)
    at = pointer(table, norm + 6 * num_experts + e, tl.float32, False) + first + rows
    tl.store(at, of_dice[0], mask=inside)
    at = pointer(table, norm + 7 * num_experts + e, tl.float32, False) + first + rows
    tl.store(at, of_dice[1], mask=inside)
    if HIDDEN:
        out = pointer(table, outputs + e, DTYPE, ALIGNED) + offsets
        for k in range(0, width, COLUMNS):
            there = columns < width - k
            mask = inside[:, None] & there[None, :]
            value = tl.load(z + k, mask=mask, other=0.0).to(tl.float32)
            start = tl.zeros((), tl.int64) + k
            value = hidden(
                value, table, norm, seed, layer, e, num_experts, first, start, k + columns, there,
                of_norm, of_dice, eps, threshold, factor, SCALES, NORM, CODE, DROPS, ROWS, COLUMNS,
            )  # fmt: skip
            tl.store(out + k, value.to(DTYPE), mask=mask)


@triton.jit(
    do_not_specialize=["values", "grads", "norm", "seed", "num_experts", "num_rows", "width", "layer", "threshold"]
)
def dice_gradient_rows(
    table,
    values,
    grads,
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
    """Of each row the mean of w, and the sum of w u."""
    width = whole(width, ALIGNED)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    offsets = first * width + rows[:, None] * width + columns[None, :]
    values = pointer(table, values + e, DTYPE, ALIGNED) + offsets
    grads = pointer(table, grads + e, DTYPE, ALIGNED) + offsets
    of_norm = row_statistics(table, norm, e, num_experts, first, rows, inside, eps, NORM, ROWS)
    of_dice = dice_statistics(table, norm, e, num_experts, first, rows, inside, CODE, False, ROWS)
    level = tl.zeros((ROWS, COLUMNS), tl.float32)
    along = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, COLUMNS):
        there = columns < width - k
        mask = inside[:, None] & there[None, :]
        z = tl.load(values + k, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + k, mask=mask, other=0.0).to(tl.float32)
        if DROPS:
            start = tl.zeros((), tl.int64) + k
            stays = kept(table, seed, layer, e, first, start, threshold, ROWS, COLUMNS)
            grad = grad * tl.where(stays, factor, 0.0)
        _, x = normalized(z, table, norm, e, num_experts, k + columns, there, of_norm, eps, SCALES, NORM, COLUMNS)
        slope = slopes_of(table, norm, e, num_experts, k + columns, there, SCALES, COLUMNS)
        u, _, _, w = dice_gradient(grad, x, slope[None, :], there, of_dice)
        level += tl.where(mask, w, 0.0)
        along += tl.where(mask, w * u, 0.0)
    at = pointer(table, norm + 8 * num_experts + e, tl.float32, False) + first + rows
    tl.store(at, tl.sum(level, 1) / tl.maximum(width, 1), mask=inside)
    at = pointer(table, norm + 9 * num_experts + e, tl.float32, False) + first + rows
    tl.store(at, tl.sum(along, 1), mask=inside)
