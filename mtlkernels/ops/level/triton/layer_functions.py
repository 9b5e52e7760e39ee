# mypy: ignore-errors
"""Functions that the normalized mixture's Triton kernels call: norms, dropout, and their gradients in a block.

What is known of a layer's norm is a run of entries in the table: for each expert the addresses of its means, then of
all variances, scales, shifts and the activation's slopes, of which the last three may be null, and how far a slope is
from the next: 0 where all channels share one. For Dice the addresses of four numbers a row follow: means, factors, and
the two shares of the gradient that these take out; see triton_dice.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import activate, activation_gradient, pointer


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
def of_rows(table, norm, which, e, num_experts, first, rows, inside):
    """One of the numbers that Dice has of each row."""
    at = pointer(table, norm + which * num_experts + e, tl.float32, False)
    return tl.load(at + first + rows, mask=inside, other=0.0)


@triton.jit
def dice_statistics(
    table, norm, e, num_experts, first, rows, inside, CODE: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr
):
    """Mean and factor of each row and, with ``SHARES``, those of its gradient; of Dice, otherwise unused zeros."""
    mean = tl.zeros((ROWS,), tl.float32)
    factor = mean
    level = mean
    along = mean
    if CODE == 8:
        mean = of_rows(table, norm, 6, e, num_experts, first, rows, inside)
        factor = of_rows(table, norm, 7, e, num_experts, first, rows, inside)
        if SHARES:
            level = of_rows(table, norm, 8, e, num_experts, first, rows, inside)
            along = of_rows(table, norm, 9, e, num_experts, first, rows, inside)
    return mean, factor, level, along


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
    z, table, norm, e, num_experts, columns, inside, of_norm, eps, NORM: tl.constexpr, COLUMNS: tl.constexpr
):
    """``(z - mean) / deviation`` of a block; ``of_norm`` is what :func:`row_statistics` gives."""
    if NORM == 1:
        mean = tl.load(pointer(table, norm + e, tl.float32, False) + columns, mask=inside, other=0.0)
        at = pointer(table, norm + num_experts + e, tl.float32, False) + columns
        rstd = 1.0 / tl.sqrt_rn(tl.load(at, mask=inside, other=0.0) + eps)
        z = (z - mean[None, :]) * rstd[None, :]
    if NORM == 2:
        z = (z - of_norm[0][:, None]) * of_norm[1][:, None]
    return z


@triton.jit
def normalized(
    z,
    table,
    norm,
    e,
    num_experts,
    columns,
    inside,
    of_norm,
    eps,
    SCALES: tl.constexpr,
    NORM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The standardized pre-activation of a block, and what scale and shift make of it: the activation's input."""
    s = z
    if NORM:
        s = standardized(z, table, norm, e, num_experts, columns, inside, of_norm, eps, NORM, COLUMNS)
        scale, shift = affine(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)
        z = s * scale[None, :] + shift[None, :]
    return s, z


@triton.jit
def slopes_of(table, norm, e, num_experts, columns, inside, SCALES: tl.constexpr, COLUMNS: tl.constexpr):
    """The activation's slope of each column: 1 where there are none."""
    slope = tl.full((COLUMNS,), 1.0, tl.float32)
    address = tl.load(table + norm + 4 * num_experts + e)
    if address != 0:
        at = address.to(tl.pointer_type(SCALES)) + columns * tl.load(table + norm + 5 * num_experts + e)
        slope = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return slope


@triton.jit
def dice_gate(x, inside, of_dice):
    """Dice's ``u = (x - mean) * factor``, which is between -1 and 1, and its gate ``p``, the sigmoid of that."""
    u = tl.where(inside[None, :], (x - of_dice[0][:, None]) * of_dice[1][:, None], 0.0)
    return u, 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def dice_gradient(grad, x, slope, inside, of_dice):
    """Dice's ``u`` and ``p``; from the gradient of its output those of its slope at each value, and of ``u``."""
    u, p = dice_gate(x, inside, of_dice)
    slopes = grad * x * (1.0 - p)
    return u, p, slopes, (slopes - slopes * slope) * p


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
    of_norm,
    of_dice,
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
    _, z = normalized(z, table, norm, e, num_experts, columns, inside, of_norm, eps, SCALES, NORM, COLUMNS)
    if CODE == 7:  # prelu
        slope = slopes_of(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)[None, :]
        z = tl.where(z > 0.0, z, slope * z)
    elif CODE == 8:  # dice
        slope = slopes_of(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)[None, :]
        _, p = dice_gate(z, inside, of_dice)
        z = z * (p + (1.0 - p) * slope)
    else:
        z = activate(z, CODE)
    if DROPS:
        mask = kept(table, seed, layer, e, first, first_column, threshold, ROWS, COLUMNS)
        z = z * tl.where(mask, factor, 0.0)
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
    of_norm,
    of_dice,
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
    """From the gradient of a layer's output that of the activation's input; the standardized pre-activation.

    And the gradient of the activation's slope at each value, if it has one.
    """
    s, z = normalized(z, table, norm, e, num_experts, columns, inside, of_norm, eps, SCALES, NORM, COLUMNS)
    if DROPS:
        mask = kept(table, seed, layer, e, first, first_column, threshold, ROWS, COLUMNS)
        grad = grad * tl.where(mask, factor, 0.0)
    slopes = grad
    if CODE == 7:
        slope = slopes_of(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)[None, :]
        slopes = tl.where(z > 0.0, 0.0, z * grad)
        grad = tl.where(z > 0.0, grad, slope * grad)
    elif CODE == 8:
        slope = slopes_of(table, norm, e, num_experts, columns, inside, SCALES, COLUMNS)[None, :]
        u, p, slopes, w = dice_gradient(grad, z, slope, inside, of_dice)
        through = of_dice[1][:, None] * (w - of_dice[2][:, None] - u * of_dice[3][:, None])
        grad = grad * (p + (1.0 - p) * slope) + through
    elif CODE:
        grad = activation_gradient(grad, z if FROM_INPUT else activate(z, CODE), CODE)
    return grad, s, slopes
