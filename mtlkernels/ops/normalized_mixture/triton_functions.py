# mypy: ignore-errors
"""Functions that the normalized mixture's Triton kernels call: norms, dropout, and their gradients in a block.

What is known of a layer's norm is a run of entries in the table: for each expert the addresses of its means, then of
all variances, scales and shifts; the last two may be null.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import activate, derivative, pointer


@triton.jit
def row_statistics(table, norm, e, num_experts, first, rows, inside, eps, NORM: tl.constexpr, ROWS: tl.constexpr):
    """Mean and reciprocal deviation of each row; those of a layer norm, otherwise unused zeros."""
    mean = tl.zeros((ROWS,), tl.float32)
    rstd = mean
    if NORM == 2:
        mean = tl.load(pointer(table, norm + e, tl.float32, False) + first + rows, mask=inside, other=0.0)
        at = pointer(table, norm + num_experts + e, tl.float32, False) + first + rows
        rstd = 1.0 / tl.sqrt_rn(tl.load(at, mask=inside, other=0.0) + eps)
    return mean, rstd


@triton.jit
def affine(table, norm, e, num_experts, columns, inside, SCALES: tl.constexpr, COLUMNS: tl.constexpr):
    """Scale and shift of each column: 1 and 0 where there are none."""
    scale = tl.full((COLUMNS,), 1.0, tl.float32)
    shift = tl.zeros((COLUMNS,), tl.float32)
    address = tl.load(table + norm + 2 * num_experts + e)
    if address != 0:
        scale = tl.load(address.to(tl.pointer_type(SCALES)) + columns, mask=inside, other=0.0).to(tl.float32)
    address = tl.load(table + norm + 3 * num_experts + e)
    if address != 0:
        shift = tl.load(address.to(tl.pointer_type(SCALES)) + columns, mask=inside, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def standardized(
    z, table, norm, e, num_experts, columns, inside, row_mean, row_rstd, eps, NORM: tl.constexpr, COLUMNS: tl.constexpr
):
    """``(z - mean) / deviation`` of a block."""
    if NORM == 1:
        mean = tl.load(pointer(table, norm + e, tl.float32, False) + columns, mask=inside, other=0.0)
        at = pointer(table, norm + num_experts + e, tl.float32, False) + columns
        rstd = 1.0 / tl.sqrt_rn(tl.load(at, mask=inside, other=0.0) + eps)
        z = (z - mean[None, :]) * rstd[None, :]
    if NORM == 2:
        z = (z - row_mean[:, None]) * row_rstd[:, None]
    return z


@triton.jit
def kept(table, seed, layer, e, first, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which values of a block of a layer's output dropout keeps, see mtlkernels.ops._random.

    ``first_column`` is a multiple of four, so that the four words of a counter are four columns of the block.
    """
    key = tl.load(pointer(table, seed, tl.int64, False))
    quads: tl.constexpr = COLUMNS // 4
    zero = tl.zeros((ROWS, quads), tl.int32)
    column = zero + (first_column // 4).to(tl.int32) + tl.arange(0, quads)[None, :]
    row = zero + first.to(tl.int32) + tl.arange(0, ROWS)[:, None]
    a, b, c, d = tl.philox(key, column, row, zero + e.to(tl.int32), zero + layer, 10)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
    return words.to(tl.int64) >= threshold


@triton.jit
def hidden(
    z,
    table,
    norm,
    seed,
    layer,
    e,
    num_experts,
    first,
    first_column,
    columns,
    inside,
    row_mean,
    row_rstd,
    eps,
    threshold,
    factor,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    CODE: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``dropout(activation(norm(z)))`` of a block, float32."""
    if NORM:
        z = standardized(z, table, norm, e, num_experts, columns, inside, row_mean, row_rstd, eps, NORM, COLUMNS)
        scale, shift = affine(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)
        z = z * scale[None, :] + shift[None, :]
    z = activate(z, CODE)
    if DROPS:
        mask = kept(table, seed, layer, e, first, first_column, threshold, ROWS, COLUMNS)
        z = tl.where(mask, z * factor, 0.0)
    return z


@triton.jit
def norm_gradient(
    grad,
    z,
    table,
    norm,
    seed,
    layer,
    e,
    num_experts,
    first,
    first_column,
    columns,
    inside,
    row_mean,
    row_rstd,
    eps,
    threshold,
    factor,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    CODE: tl.constexpr,
    FROM_INPUT: tl.constexpr,
    DROPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """From the gradient of a layer's output, that of the activation's input, and the standardized pre-activation."""
    s = z
    if NORM:
        s = standardized(z, table, norm, e, num_experts, columns, inside, row_mean, row_rstd, eps, NORM, COLUMNS)
        scale, shift = affine(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)
        z = s * scale[None, :] + shift[None, :]
    if CODE:
        grad = grad * derivative(z if FROM_INPUT else activate(z, CODE), CODE)
    if DROPS:
        mask = kept(table, seed, layer, e, first, first_column, threshold, ROWS, COLUMNS)
        grad = tl.where(mask, grad * factor, 0.0)
    return grad, s
