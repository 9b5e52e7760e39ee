# mypy: ignore-errors
"""Kernels of a chain's forward pass: grouped products over the experts, and what follows each of them.

Block rows are numbered outermost, then experts, then block columns: the programs at work at a time share a few blocks
of rows and all weights, so that the rows come from memory once and the weights from the L2 cache.
Offsets to a program's first row or column are 64-bit; offsets within its block are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import (
    FEW_MEMBERS,
    LEAKY_RELU,
    Constant,
    activate,
    gate_logits,
    kernel,
    multiply,
    operand,
    parts_to_add,
    pointer,
    probability,
    product,
    saved_of,
    share_of,
    softmax_statistics,
    some_logits,
    sum_of_parts,
    whole,
)

# How many logits of the gates that read a stream a program computes: few, as there are few, beside many experts.
GATE_COLUMNS = Constant(32)
# What a layer may keep beside its outputs: its activation's inputs, or which outputs are not <= 0.
INPUTS = Constant("inputs")
SIGNS = Constant("signs")
# With so many gates at most, the last layer's kernel is one loop over all experts.
FLAT_GATES = Constant(3)


@triton.jit
def add_bias(acc, address, first_column, inside, KIND: tl.constexpr, COLUMNS: tl.constexpr):
    """``acc + b`` of a block of columns; the address of b may be null."""
    if address != 0:
        bias = address.to(tl.pointer_type(KIND.dtype)) + first_column + tl.arange(0, COLUMNS)
        acc += tl.load(bias, mask=inside, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def linear(
    table, inputs, weights, first, first_column, left_rows, left_columns, depth,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """``x W^T`` of a block, float32; the places in the table are those of one expert."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    inside = columns < left_columns
    x = operand(table, inputs, KIND) + first * depth + rows[:, None] * depth + inner[None, :]
    weight = operand(table, weights, KIND) + first_column * depth + columns[None, :] * depth + inner[:, None]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    return multiply(acc, x, weight, None, rows < left_rows, inside, 0, depth, KIND, DEPTH)


@triton.jit
def words_at(table, index, first, first_column, rows, width, COLUMNS: tl.constexpr):
    """Pointers to a block's words of signs [B, ceil(width / 32)], and which of its words each is."""
    length = tl.cdiv(width, 32)
    words = tl.arange(0, COLUMNS // 32)
    corner = pointer(table, index, tl.int32) + first * length + first_column // 32
    return corner + rows[:, None] * length + words[None, :], words


@triton.jit
def expert_layer(
    table, inputs, weights, biases, outputs, kept, e, block, first, left_rows, width, depth,
    KIND: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of columns of one expert's layer; ``first`` is its first row."""
    first_column = block.to(tl.int64) * COLUMNS
    left_columns = (width - first_column).to(tl.int32)
    acc = linear(
        table, inputs + e, weights + e, first, first_column, left_rows, left_columns, depth,
        KIND, ROWS, COLUMNS, DEPTH,
    )  # fmt: skip
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    acc = add_bias(acc, tl.load(table + biases + e), first_column, columns < left_columns, KIND, COLUMNS)
    mask = (rows < left_rows)[:, None] & (columns < left_columns)[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    if KEEP == INPUTS:
        tl.store(operand(table, kept + e, KIND) + corner + offsets, acc.to(KIND.dtype), mask=mask)
    out = activate(acc, CODE).to(KIND.dtype)
    if KEEP == SIGNS:
        bits = tl.where(out.to(tl.float32) <= 0.0, 0, 1 << (columns % 32)[None, :])  # NaN counts as more
        bits = tl.sum(tl.reshape(bits, [ROWS, COLUMNS // 32, 32]), 2)
        at, words = words_at(table, kept + e, first, first_column, rows, width, COLUMNS)
        tl.store(at, bits, mask=(rows < left_rows)[:, None] & (words * 32 < left_columns)[None, :])
    tl.store(operand(table, outputs + e, KIND) + corner + offsets, out, mask=mask)


@triton.jit
def gate_layer(
    table, gates, num_tiles, tile, first, left_rows, depth,
    KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Some of the logits of the linear gates that read a stream, whatever gates they belong to.

    ``gates`` holds the address of the logits, the length W of their rows, three entries a tile (the address of its
    stream, its first column, and how many it has), W addresses of rows of weights, and W of biases, which may be null.
    """
    entry = table + gates + 2 + 3 * tile
    first_column = tl.load(entry + 1).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    inside = columns < tl.load(entry + 2).to(tl.int32)
    at = table + gates + 2 + 3 * num_tiles + first_column + columns
    weight = tl.load(at, mask=inside, other=0).to(tl.pointer_type(KIND.dtype))
    if KIND.aligned:
        weight = tl.multiple_of(weight, 16)
    weight = weight[None, :] + inner[:, None]
    x = operand(entry, 0, KIND) + first * depth + rows[:, None] * depth + inner[None, :]
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(acc, x, weight, None, rows < left_rows, inside, 0, depth, KIND, DEPTH)
    width = tl.load(table + gates + 1).to(tl.int32)
    bias = tl.load(at + width, mask=inside, other=0)
    acc += tl.load(bias.to(tl.pointer_type(KIND.dtype)), mask=bias != 0, other=0.0).to(tl.float32)[None, :]
    out = pointer(table, gates, KIND.dtype) + first * width + first_column
    mask = (rows < left_rows)[:, None] & inside[None, :]
    tl.store(out + rows[:, None] * width + columns[None, :], acc.to(KIND.dtype), mask=mask)


@kernel()
def layer_forward(
    table, inputs, weights, biases, outputs, kept, gates, gate_tiles, num_experts, num_rows, width, depth,
    KIND: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr, LINEAR_GATES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One layer of every expert, activated; ``KEEP`` says what is written to ``kept`` beside that, if anything.

    ``LINEAR_GATES``: behind the experts' programs of a block of rows come ``gate_tiles`` of gates that are linear
    layers of the same inputs; ``gates`` is described by ``gate_layer``.
    """
    width = whole(width, KIND)
    depth = whole(depth, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    of_experts = num_experts * blocks
    programs = of_experts
    if LINEAR_GATES:
        programs += gate_tiles
    first = (tl.program_id(0) // programs).to(tl.int64) * ROWS
    place = tl.program_id(0) % programs
    left_rows = (num_rows - first).to(tl.int32)
    of_gates = place >= of_experts if LINEAR_GATES else False
    if of_gates:
        gate_layer(
            table, gates, gate_tiles, place - of_experts, first, left_rows, depth, KIND, ROWS, GATE_COLUMNS, DEPTH
        )
    else:
        expert_layer(
            table, inputs, weights, biases, outputs, kept, place // blocks, place % blocks, first, left_rows,
            width, depth, KIND, CODE, KEEP, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip


@triton.jit
def shares_of_gate(logits, column_stride, size, inside, some, FEW: tl.constexpr):
    """What ``share`` finds a gate's weights in: all of them [rows, 16], or its softmax's statistics.

    ``some`` are the first of its logits, see ``some_logits``; ``FEW``: there are no more.
    """
    maximum, total = softmax_statistics(logits, column_stride, size, inside, some)
    return (tl.exp(some - maximum[:, None]) / total[:, None],) if FEW else (maximum, total)


@triton.jit
def share(gates, k, num_gates, found, position, first, rows, there, LOGITS: tl.constexpr, FEW: tl.constexpr):
    """The weight of one member of gate k in each row; ``found``: see ``shares_of_gate``."""
    if FEW:
        members = tl.arange(0, FEW_MEMBERS)
        weight = tl.sum(tl.where((members == position)[None, :], found[0], 0.0), 1)
    else:
        logits, column_stride, low, high = gate_logits(gates, k, num_gates, first, rows, LOGITS)
        weight = probability(logits, column_stride, position, found[0], found[1], there)
    return weight


@triton.jit
def mix_expert(
    sums, acc, table, biases, kept, gates, positions, shares, e, num_experts, first, first_column,
    left_rows, left_columns, width,
    KIND: tl.constexpr, LOGITS: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr,
    GATES: tl.constexpr, FEW: tl.constexpr, BRANCHES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``sums`` of all gates plus their weights times what the expert gives, from its product ``acc``.

    An expert that a gate does not see must not reach it, not even as 0 times infinity. Without ``BRANCHES`` all gates
    see it but add nothing.
    """
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    there = columns < left_columns
    value = add_bias(acc, tl.load(table + biases + e), first_column, there, KIND, COLUMNS)
    expert = activate(value, CODE)
    if KEEP:
        out = operand(table, kept + e, KIND) + (first * width + first_column)
        offsets = rows[:, None] * width + columns[None, :]
        tl.store(out + offsets, saved_of(value, CODE).to(KIND.dtype), mask=inside[:, None] & there[None, :])
    mixed = ()
    for k in tl.static_range(GATES):
        position = tl.load(table + positions + k * num_experts + e)
        total = sums[k]
        seen = position >= 0
        if BRANCHES:
            if seen:
                weight = share(gates, k, GATES, shares[k], position, first, rows, inside, LOGITS, FEW)
                total += weight[:, None] * expert
        else:
            some = rows < tl.where(seen, left_rows, 0)
            weight = share(gates, k, GATES, shares[k], position, first, rows, some, LOGITS, FEW)
            total = tl.where(seen, total + weight[:, None] * expert, total)
        mixed = mixed + (total,)
    return mixed


@kernel()
def last_forward(
    table, inputs, weights, biases, outputs, kept, gates, positions, parts, counters, splits,
    num_experts, num_rows, width, depth,
    KIND: tl.constexpr, LOGITS: tl.constexpr, CODE: tl.constexpr, KEEP: tl.constexpr,
    GATES: tl.constexpr, FEW: tl.constexpr, AHEAD: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """The last layer of every expert and all gates' weighted sums of them, held in registers.

    ``positions`` [K, E] holds an expert's place among a gate's logits, or -1. ``KEEP`` writes what the backward pass
    reads; without it no expert's output reaches memory. ``FEW``: no gate has more than 16 members. ``AHEAD``: one loop,
    written so that the compiler has the next steps' operands copied while an expert is mixed. ``SPLIT``: ``splits``
    programs share a block, each with some of the experts, and the last one to arrive adds what the others have stored
    in ``parts`` [block, split, gate].
    """
    # As one loop, the next expert's operands are copied while one is mixed, if they are copied in whole vectors. Where
    # there are more gates, or more to compute in between, that takes some registers too many on some architectures.
    FLAT: tl.constexpr = GATES <= FLAT_GATES and CODE <= LEAKY_RELU and KIND.dtype != tl.float32 and KIND.aligned
    width = whole(width, KIND)
    depth = whole(depth, KIND)
    blocks = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0)
    start = 0
    end = num_experts
    if SPLIT:
        part = tile % splits
        tile = tile // splits
        start, end = share_of(num_experts, part, splits)
    first = (tile // blocks).to(tl.int64) * ROWS
    first_column = (tile % blocks).to(tl.int64) * COLUMNS
    left_rows = (num_rows - first).to(tl.int32)
    left_columns = (width - first_column).to(tl.int32)
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    inside = rows < left_rows
    there = columns < left_columns
    gates = table + gates

    some = ()  # of all gates at first, so that they are waited for at the same time
    for k in tl.static_range(GATES):
        logits, column_stride, low, high = gate_logits(gates, k, GATES, first, rows, LOGITS)
        some = some + (some_logits(logits, column_stride, 0, high - low, inside),)
    shares = ()
    sums = ()
    for k in tl.static_range(GATES):
        logits, column_stride, low, high = gate_logits(gates, k, GATES, first, rows, LOGITS)
        shares = shares + (shares_of_gate(logits, column_stride, high - low, inside, some[k], FEW),)
        sums = sums + (tl.zeros((ROWS, COLUMNS), tl.float32),)

    if AHEAD:  # the compiler copies ahead what does not depend on a branch, such as the one where an expert is complete
        inner = tl.arange(0, DEPTH)
        e = start
        begin = 0
        x = operand(table, inputs + e, KIND) + first * depth
        weight = operand(table, weights + e, KIND) + first_column * depth
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        for _ in tl.range(0, (end - start) * tl.cdiv(depth, DEPTH)):
            within = inner < depth - begin
            at = x + rows[:, None] * depth + inner[None, :]
            left = tl.load(at, mask=inside[:, None] & within[None, :], other=0.0)
            at = weight + columns[None, :] * depth + inner[:, None]
            right = tl.load(at, mask=within[:, None] & there[None, :], other=0.0)
            acc = product(tl.where(begin == 0, 0.0, acc), left, right, KIND)
            begin += DEPTH
            complete = begin >= depth
            following = tl.minimum(e + 1, end - 1)
            next_x = operand(table, inputs + following, KIND) + first * depth
            next_weight = operand(table, weights + following, KIND) + first_column * depth
            x = tl.where(complete, next_x, x + DEPTH)
            weight = tl.where(complete, next_weight, weight + DEPTH)
            if complete:
                sums = mix_expert(
                    sums, acc, table, biases, kept, gates, positions, shares, e, num_experts, first, first_column,
                    left_rows, left_columns, width, KIND, LOGITS, CODE, KEEP, GATES, FEW, False, ROWS, COLUMNS,
                )  # fmt: skip
                begin = 0
                e += 1
    else:
        for e in tl.range(start, end, flatten=FLAT):
            acc = linear(
                table, inputs + e, weights + e, first, first_column, left_rows, left_columns, depth,
                KIND, ROWS, COLUMNS, DEPTH,
            )  # fmt: skip
            sums = mix_expert(  # in one loop Triton before 3.9 cannot have branches
                sums, acc, table, biases, kept, gates, positions, shares, e, num_experts, first, first_column,
                left_rows, left_columns, width, KIND, LOGITS, CODE, KEEP, GATES, FEW, not FLAT, ROWS, COLUMNS,
            )  # fmt: skip

    mask = inside[:, None] & there[None, :]
    offsets = rows[:, None] * width + columns[None, :]
    corner = first * width + first_column
    if SPLIT:
        area: tl.constexpr = ROWS * COLUMNS
        within = rows[:, None] * COLUMNS + columns[None, :]
        shared = pointer(table, parts, tl.float32, True) + tile.to(tl.int64) * splits * (GATES * area)
        for k in tl.static_range(GATES):
            tl.store(shared + (part * GATES + k) * area + within, sums[k])
        count = parts_to_add(table + counters + tile, splits)
        mask = mask & (rows < count * ROWS)[:, None]  # nothing but by the last to arrive
        for k in tl.static_range(GATES):
            value = sum_of_parts(shared + k * area, count, GATES * area, within)
            tl.store(operand(table, outputs + k, KIND) + corner + offsets, value.to(KIND.dtype), mask=mask)
    else:
        for k in tl.static_range(GATES):
            tl.store(operand(table, outputs + k, KIND) + corner + offsets, sums[k].to(KIND.dtype), mask=mask)
