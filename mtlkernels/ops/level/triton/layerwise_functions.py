# mypy: ignore-errors
"""Functions that a layerwise level's Triton kernels call: norms, slopes, dropout, and their gradients in a block.

What is known of a layer of an expert is a run of ENTRIES in the table. First the addresses of its means, variances,
scales, shifts and the activation's slopes, of which the last three may be null, and how far a slope is from the next:
0 where all channels share one. Then, for Dice, the addresses of four numbers a row: means, factors, and the two shares
of the gradient that these take out, see dice_kernels.py. Then, for dropout, the address of the seed, the numbers of the
expert and of the layer, and the threshold.

``layer`` is that run as ``layer_of`` reads it, the seed itself instead of its address, then the factor of what dropout
keeps, and the norm's eps; ``LAYER`` are the :class:`mtlkernels.ops.level.triton.layers.Settings`. ``of_rows`` are six
numbers a row: mean and reciprocal deviation for a layer norm, then Dice's four; where there is no such norm, or no
Dice, they are zeros that nobody uses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import Constant, activate, activation_gradient, pointer, saved_of
from mtlkernels.ops.activations import CODES
from mtlkernels.ops.level import spec

NO_NORM = Constant(spec.NO_NORM)
BATCH_NORM = Constant(spec.BATCH_NORM)
LAYER_NORM = Constant(spec.LAYER_NORM)
PRELU = Constant(CODES["prelu"])
DICE = Constant(CODES["dice"])
ENTRIES = Constant(14)
# Places in ``layer``.
MEANS, VARIANCES, SCALES, SHIFTS, SLOPES, SLOPE_STEP = map(Constant, range(6))
CENTERS, FACTORS, LEVELS, ALONG = map(Constant, range(6, 10))
SEED, EXPERT, NUMBER, THRESHOLD, KEPT, EPS = map(Constant, range(10, 16))


@triton.jit
def layer_of(table, layers, e, factor, eps, LAYER: tl.constexpr):
    """``layer`` of expert e, read once, since a loop would read it anew in each step; what is not used is left out."""
    run = table + layers + ENTRIES * e
    seed = tl.load(pointer(run, 10, tl.int64)) if LAYER.drops else 0
    return (
        tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3), tl.load(run + 4), tl.load(run + 5),
        tl.load(run + 6), tl.load(run + 7), tl.load(run + 8), tl.load(run + 9),
        seed, tl.load(run + 11).to(tl.int32), tl.load(run + 12).to(tl.int32), tl.load(run + 13), factor, eps,
    )  # fmt: skip


@triton.jit
def numbers(layer, WHICH: tl.constexpr):
    """Where one of the numbers is that are known of each row, or of each column."""
    return layer[WHICH].to(tl.pointer_type(tl.float32))


@triton.jit
def load_rows(layer, WHICH: tl.constexpr, first, rows, inside):
    return tl.load(numbers(layer, WHICH) + first + rows, mask=inside, other=0.0)


@triton.jit
def row_statistics(layer, first, rows, inside, LAYER: tl.constexpr, SHARES: tl.constexpr, ROWS: tl.constexpr):
    """``of_rows``; those of Dice's gradient with ``SHARES``."""
    mean = tl.zeros((ROWS,), tl.float32)
    rstd, center, factor, level, along = mean, mean, mean, mean, mean
    if LAYER.norm == LAYER_NORM:
        mean = load_rows(layer, MEANS, first, rows, inside)
        rstd = 1.0 / tl.sqrt_rn(load_rows(layer, VARIANCES, first, rows, inside) + layer[EPS])
    if LAYER.activation == DICE:
        center = load_rows(layer, CENTERS, first, rows, inside)
        factor = load_rows(layer, FACTORS, first, rows, inside)
        if SHARES:
            level = load_rows(layer, LEVELS, first, rows, inside)
            along = load_rows(layer, ALONG, first, rows, inside)
    return mean, rstd, center, factor, level, along


@triton.jit
def affine(layer, columns, inside, LAYER: tl.constexpr, COLUMNS: tl.constexpr):
    """Scale and shift of each column: 1 and 0 where there are none."""
    scale = tl.full((COLUMNS,), 1.0, tl.float32)
    shift = tl.zeros((COLUMNS,), tl.float32)
    if layer[SCALES] != 0:
        at = layer[SCALES].to(tl.pointer_type(LAYER.scales)) + columns
        scale = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if layer[SHIFTS] != 0:
        at = layer[SHIFTS].to(tl.pointer_type(LAYER.scales)) + columns
        shift = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return scale, shift


@triton.jit
def normalized(z, layer, columns, inside, of_rows, LAYER: tl.constexpr, COLUMNS: tl.constexpr):
    """The standardized pre-activation of a block, and what scale and shift make of it: the activation's input."""
    s = z
    if LAYER.norm != NO_NORM:
        if LAYER.norm == BATCH_NORM:
            mean = load_rows(layer, MEANS, 0, columns, inside)
            rstd = 1.0 / tl.sqrt_rn(load_rows(layer, VARIANCES, 0, columns, inside) + layer[EPS])
            s = (z - mean[None, :]) * rstd[None, :]
        else:
            s = (z - of_rows[0][:, None]) * of_rows[1][:, None]
        scale, shift = affine(layer, columns, inside, LAYER, COLUMNS)
        z = s * scale[None, :] + shift[None, :]
    return s, z


@triton.jit
def slopes_of(layer, columns, inside, LAYER: tl.constexpr, COLUMNS: tl.constexpr):
    """The activation's slope of each column, as a row: 1 where there are none."""
    slope = tl.full((COLUMNS,), 1.0, tl.float32)
    if layer[SLOPES] != 0:
        at = layer[SLOPES].to(tl.pointer_type(LAYER.scales)) + columns * layer[SLOPE_STEP]
        slope = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    return slope[None, :]


@triton.jit
def dice_gate(x, inside, of_rows):
    """Dice's ``u = (x - mean) * factor``, which is between -1 and 1, and its gate ``p``, the sigmoid of that."""
    u = tl.where(inside[None, :], (x - of_rows[2][:, None]) * of_rows[3][:, None], 0.0)
    return u, 1.0 / (1.0 + tl.exp(-u))


@triton.jit
def dice_gradient(grad, x, slope, inside, of_rows):
    """Dice's ``u`` and ``p``; from the gradient of its output those of its slope at each value, and of ``u``."""
    u, p = dice_gate(x, inside, of_rows)
    slopes = grad * x * (1.0 - p)
    return u, p, slopes, (slopes - slopes * slope) * p


@triton.jit
def dropped(x, layer, first, first_column, LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a layer's output, or its gradient, behind dropout, see mtlkernels.ops._random.

    ``first_column`` is a multiple of four, so that the four words of a counter are four columns of the block.
    """
    if LAYER.drops:
        quads: tl.constexpr = COLUMNS // 4
        zero = tl.zeros((ROWS, quads), tl.int32)
        column = zero + (first_column // 4).to(tl.int32) + tl.arange(0, quads)[None, :]
        row = zero + first.to(tl.int32) + tl.arange(0, ROWS)[:, None]
        a, b, c, d = tl.philox(layer[SEED], column, row, zero + layer[EXPERT], zero + layer[NUMBER], 10)
        words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (ROWS, COLUMNS))
        x = x * tl.where(words.to(tl.int64) >= layer[THRESHOLD], layer[KEPT], 0.0)
    return x


@triton.jit
def hidden(
    z, layer, first, first_column, columns, inside, of_rows,
    LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dropout(activation(norm(z)))`` of a block, float32."""
    _, z = normalized(z, layer, columns, inside, of_rows, LAYER, COLUMNS)
    if LAYER.activation == PRELU:
        z = tl.where(z > 0.0, z, slopes_of(layer, columns, inside, LAYER, COLUMNS) * z)
    elif LAYER.activation == DICE:
        slope = slopes_of(layer, columns, inside, LAYER, COLUMNS)
        _, p = dice_gate(z, inside, of_rows)
        z = z * (p + (1.0 - p) * slope)
    else:
        z = activate(z, LAYER.activation)
    return dropped(z, layer, first, first_column, LAYER, ROWS, COLUMNS)


@triton.jit
def read_hidden(z, k, inside, state, LAYER: tl.constexpr, DEPTH: tl.constexpr):
    """The same on its way into ``multiply``; ``state`` is the layer, the first row, and ``of_rows``."""
    layer, first, of_rows = state
    first_column = tl.zeros((), tl.int64) + k
    columns = k + tl.arange(0, DEPTH)
    value = hidden(z.to(tl.float32), layer, first, first_column, columns, inside, of_rows, LAYER, z.shape[0], DEPTH)
    return tl.where(inside[None, :], value, 0.0).to(z.dtype)


@triton.jit
def norm_gradient(
    grad, z, layer, first, first_column, columns, inside, of_rows,
    LAYER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """From the gradient of a layer's output that of the activation's input; the standardized pre-activation.

    And the gradient of the activation's slope at each value, if it has one.
    """
    s, z = normalized(z, layer, columns, inside, of_rows, LAYER, COLUMNS)
    grad = dropped(grad, layer, first, first_column, LAYER, ROWS, COLUMNS)
    slopes = grad
    if LAYER.activation == PRELU:
        slope = slopes_of(layer, columns, inside, LAYER, COLUMNS)
        slopes = tl.where(z > 0.0, 0.0, z * grad)
        grad = tl.where(z > 0.0, grad, slope * grad)
    elif LAYER.activation == DICE:
        slope = slopes_of(layer, columns, inside, LAYER, COLUMNS)
        u, p, slopes, w = dice_gradient(grad, z, slope, inside, of_rows)
        through = of_rows[3][:, None] * (w - of_rows[4][:, None] - u * of_rows[5][:, None])
        grad = grad * (p + (1.0 - p) * slope) + through
    else:
        grad = activation_gradient(grad, saved_of(z, LAYER.activation), LAYER.activation)
    return grad, s, slopes
