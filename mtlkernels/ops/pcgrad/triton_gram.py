# mypy: ignore-errors
"""Kernels of the Gram matrix: a part for each chunk of a parameter, and their sum.

A program is ROWS lanes that take COLUMNS elements of every gradient at a time, DEPTH times; between two groups of tasks
BETWEEN elements at a time, until the chunk ends. A lane keeps its own sums of products in registers; lanes meet only
when the chunk is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mtlkernels.ops._triton_functions import kernel
from mtlkernels.ops.pcgrad.triton_kernels import find_chunk


@triton.jit
def power(exponent):
    """Two to a power from -126 to 127, in float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def shrinking(exponent):
    """Two to a power of at most 0, and no less than -63: an infinite sum stays so when it is multiplied by two of them.

    What would shrink more is no part of a sum of elements so much larger in either case.
    """
    return power(tl.maximum(exponent, -63))


@triton.jit
def read(
    addresses,
    exponents,
    offset,
    row,
    limit,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The next elements of COUNT gradients, COLUMNS vectors each, in float64 if ``WIDE``.

    In float32 they are divided by a power of two, one for each lane and gradient, so that neither they nor their
    products leave the range; it grows when larger elements come. Returns the vectors, the exponents of these powers,
    given what they were, and the factors, at most 1, by which sums over earlier elements shrink when a power grows.
    """
    lanes = row + tl.arange(0, ROWS)
    vectors = ()
    for t in tl.static_range(COUNT):
        elements = tl.where(addresses[t] != 0, limit, 0)
        for c in tl.static_range(COLUMNS):
            at = lanes + c * ROWS
            pointers = addresses[t].to(tl.pointer_type(DTYPE)) + offset + at
            value = tl.load(pointers, mask=at < elements, other=0.0)
            vectors = vectors + (value.to(tl.float64 if WIDE else tl.float32),)
    if WIDE:
        return vectors, exponents, exponents
    else:
        scaled = ()
        raised = ()
        factors = ()
        for t in tl.static_range(COUNT):
            largest = tl.zeros((ROWS,), tl.int32)
            for c in tl.static_range(COLUMNS):
                bits = vectors[t * COLUMNS + c].to(tl.int32, bitcast=True) & 0x7FFFFFFF
                largest = tl.maximum(largest, bits)
            # 126 at most, so that the inverse is a normal number; infinity and NaN stay what they are.
            exponent = tl.maximum(exponents[t], tl.minimum((largest >> 23) - 127, 126))
            for c in tl.static_range(COLUMNS):
                scaled = scaled + (vectors[t * COLUMNS + c] * power(-exponent),)
            raised = raised + (exponent,)
            factors = factors + (shrinking(exponents[t] - exponent),)
        return scaled, raised, factors


@triton.jit
def multiplied(
    total, left, right, factors, others, A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """``total`` and the products of gradients A and B. In float32 these are added up among themselves first."""
    if WIDE:
        for c in tl.static_range(COLUMNS):
            total += left[A * COLUMNS + c] * right[B * COLUMNS + c]
        return total
    else:
        inner = left[A * COLUMNS] * right[B * COLUMNS]
        for c in tl.static_range(1, COLUMNS):
            inner += left[A * COLUMNS + c] * right[B * COLUMNS + c]
        return total * (factors[A] * others[B]) + inner


@triton.jit
def filled(value, dtype: tl.constexpr, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """COUNT vectors."""
    vectors = ()
    for _ in tl.static_range(COUNT):
        vectors = vectors + (tl.full((ROWS,), value, dtype),)
    return vectors


@triton.jit
def group_addresses(table, tasks, first, num_tasks, GROUP: tl.constexpr):
    """The addresses of a group of tasks' gradients, 0 beyond the last task."""
    addresses = ()
    for t in tl.static_range(GROUP):
        addresses = addresses + (tl.load(table + tasks + first + t, mask=first + t < num_tasks, other=0),)
    return addresses


@triton.jit
def levelled(exponents, WIDE: tl.constexpr, COUNT: tl.constexpr):
    """What makes lanes' sums comparable: a factor a lane for each gradient, and the unit that then remains."""
    factors = ()
    units = ()
    if not WIDE:
        for t in tl.static_range(COUNT):
            highest = tl.max(exponents[t], 0)
            factors = factors + (shrinking(exponents[t] - highest),)
            units = units + (((highest + 1023).to(tl.int64) << 52).to(tl.float64, bitcast=True),)
    return factors, units


@triton.jit
def write(where, total, left, right, level, other_level, A: tl.constexpr, B: tl.constexpr, WIDE: tl.constexpr):
    """Adds up the lanes' sums of products of tasks i and j, numbers A and B of their groups, and writes the result.

    Exactly zero where one of the gradients is missing, also if the other one is not finite.
    """
    out, stride, num_tasks, i, j = where
    if WIDE:
        result = tl.sum(total, 0)
    else:
        factors, units = level
        other_factors, other_units = other_level
        result = tl.sum(total * (factors[A] * other_factors[B]), 0).to(tl.float64) * (units[A] * other_units[B])
    result = tl.where((left[A] != 0) & (right[B] != 0), result, 0.0)
    tl.store(out + (i * num_tasks + j).to(tl.int64) * stride, result, mask=(i < num_tasks) & (j < num_tasks))


@triton.jit
def gram_pair(
    table,
    out,
    stride,
    tasks,
    first,
    second,
    num_tasks,
    offset,
    limit,
    SAME: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The products within a group of tasks, or between two, for one chunk; those of a second are read one by one."""
    addresses = group_addresses(table, tasks, first, num_tasks, GROUP)
    others = addresses if SAME else group_addresses(table, tasks, second, num_tasks, GROUP)
    totals = filled(0.0, tl.float64 if WIDE else tl.float32, GROUP * (GROUP + 1) // 2 if SAME else GROUP * GROUP, ROWS)
    exponents = filled(-126, tl.int32, GROUP, ROWS)
    other_exponents = filled(-126, tl.int32, GROUP, ROWS)
    for row in range(0, limit, ROWS * COLUMNS):
        vectors, exponents, factors = read(addresses, exponents, offset, row, limit, DTYPE, WIDE, GROUP, ROWS, COLUMNS)
        sums = ()
        raised = ()
        for j in tl.static_range(GROUP):
            if SAME:
                other, factor = vectors, factors
            else:
                other, exponent, factor = read(
                    (others[j],), (other_exponents[j],), offset, row, limit, DTYPE, WIDE, 1, ROWS, COLUMNS
                )
                raised = raised + exponent
            for i in tl.static_range(j + 1 if SAME else GROUP):
                total = totals[(j * (j + 1) // 2 if SAME else j * GROUP) + i]
                sums = sums + (multiplied(total, vectors, other, factors, factor, i, j if SAME else 0, WIDE, COLUMNS),)
        totals = sums
        other_exponents = exponents if SAME else raised
    level = levelled(exponents, WIDE, GROUP)
    other_level = levelled(other_exponents, WIDE, GROUP)
    for j in tl.static_range(GROUP):
        for i in tl.static_range(j + 1 if SAME else GROUP):
            total = totals[(j * (j + 1) // 2 if SAME else j * GROUP) + i]
            where = (out, stride, num_tasks, first + i, second + j)
            write(where, total, addresses, others, level, other_level, i, j, WIDE)


@kernel(tensors=2)
def gram_chunks(
    table, parts, first_part, num_parts, starts, sizes, tasks, pairs, num_parameters, num_tasks, num_pairs,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SINGLE: tl.constexpr, BETWEEN: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A chunk's part of ``<g_i, g_j>`` for the tasks i of a group and j of the same or a later one.

    ``parts`` [T, T, parts], float64, takes the upper triangle. ``pairs`` holds the first tasks of each pair of groups
    (all tasks are one group if ``SINGLE``). The pairs come one after another for each chunk, which thus is in the cache
    for all but the first of them.
    """
    chunk = tl.program_id(0) // num_pairs
    parameter, offset, limit = find_chunk(table, chunk, starts, sizes, num_parameters, ROWS * COLUMNS * DEPTH)
    tasks += parameter * num_tasks
    out = parts + first_part + chunk
    stride = num_parts.to(tl.int64)
    what = (table, out, stride, tasks)
    where = (num_tasks, offset, limit)
    if SINGLE:
        gram_pair(*what, 0, 0, *where, True, DTYPE, WIDE, GROUP, ROWS, COLUMNS)
    else:
        pairs += 2 * (tl.program_id(0) % num_pairs)
        first = tl.load(table + pairs).to(tl.int32)
        second = tl.load(table + pairs + 1).to(tl.int32)
        if first == second:
            gram_pair(*what, first, first, *where, True, DTYPE, WIDE, GROUP, ROWS, COLUMNS)
        else:
            gram_pair(*what, first, second, *where, False, DTYPE, WIDE, GROUP, ROWS, BETWEEN)


@kernel(tensors=2)
def gram_sum(
    parts, gram, num_parts, num_tasks, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of one element of the Gram matrix [T, T], in an order that depends on their number alone."""
    i = tl.program_id(0) // num_tasks
    j = tl.program_id(0) % num_tasks
    element = tl.minimum(i, j) * num_tasks + tl.maximum(i, j)
    parts += element.to(tl.int64) * num_parts
    lanes = tl.arange(0, ROWS * COLUMNS)
    total = tl.zeros((ROWS * COLUMNS,), tl.float64)
    for first in range(0, num_parts, ROWS * COLUMNS):
        total += tl.load(parts + first + lanes, mask=first + lanes < num_parts, other=0.0)
    tl.store(gram + tl.program_id(0), tl.sum(total, 0))
