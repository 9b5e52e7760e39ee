# mypy: ignore-errors
"""Kernels of SNR-Aver. Memory-bound: what several outputs read of a tensor comes from memory once, then from cache."""

from __future__ import annotations

import triton.language as tl

from mtlkernels.ops._triton_functions import kernel, operand, whole


@kernel(tensors=3)
def average_sum(
    table, z, lists, members, inputs, outputs, num_inputs, num_outputs, num_rows, width, input_stride, output_stride,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``sum z u`` over the open routes to each output, all outputs of a block of rows and columns a program.

    Route number output * output_stride + input * input_stride has its z there. The lists of this direction are in
    ``lists`` from ``members`` on, as ``open_routes`` of SNR-Trans writes them.
    """
    width = whole(width, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    first = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rows < num_rows - first)[:, None] & (columns < width)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    for output in range(num_outputs):
        found = lists + members + output * (num_inputs + 1)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for n in range(tl.load(found)):
            member = tl.load(found + 1 + n)
            x = operand(table, inputs + member, KIND) + first * width
            value = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
            acc += tl.load(z + output * output_stride + member * input_stride) * value
        out = operand(table, outputs + output, KIND) + first * width
        tl.store(out + offsets, acc.to(KIND.dtype), mask=mask)


@kernel(tensors=3)
def route_dots(
    table, z, inner_products, grads, inputs, num_outputs, num_inputs, num_rows, width, programs,
    KIND: tl.constexpr, CLOSED_GRAD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``<dv_i, u_j>`` of every route over a block of rows, to ``inner_products`` [routes, programs].

    Zero for a closed route, unless ``CLOSED_GRAD``.
    """
    width = whole(width, KIND)
    first = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    offsets = rows[:, None] * width + tl.arange(0, COLUMNS)[None, :]
    inner_products += tl.program_id(0)
    for route in range(num_outputs * num_inputs):
        grad = operand(table, grads + route // num_inputs, KIND) + first * width + offsets
        x = operand(table, inputs + route % num_inputs, KIND) + first * width + offsets
        end = width
        if not CLOSED_GRAD:
            end = tl.where(tl.load(z + route) != 0.0, width, 0)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for column in range(0, end, COLUMNS):
            left = (column + tl.arange(0, COLUMNS) < width)[None, :]
            mask = (rows < num_rows - first)[:, None] & left
            dv = tl.load(grad + column, mask=mask, other=0.0).to(tl.float32)
            acc += dv * tl.load(x + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(inner_products, tl.sum(tl.sum(acc, 1), 0))
        inner_products += programs
