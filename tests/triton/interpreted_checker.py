"""The checker of launches finds each kind of fault, and nothing where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mtlkernels._backends import interpreting
from mtlkernels.ops._table import Table

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")


@triton.jit
def copy(source, target, size, MASKED: tl.constexpr, APART: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """Blocks of 8, one a program; all of them the first where they are not apart."""
    at = tl.program_id(0) * 8 * APART + tl.arange(0, 8)
    mask = at < size if MASKED else at >= 0
    tl.store(target + at, tl.load(source + at, mask=mask), mask=mask)


@triton.jit
def total(source, parts, counter, result, programs, COUNTS: tl.constexpr, APART: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """The sum of what each program has summed up, by the last to come; or by the last program without asking.

    With counters that are apart, each program moves one of its own.
    """
    program = tl.program_id(0)
    tl.store(parts + program, tl.sum(tl.load(source + program * 8 + tl.arange(0, 8))))
    arrived = tl.atomic_add(counter + program * APART, 1) + program * APART if COUNTS else program
    if arrived == programs - 1:
        at = tl.arange(0, 4)
        tl.store(result, tl.sum(tl.load(parts + at, mask=at < programs, other=0.0)))


@triton.jit
def by_table(table, target):  # type: ignore[no-untyped-def]
    """Through an address that the kernel looks up."""
    source = tl.load(table).to(tl.pointer_type(tl.float32))
    at = tl.arange(0, 8)
    tl.store(target + at, tl.load(source + at))


def found(kernel: Any, programs: int, *args: Any, **constants: Any) -> str:
    with pytest.raises(AssertionError) as caught:
        kernel[(programs,)](*args, **constants)
    return str(caught.value)


def test_nothing_is_found_where_nothing_is_wrong() -> None:
    x, y = torch.arange(20.0), torch.zeros(20)
    copy[(3,)](x, y, 20, MASKED=True, APART=True)
    assert torch.equal(x, y)
    result = torch.zeros(1)
    total[(2,)](x, torch.zeros(2), torch.zeros(1, dtype=torch.int32), result, 2, COUNTS=True, APART=False)
    assert result == x[:16].sum()
    table = Table()
    table.pointers([x])
    by_table[(1,)](table.to(x.device), y)


def test_loads_and_stores_beyond_a_tensor() -> None:
    """Of 20 elements, in blocks of 8, without a mask."""
    long, short = torch.zeros(24), torch.zeros(20)
    for what, tensors in (("loads", (short, long)), ("stores", (long, short))):
        message = found(copy, 3, *tensors, 20, MASKED=False, APART=True)
        assert message == f"copy: program 2 {what} outside of every tensor, at 4 addresses"


def test_two_programs_that_store_to_one_address() -> None:
    x, y = torch.zeros(8), torch.zeros(8)
    assert "programs 0 and 1 store to one address" in found(copy, 2, x, y, 8, MASKED=True, APART=False)


def test_reading_what_another_program_stores() -> None:
    """Without a counter, and with one that the other program does not know."""
    arguments = (torch.arange(16.0), torch.zeros(2), torch.zeros(2, dtype=torch.int32), torch.zeros(1), 2)
    for constants in ({"COUNTS": False, "APART": False}, {"COUNTS": True, "APART": True}):
        message = found(total, 2, *arguments, **constants)
        assert message == "total: program 1 loads what program 0 stores, without a counter between them"


def test_addresses_within_elements() -> None:
    x, table = torch.zeros(9), Table()
    table.integers([x.data_ptr() + 2])
    assert "loads at addresses that are no multiples of 4" in found(by_table, 1, table.to(x.device), torch.zeros(8))


def test_an_address_of_what_is_gone() -> None:
    x, y, table = torch.zeros(2**20), torch.zeros(8), Table()  # so large that nothing else takes its place at once
    table.integers([x.data_ptr()])  # of pointers the table knows the tensors
    del x
    assert "loads outside of every tensor" in found(by_table, 1, table.to(y.device), y)
