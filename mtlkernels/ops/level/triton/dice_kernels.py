# mypy: ignore-errors
"""Kernels of a layerwise level for what Dice needs to know of whole rows.

y = x (p + (1 - p) a) with p = sigmoid(u), u = (x - mean) q and q = 1 / sqrt(sum((x - mean)^2 + eps)), over a row. With
these two numbers of each row Dice is an activation like the others, which whoever reads the pre-activations applies.
Its gradient needs two more: of w, the gradient of u, the mean over the row and the sum of w u; that of x through u is
then q (w - mean(w) - u sum(w u)).
"""

from __future__ import annotations

import triton.language as tl

from mtlkernels.ops._triton_functions import kernel, operand, whole
from mtlkernels.ops.level.triton.layerwise_functions import (
    ALONG,
    CENTERS,
    FACTORS,
    LEVELS,
    dice_gradient,
    dropped,
    hidden,
    layer_of,
    normalized,
    numbers,
    row_statistics,
    slopes_of,
)
from mtlkernels.ops.level.triton.layerwise_kernels import corner_of


@kernel()
def dice_rows(
    table, values, outputs, layers, num_experts, num_rows, width, factor, eps, dice_eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, HIDDEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Mean and factor of each row; with ``HIDDEN``, then, what the layer gives: its rows are at hand."""
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    offsets = first * width + rows[:, None] * width + columns[None, :]
    z = operand(table, values + e, KIND) + offsets
    of_norm = row_statistics(layer, first, rows, inside, LAYER, False, ROWS)
    mean = tl.zeros((ROWS,), tl.float32)
    spread = mean
    for squares in tl.static_range(2):
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, COLUMNS):
            there = columns < width - k
            mask = inside[:, None] & there[None, :]
            value = tl.load(z + k, mask=mask, other=0.0).to(tl.float32)
            _, x = normalized(value, layer, k + columns, there, of_norm, LAYER, COLUMNS)
            distance = x - mean[:, None]
            total += tl.where(mask, distance * distance if squares else distance, 0.0)
        if squares:
            spread = tl.where(inside, 1.0 / tl.sqrt_rn(tl.sum(total, 1) + tl.maximum(width, 1) * dice_eps), 0.0)
        else:
            mean = tl.sum(total, 1) / tl.maximum(width, 1)
    tl.store(numbers(layer, CENTERS) + first + rows, mean, mask=inside)
    tl.store(numbers(layer, FACTORS) + first + rows, spread, mask=inside)
    if HIDDEN:
        of_rows = (of_norm[0], of_norm[1], mean, spread)
        out = operand(table, outputs + e, KIND) + offsets
        for k in range(0, width, COLUMNS):
            there = columns < width - k
            mask = inside[:, None] & there[None, :]
            value = tl.load(z + k, mask=mask, other=0.0).to(tl.float32)
            start = tl.zeros((), tl.int64) + k
            value = hidden(value, layer, first, start, k + columns, there, of_rows, LAYER, ROWS, COLUMNS)
            tl.store(out + k, value.to(KIND.dtype), mask=mask)


@kernel()
def dice_gradient_rows(
    table, values, grads, layers, num_experts, num_rows, width, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Of each row the mean of w, and the sum of w u."""
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    offsets = first * width + rows[:, None] * width + columns[None, :]
    values = operand(table, values + e, KIND) + offsets
    grads = operand(table, grads + e, KIND) + offsets
    of_rows = row_statistics(layer, first, rows, inside, LAYER, False, ROWS)
    level = tl.zeros((ROWS, COLUMNS), tl.float32)
    along = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, width, COLUMNS):
        there = columns < width - k
        mask = inside[:, None] & there[None, :]
        z = tl.load(values + k, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + k, mask=mask, other=0.0).to(tl.float32)
        grad = dropped(grad, layer, first, tl.zeros((), tl.int64) + k, LAYER, ROWS, COLUMNS)
        _, x = normalized(z, layer, k + columns, there, of_rows, LAYER, COLUMNS)
        slope = slopes_of(layer, k + columns, there, LAYER, COLUMNS)
        u, _, _, w = dice_gradient(grad, x, slope, there, of_rows)
        level += tl.where(mask, w, 0.0)
        along += tl.where(mask, w * u, 0.0)
    tl.store(numbers(layer, LEVELS) + first + rows, tl.sum(level, 1) / tl.maximum(width, 1), mask=inside)
    tl.store(numbers(layer, ALONG) + first + rows, tl.sum(along, 1), mask=inside)
