# mypy: ignore-errors
"""Kernels of SNR-Trans: products over the open routes alone, which the device finds by itself.

``inputs``, ``outputs`` and ``grads`` are places in the table of addresses and, after these, widths; tensors may differ
in width, rows are contiguous. Programs are numbered for the widest: those beyond a tensor's edge do nothing.
Offsets to a program's first row or column are 64-bit; offsets within its block are not.
"""

from __future__ import annotations

import triton.language as tl

from mtlkernels.ops._triton_functions import kernel, multiply, operand, whole


@kernel(tensors=2)
def open_routes(
    z, lists, num_outputs, num_inputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """For each output how many routes to it are open, and from where; then for each input how many, and to where.

    z is [num_outputs, num_inputs]. A list has a place for its length and for every route that there could be.
    """
    program = tl.program_id(0)
    to_output = program < num_outputs
    own = tl.where(to_output, program, program - num_outputs)
    size = tl.where(to_output, num_inputs, num_outputs)
    others = tl.arange(0, COLUMNS)
    at = tl.where(to_output, own * num_inputs + others, others * num_inputs + own)
    is_open = tl.load(z + at, mask=others < size, other=0.0) != 0.0
    place = tl.cumsum(is_open.to(tl.int32), 0)
    start = tl.where(to_output, own * (size + 1), num_outputs * (num_inputs + 1) + own * (size + 1))
    tl.store(lists + start, tl.sum(is_open.to(tl.int32), 0))
    tl.store(lists + start + place, others, mask=is_open)


@kernel(tensors=3)
def route_sum(
    table, z, lists, members, inputs, outputs, weights, num_inputs, num_outputs, num_rows, blocks,
    input_stride, output_stride,
    KIND: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``sum z W u`` over the open routes to each output; with ``TRANSPOSED``, the gradient of u, from those of outputs.

    The lists of this direction are in ``lists`` from ``members`` on, see ``open_routes``. Route number
    output * output_stride + input * input_stride has its z and its weight there. z scales a product in
    registers: neither a scaled weight nor a product is stored. ``blocks`` is the number of the widest output's.
    """
    block = tl.program_id(0) // blocks
    output = block % num_outputs
    first = (block // num_outputs).to(tl.int64) * ROWS
    first_column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS
    width = whole(tl.load(table + outputs + num_outputs + output).to(tl.int32), KIND)
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    members = lists + members + output * (num_inputs + 1)
    count = tl.where(left_columns > 0, tl.load(members), 0)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for n in range(count):
        member = tl.load(members + 1 + n)
        number = output * output_stride + member * input_stride
        depth = whole(tl.load(table + inputs + num_inputs + member).to(tl.int32), KIND)
        x = operand(table, inputs + member, KIND) + first * depth
        x = x + rows[:, None] * depth + inner[None, :]
        weight = operand(table, weights + number, KIND)
        if TRANSPOSED:
            weight = weight + first_column + inner[:, None] * width + columns[None, :]
            step = (tl.zeros((), tl.int64) + DEPTH) * width
        else:
            weight = weight + first_column * depth + columns[None, :] * depth + inner[:, None]
            step = tl.zeros((), tl.int64) + DEPTH
        part = tl.zeros((ROWS, COLUMNS), tl.float32)
        part = multiply(part, x, weight, (DEPTH, step), rows < left_rows, columns < left_columns, 0, depth, KIND, DEPTH)
        acc += tl.load(z + number) * part
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    out = operand(table, outputs + output, KIND) + first * width + first_column
    tl.store(out + rows[:, None] * width + columns[None, :], acc.to(KIND.dtype), mask=mask)


@kernel(tensors=3)
def route_products(
    table, z, inner_products, grads, inputs, weights, outputs,
    num_outputs, num_inputs, num_rows, row_blocks, column_blocks,
    KIND: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_Z: tl.constexpr, CLOSED_GRAD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``M = dv_i^T u_j`` of every route, with the batch along the depth: z M is dW, and <M, W> is dz.

    ``inner_products`` [routes, blocks] receives each block's part of dz. M of a closed route is computed only for its
    dz, and only with ``CLOSED_GRAD``; its dW is zero.
    """
    column = tl.program_id(0) % column_blocks
    row = tl.program_id(0) // column_blocks % row_blocks
    route = tl.program_id(0) // column_blocks // row_blocks
    output = route // num_inputs
    member = route % num_inputs
    first = row.to(tl.int64) * ROWS
    first_column = column.to(tl.int64) * COLUMNS
    height = whole(tl.load(table + grads + num_outputs + output).to(tl.int32), KIND)
    width = whole(tl.load(table + inputs + num_inputs + member).to(tl.int32), KIND)
    left_rows = (height - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    scale = tl.load(z + route)
    end = tl.where((left_rows > 0) & (left_columns > 0), num_rows, 0)
    if not (NEED_Z and CLOSED_GRAD):
        end = tl.where(scale != 0.0, end, 0)
    left = operand(table, grads + output, KIND) + first + inner[None, :] * height + rows[:, None]
    right = operand(table, inputs + member, KIND) + first_column + inner[:, None] * width + columns[None, :]
    steps = ((tl.zeros((), tl.int64) + DEPTH) * height, (tl.zeros((), tl.int64) + DEPTH) * width)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(acc, left, right, steps, rows < left_rows, columns < left_columns, 0, end, KIND, DEPTH)
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    if NEED_Z:
        # What the weight of a route that is not evaluated holds must not be looked at.
        there = (rows < tl.where(end > 0, left_rows, 0))[:, None] & (columns < left_columns)[None, :]
        weight = tl.load(operand(table, weights + route, KIND) + corner + offsets, mask=there, other=0.0)
        total = tl.sum(tl.sum(acc * weight.to(tl.float32), 1), 0)
        tl.store(inner_products + tl.program_id(0), total)
    if NEED_WEIGHTS:
        grad = tl.where(scale != 0.0, scale * acc, 0.0)
        tl.store(operand(table, outputs + route, KIND) + corner + offsets, grad.to(KIND.dtype), mask=mask)
