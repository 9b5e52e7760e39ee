# mypy: ignore-errors
"""Kernels of a layerwise level's backward pass: from the gradient of a layer's output to its pre-activations'.

With s the standardized pre-activation, g the gradient of ``s * scale + shift``, and means over what the statistics were
taken of: dz = rstd * (g * scale - mean(g * scale) - s * mean(g * scale * s)). Without a norm, dz is g.
"""

from __future__ import annotations

import triton.language as tl

from mtlkernels.ops._triton_functions import kernel, operand, pointer, whole
from mtlkernels.ops.level.triton.layerwise_functions import (
    NO_NORM,
    PRELU,
    VARIANCES,
    affine,
    layer_of,
    load_rows,
    norm_gradient,
    row_statistics,
)
from mtlkernels.ops.level.triton.layerwise_kernels import corner_of


@kernel()
def norm_sums(
    table, values, grads, layers, parts, num_experts, num_rows, width, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``parts`` [row block, expert, 3, width]: sums over the rows of a block, DEPTH tiles of them.

    Of g, of g s, and, if the activation has slopes, of their gradient at each value.
    """
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(
        num_experts, num_rows, width, ROWS * DEPTH, COLUMNS
    )
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = columns < left_columns
    values = operand(table, values + e, KIND) + first_column
    grads = operand(table, grads + e, KIND) + first_column
    shifts = tl.zeros((ROWS, COLUMNS), tl.float32)
    scales = tl.zeros((ROWS, COLUMNS), tl.float32)
    slopes = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(DEPTH):
        start = first + i * ROWS
        inside = start + rows < num_rows
        mask = inside[:, None] & there[None, :]
        offsets = start * width + rows[:, None] * width + columns[None, :]
        z = tl.load(values + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grads + offsets, mask=mask, other=0.0).to(tl.float32)
        of_rows = row_statistics(layer, start, rows, inside, LAYER, True, ROWS)
        g, s, a = norm_gradient(
            grad, z, layer, start, first_column, first_column + columns, there, of_rows, LAYER, ROWS, COLUMNS
        )
        g = tl.where(mask, g, 0.0)
        shifts += g
        scales += g * tl.where(mask, s, 0.0)
        if LAYER.activation >= PRELU:
            slopes += tl.where(mask, a, 0.0)
    at = (block.to(tl.int64) * num_experts + e) * 3 * width + first_column
    part = pointer(table, parts, tl.float32, KIND.aligned) + at + columns
    tl.store(part, tl.sum(shifts, 0), mask=there)
    tl.store(part + width, tl.sum(scales, 0), mask=there)
    if LAYER.activation >= PRELU:
        tl.store(part + 2 * width, tl.sum(slopes, 0), mask=there)


@kernel()
def norm_totals(
    table, parts, totals, outputs, num_experts, num_blocks, width,
    SCALES: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The first ``SUMS`` sums over all row blocks: ``totals`` [expert, 3, width], and the gradients that they are.

    ``outputs`` holds the addresses of those of all shifts, then scales, then slopes; a null is not wanted.
    """
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, 1, width, 1, COLUMNS)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    there = columns < left_columns
    stride = (tl.zeros((), tl.int64) + num_experts) * 3 * width
    part = pointer(table, parts, tl.float32) + e * 3 * width + first_column
    part = part + rows[:, None] * stride + columns[None, :]
    total = pointer(table, totals, tl.float32) + e * 3 * width + first_column + columns
    for which in tl.static_range(SUMS):
        at = part + which * width
        value = tl.zeros((ROWS, COLUMNS), tl.float32)
        for b in range(0, num_blocks, ROWS):
            value += tl.load(at, mask=(b + rows < num_blocks)[:, None] & there[None, :], other=0.0)
            at += stride * ROWS
        result = tl.sum(value, 0)
        tl.store(total + which * width, result, mask=there)
        address = tl.load(table + outputs + which * num_experts + e)
        if address != 0:
            out = address.to(tl.pointer_type(SCALES)) + first_column + columns
            tl.store(out, result.to(SCALES), mask=there)


@kernel()
def slope_totals(
    table, totals, outputs, widths,
    SCALES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradients of slopes that all channels share, from the totals of each channel."""
    i = tl.program_id(0)
    columns = tl.arange(0, COLUMNS)
    width = tl.load(table + widths + i)
    total = pointer(table, totals + i, tl.float32) + columns
    value = tl.zeros((COLUMNS,), tl.float32)
    for k in range(0, width, COLUMNS):
        value += tl.load(total + k, mask=columns < width - k, other=0.0)
    tl.store(pointer(table, outputs + i, SCALES), tl.sum(value, 0).to(SCALES))


@kernel()
def preactivation_gradient(
    table, values, grads, layers, totals, num_experts, num_rows, width, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of the pre-activations in the place of that of the outputs; no norm, or a batch norm."""
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
    at = operand(table, grads + e, KIND) + offsets
    grad = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    of_rows = row_statistics(layer, first, rows, inside, LAYER, True, ROWS)
    g, s, _ = norm_gradient(
        grad, z, layer, first, first_column, first_column + columns, there, of_rows, LAYER, ROWS, COLUMNS
    )
    if LAYER.norm != NO_NORM:
        scale, shift = affine(layer, first_column + columns, there, LAYER, COLUMNS)
        scale = scale / tl.sqrt_rn(load_rows(layer, VARIANCES, first_column, columns, there) + eps)
        total = pointer(table, totals, tl.float32, KIND.aligned) + e * 3 * width + first_column + columns
        shifts = tl.load(total, mask=there, other=0.0) / num_rows
        scales = tl.load(total + width, mask=there, other=0.0) / num_rows
        g = scale[None, :] * (g - shifts[None, :] - s * scales[None, :])
    tl.store(at, g.to(KIND.dtype), mask=mask)


@kernel()
def layer_norm_gradient(
    table, values, grads, layers, num_experts, num_rows, width, factor, eps,
    KIND: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Likewise behind a layer norm: first a pass for means."""
    width = whole(width, KIND)
    e, block, first, first_column, left_rows, left_columns = corner_of(num_experts, num_rows, 1, ROWS, 1)
    layer = layer_of(table, layers, e, factor, eps, LAYER)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    offsets = first * width + rows[:, None] * width + columns[None, :]
    values = operand(table, values + e, KIND) + offsets
    grads = operand(table, grads + e, KIND) + offsets
    of_rows = row_statistics(layer, first, rows, inside, LAYER, True, ROWS)
    means = tl.zeros((ROWS,), tl.float32)
    products = tl.zeros((ROWS,), tl.float32)
    for last_pass in tl.static_range(2):
        for k in range(0, width, COLUMNS):
            there = columns < width - k
            mask = inside[:, None] & there[None, :]
            z = tl.load(values + k, mask=mask, other=0.0).to(tl.float32)
            grad = tl.load(grads + k, mask=mask, other=0.0).to(tl.float32)
            start = tl.zeros((), tl.int64) + k
            g, s, _ = norm_gradient(grad, z, layer, first, start, k + columns, there, of_rows, LAYER, ROWS, COLUMNS)
            scale, shift = affine(layer, k + columns, there, LAYER, COLUMNS)
            g = tl.where(mask, g * scale[None, :], 0.0)
            if last_pass:
                g = of_rows[1][:, None] * (g - (means / width)[:, None] - s * (products / width)[:, None])
                tl.store(grads + k, g.to(KIND.dtype), mask=mask)
            else:
                means += tl.sum(g, 1)
                products += tl.sum(g * s, 1)
