# mypy: ignore-errors
"""Kernels of a level's backward pass that are products: gradients of inputs, and of weights and biases.

A sum that few programs would take long over is split among several; it is added in the same order every time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import (
    NONE,
    RELU,
    Constant,
    activation_gradient,
    activation_of,
    kernel,
    multiply,
    operand,
    parts_to_add,
    pointer,
    product,
    share_of,
    sum_of_parts,
    whole,
)
from mtlkernels.ops.level.triton.chain_kernels import GATE_COLUMNS, words_at

# The columns of which programs' parts are added at a time; no tile has fewer.
FEW_COLUMNS = Constant(32)


@triton.jit
def store_sums(
    parts, count, stride, out, last, left_columns, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Stores the sum of ``count`` parts [ROWS, COLUMNS], by the last program to arrive; ``out``: where its rows begin.

    A few columns at a time: all of them and where they are would be more than there are registers.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, FEW_COLUMNS)
    for at in range(0, COLUMNS, FEW_COLUMNS):
        value = sum_of_parts(parts, count, stride, rows[:, None] * COLUMNS + at + columns[None, :])
        mask = last[:, None] & (at + columns < left_columns)[None, :]
        tl.store(out[:, None] + at + columns[None, :], value.to(KIND.dtype), mask=mask)


@triton.jit
def add_gates(
    acc, table, entry, logits, first, first_column, a_inside, b_inside,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``acc + d W`` of the linear gates of an input; ``entry`` is theirs in what ``input_gradient`` calls ``gates``.

    As ``multiply``, but each row of W is found by its own address, and the rows of d go on with zeros.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    stride = whole(tl.load(entry + 2).to(tl.int32), KIND)
    grad = operand(entry, 0, KIND) + first * stride + rows[:, None] * stride + inner[None, :]
    addresses = table + tl.load(entry + 3) + inner
    for k in tl.range(0, logits, DEPTH, num_stages=1):  # hardly ever more than once
        a = tl.load(grad + k, mask=a_inside[:, None] & (inner < stride - k)[None, :], other=0.0)
        weight = tl.load(addresses + k, mask=inner < logits - k, other=0).to(tl.pointer_type(KIND.dtype))
        if KIND.aligned:
            weight = tl.multiple_of(weight, 16)
        weight = (weight + first_column)[:, None] + columns[None, :]
        b = tl.load(weight, mask=(inner < logits - k)[:, None] & b_inside[None, :], other=0.0)
        acc = product(acc, a, b, KIND)
    return acc


@kernel()
def input_gradient(
    table, grads, weights, members, outputs, kept, activated, gates, parts, counters, splits,
    num_groups, num_rows, width, depth,
    KIND: tl.constexpr, CODE: tl.constexpr, ACTIVATED: tl.constexpr, LINEAR_GATES: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``sum_e d_e W_e`` over the experts of each group, times the derivative of the activation below.

    ``members`` lists num_groups + 1 offsets, then the experts of all groups: for a network's inputs a group is the
    experts that read a stream, which lie side by side along the depth of one product; below other layers a group is one
    expert. ``kept`` is what the forward pass saved of the layer below, if that has an activation, of relu its signs;
    ``ACTIVATED`` writes its activation, for the gradient of the weights. ``SPLIT``: ``splits`` programs share a block,
    each with some of the group's experts, and the last one to arrive adds what the others have stored in ``parts``
    [block, split].
    ``LINEAR_GATES``: the linear gates of an input are one more member of its group. ``gates`` holds four entries a
    group: the address of the gradients of these gates' logits, how many logits they have, the length of the gradients'
    rows (which end with zeros), and where the addresses of the rows of their weights are, a row a logit.
    """
    width = whole(width, KIND)
    depth = whole(depth, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    if SPLIT:
        share = tile % splits
        tile = tile // splits
    block = tile // blocks
    group = block % num_groups
    first = (block // num_groups).to(tl.int64) * ROWS
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    a_inside = rows < left_rows
    b_inside = columns < left_columns
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    # Behind the experts, gates take registers that tiles of float32 do not have; before them, that large ones do not.
    LARGE: tl.constexpr = COLUMNS > 128
    if LINEAR_GATES:
        few: tl.constexpr = DEPTH if DEPTH < GATE_COLUMNS else GATE_COLUMNS
        entry = table + gates + 4 * group
        logits = tl.load(entry + 1).to(tl.int32)
        if SPLIT:
            logits = tl.where(share == 0, logits, 0)
        if not LARGE:
            acc = add_gates(
                acc, table, entry, logits, first, first_column, a_inside, b_inside, KIND, ROWS, COLUMNS, few
            )
    start = tl.load(table + members + group).to(tl.int32)
    end = tl.load(table + members + group + 1).to(tl.int32)
    if SPLIT:
        low, high = share_of(end - start, share, splits)
        end = start + high
        start += low
    # As one loop, the next expert's operands are copied while the last ones of one are multiplied. In smaller tiles
    # another program that is there at the same time does that, and some registers would be too many.
    FLAT: tl.constexpr = LARGE and CODE == NONE and not ACTIVATED
    for i in tl.range(start, end, flatten=FLAT):
        e = tl.load(table + members + num_groups + 1 + i)
        grad = operand(table, grads + e, KIND) + first * depth + rows[:, None] * depth + inner[None, :]
        weight = operand(table, weights + e, KIND) + first_column + inner[:, None] * width + columns[None, :]
        step = (tl.zeros((), tl.int64) + DEPTH) * width
        acc = multiply(acc, grad, weight, (DEPTH, step), a_inside, b_inside, 0, depth, KIND, DEPTH)
    if LINEAR_GATES and LARGE:
        acc = add_gates(acc, table, entry, logits, first, first_column, a_inside, b_inside, KIND, ROWS, COLUMNS, few)
    corner = first * width + first_column
    out = operand(table, outputs + group, KIND) + corner
    if SPLIT:
        tl.static_assert(CODE == NONE and not ACTIVATED)
        area: tl.constexpr = ROWS * COLUMNS
        shared = pointer(table, parts, tl.float32, True) + tile.to(tl.int64) * splits * area
        tl.store(shared + share * area + rows[:, None] * COLUMNS + columns[None, :], acc)
        count = parts_to_add(table + counters + tile, splits)
        last = a_inside & (rows < count * ROWS)
        store_sums(shared, count, area, out + rows * width, last, left_columns, KIND, ROWS, COLUMNS)
    else:
        mask = a_inside[:, None] & b_inside[None, :]
        offsets = rows[:, None] * width + columns[None, :]
        if CODE == RELU:
            at, words = words_at(table, kept + group, first, first_column, rows, width, COLUMNS)
            word = tl.load(at, mask=a_inside[:, None] & (words * 32 < left_columns)[None, :], other=0)
            bits = (word[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            acc = tl.where(tl.reshape(bits, [ROWS, COLUMNS]) != 0, acc, 0.0)
        elif CODE != NONE:
            saved = tl.load(operand(table, kept + group, KIND) + corner + offsets, mask=mask, other=0.0).to(tl.float32)
            acc = activation_gradient(acc, saved, CODE)
            if ACTIVATED:
                again = operand(table, activated + group, KIND) + corner
                tl.store(again + offsets, activation_of(saved, CODE).to(KIND.dtype), mask=mask)
        tl.store(out + offsets, acc.to(KIND.dtype), mask=mask)


@kernel()
def wide_input_gradient(
    table, grads, weights, members, outputs, gates, num_groups, num_rows, width, depth,
    KIND: tl.constexpr, LINEAR_GATES: tl.constexpr, PIECES: tl.constexpr, STARTS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``input_gradient`` of a network's inputs whose programs share the columns evenly, in one loop over all experts.

    A block's ``COLUMNS`` are no power of two, but columns of ``PIECES`` side by side, which begin at ``STARTS``.
    """
    width = whole(width, KIND)
    depth = whole(depth, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    block = tile // blocks
    group = block % num_groups
    first = (block // num_groups).to(tl.int64) * ROWS
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    inner = tl.arange(0, DEPTH)
    a_inside = rows < (num_rows - first).to(tl.int32)
    if LINEAR_GATES:  # what is known now is asked for now: behind the loop all would wait for it
        entry = table + gates + 4 * group
        logits = tl.load(entry + 1).to(tl.int32)
        stride = whole(tl.load(entry + 2).to(tl.int32), KIND)
        few = tl.arange(0, GATE_COLUMNS)
        addresses = table + tl.load(entry + 3) + few
        of_gates = operand(entry, 0, KIND) + first * stride + rows[:, None] * stride + few[None, :]
        address = tl.load(addresses, mask=few < logits, other=0)
        gate = tl.load(of_gates, mask=a_inside[:, None] & (few < stride)[None, :], other=0.0)
    sums = ()
    for i in tl.static_range(len(PIECES)):
        sums = sums + (tl.zeros((ROWS, PIECES[i]), tl.float32),)
    start = tl.load(table + members + group).to(tl.int32)
    end = tl.load(table + members + group + 1).to(tl.int32)
    for m in tl.range(start, end, flatten=True):
        e = tl.load(table + members + num_groups + 1 + m)
        grad = operand(table, grads + e, KIND) + first * depth + rows[:, None] * depth + inner[None, :]
        weight = operand(table, weights + e, KIND) + first_column + inner[:, None] * width
        for k in range(0, depth, DEPTH):
            there = inner < depth - k
            a = tl.load(grad, mask=a_inside[:, None] & there[None, :], other=0.0)
            added = ()
            for i in tl.static_range(len(PIECES)):
                columns = STARTS[i] + tl.arange(0, PIECES[i])
                b_inside = there[:, None] & (columns < left_columns)[None, :]
                b = tl.load(weight + columns[None, :], mask=b_inside, other=0.0)
                added = added + (product(sums[i], a, b, KIND),)
            sums = added
            grad += DEPTH
            weight += (tl.zeros((), tl.int64) + DEPTH) * width
    if LINEAR_GATES:
        for k in tl.range(0, logits, GATE_COLUMNS, num_stages=1):  # hardly ever more than once
            weight = address.to(tl.pointer_type(KIND.dtype))
            if KIND.aligned:
                weight = tl.multiple_of(weight, 16)
            added = ()
            for i in tl.static_range(len(PIECES)):
                columns = STARTS[i] + tl.arange(0, PIECES[i])
                b_inside = (few < logits - k)[:, None] & (columns < left_columns)[None, :]
                b = tl.load((weight + first_column)[:, None] + columns[None, :], mask=b_inside, other=0.0)
                added = added + (product(sums[i], gate, b, KIND),)
            sums = added
            left = logits - k - GATE_COLUMNS
            address = tl.load(addresses + k + GATE_COLUMNS, mask=few < left, other=0)
            inside = few < stride - k - GATE_COLUMNS
            gate = tl.load(of_gates + k + GATE_COLUMNS, mask=a_inside[:, None] & inside[None, :], other=0.0)
    out = operand(table, outputs + group, KIND) + first * width + first_column + rows * width
    for i in tl.static_range(len(PIECES)):
        columns = STARTS[i] + tl.arange(0, PIECES[i])
        inside = a_inside[:, None] & (columns < left_columns)[None, :]
        tl.store(out[:, None] + columns[None, :], sums[i].to(KIND.dtype), mask=inside)


@kernel()
def weight_gradient(
    table, layers, parts, counters, splits, num_layers, gates, num_rows,
    KIND: tl.constexpr, NEED_WEIGHTS: tl.constexpr, NEED_BIASES: tl.constexpr, LINEAR_GATES: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``d^T x`` and the column sums of d, of every layer of every expert, with the batch along the depth.

    ``layers`` holds eight entries a layer: its first block, its experts, its outputs, its inputs, and where the
    addresses of the experts' d [B, outputs], x [B, inputs], weight and bias gradients start. ``SPLIT``: ``splits``
    programs share a block, each with some of the batch, and the last one to arrive adds what the others have stored in
    ``parts`` [block, split]: a block of the weight's gradient, then a row of the bias's.
    ``LINEAR_GATES``: from number ``gates`` on a layer is the linear gates of a stream. Its gradients' addresses are one
    a row, null behind the last logit.
    """
    # The biases' gradients come with the product, from the first of the programs that share these rows; but float32
    # would be rounded for tensor cores, or added up by as many instructions as the product takes, and without alignment
    # a few registers would be too many on sm_100.
    TOGETHER: tl.constexpr = NEED_WEIGHTS and NEED_BIASES and KIND.dtype != tl.float32 and KIND.aligned
    tile = tl.program_id(0)
    begin = 0
    stop = num_rows
    if SPLIT:
        share = tile % splits
        tile = tile // splits
        counter = table + counters + tile
        size: tl.constexpr = ROWS * COLUMNS + ROWS
        parts = pointer(table, parts, tl.float32, True) + tile.to(tl.int64) * splits * size
        part = parts + share * size
        begin, stop = share_of(tl.cdiv(num_rows, DEPTH), share, splits)
        begin = begin * DEPTH
        stop = tl.minimum(stop * DEPTH, num_rows)
    layer = 0
    for i in range(1, num_layers):
        layer = tl.where(tile >= tl.load(table + layers + 8 * i), i, layer)
    entry = table + layers + 8 * layer
    tile = tile - tl.load(entry).to(tl.int32)
    members = tl.load(entry + 1).to(tl.int32)
    height = whole(tl.load(entry + 2).to(tl.int32), KIND)
    width = whole(tl.load(entry + 3).to(tl.int32), KIND)
    blocks = tl.cdiv(tl.maximum(width, 1), COLUMNS) if NEED_WEIGHTS else 1
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    tile = tile // blocks
    e = tile % members
    first = (tile // members).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    left_rows = (height - first).to(tl.int32)
    there = rows < left_rows
    if LINEAR_GATES:
        own = rows < tl.where(layer >= gates, left_rows, 0)  # rows with addresses of their own
    left_columns = (width - first_column).to(tl.int32)
    start = tl.zeros((), tl.int64) + begin
    grad = operand(table, tl.load(entry + 4) + e, KIND) + start * height + first
    if NEED_WEIGHTS:
        left = grad + inner[None, :] * height + rows[:, None]
        right = operand(table, tl.load(entry + 5) + e, KIND) + start * width + first_column
        right = right + inner[:, None] * width + columns[None, :]
        steps = ((tl.zeros((), tl.int64) + DEPTH) * height, (tl.zeros((), tl.int64) + DEPTH) * width)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        inside = columns < left_columns
        if TOGETHER:
            ones = tl.zeros((ROWS, 16), tl.float32)
            if first_column == 0:
                acc, ones = multiply(
                    acc, left, right, steps, there, inside, begin, stop, KIND, DEPTH, SUMS=True, sums=ones
                )
            else:
                acc = multiply(acc, left, right, steps, there, inside, begin, stop, KIND, DEPTH)
        else:
            acc = multiply(acc, left, right, steps, there, inside, begin, stop, KIND, DEPTH)
        out = operand(table, tl.load(entry + 6) + e, KIND) + first * width + first_column + rows * width
        stored = there
        if LINEAR_GATES:
            row = tl.load(table + tl.load(entry + 6) + first + rows, mask=own, other=0)
            out = tl.where(own, row.to(tl.pointer_type(KIND.dtype)) + first_column, out)
            if KIND.aligned:
                out = tl.multiple_of(out, 16)
            stored = tl.where(own, row != 0, there)
        if SPLIT:
            tl.store(part + rows[:, None] * COLUMNS + columns[None, :], acc)
        else:
            mask = stored[:, None] & inside[None, :]
            tl.store(out[:, None] + columns[None, :], acc.to(KIND.dtype), mask=mask)
    if NEED_BIASES:
        sums = operand(table, tl.load(entry + 7) + e, KIND) + first + rows
        wanted = there
        if LINEAR_GATES:
            row = tl.load(table + tl.load(entry + 7) + first + rows, mask=own, other=0)
            sums = tl.where(own, row.to(tl.pointer_type(KIND.dtype)), sums)
            wanted = tl.where(own, row != 0, there)
        if first_column == 0:
            if TOGETHER:
                total = tl.sum(ones * (1 / 16), 1)
            else:
                summed = grad + inner[:, None] * height + rows[None, :]
                step = (tl.zeros((), tl.int64) + DEPTH) * height
                total = tl.zeros((DEPTH, ROWS), tl.float32)
                for k in range(begin, stop, DEPTH):
                    mask_k = (inner < num_rows - k)[:, None] & there[None, :]
                    total += tl.load(summed, mask=mask_k, other=0.0).to(tl.float32)
                    summed += step
                total = tl.sum(total, 0)
            if SPLIT:
                tl.store(part + ROWS * COLUMNS + rows, total)
            else:
                tl.store(sums, total.to(KIND.dtype), mask=wanted)
    if SPLIT:
        count = parts_to_add(counter, splits)
        if NEED_WEIGHTS:
            last = stored & (rows < count * ROWS)
            store_sums(parts, count, size, out, last, left_columns, KIND, ROWS, COLUMNS)
        if NEED_BIASES:
            count = tl.where(first_column == 0, count, 0)
            value = sum_of_parts(parts + ROWS * COLUMNS, count, size, rows)
            tl.store(sums, value.to(KIND.dtype), mask=wanted & (rows < count * ROWS))
