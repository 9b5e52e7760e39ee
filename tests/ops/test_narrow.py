"""Narrow layers in float32 are multiplied without AMX, which they would be slower with: told by the bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

pytestmark = requires.amx

Results = list[Tensor]


def _level(rows: int, width: int, **style: bool) -> Callable[[], Results]:
    trunk = mk.nn.MMoE(width, 2, (width, width), num_experts=3, **style)  # type: ignore[arg-type]
    x = torch.randn(rows, width, requires_grad=True)

    def run() -> Results:
        outputs = trunk(x)
        return [*outputs, *torch.autograd.grad([y.sum() for y in outputs], [x, *trunk.parameters()])]

    return run


def _serving(rows: int, width: int) -> Callable[[], Results]:
    trunk, x = mk.nn.MMoE(width, 2, (width, width), num_experts=3).eval(), torch.randn(rows, width)

    def run() -> Results:
        with torch.no_grad():
            return [trunk(x)[0] for _ in range(4)]  # the last ones by what is kept of the first

    return run


def _routes(rows: int, width: int) -> Callable[[], Results]:
    u, weight = torch.randn(2, rows, width, requires_grad=True), torch.randn(2, 2, width, width, requires_grad=True)
    z = torch.rand(2, 2, requires_grad=True)

    def run() -> Results:
        outputs = mk.snr_trans(u, weight, z)
        return [*outputs, *torch.autograd.grad([y.sum() for y in outputs], [u, weight, z])]

    return run


@pytest.mark.parametrize(
    ("make", "rows", "narrow", "wide"),
    [(_level, 160, 40, 128), (_serving, 40, 40, 64), (_routes, 200, 48, 64)],
)
def test_by_width(make: Callable[[int, int], Callable[[], Results]], rows: int, narrow: int, wide: int) -> None:
    for width, expected, other in ((narrow, "avx512", "amx"), (wide, "amx", "avx512")):
        run = make(rows, width)
        found = run()
        with _extension.instruction_set(expected):
            assert all(map(torch.equal, found, run()))
        with _extension.instruction_set(other):
            assert not all(map(torch.equal, found, run()))


def test_layers_that_store_their_inputs() -> None:
    """Their backward pass has the gradients alone; it takes wide products and more rows."""
    for width, expected in ((64, "avx512"), (128, "amx")):
        run = _level(400, width, batch_norm=True)
        found = run()
        with _extension.instruction_set(expected):
            wanted = run()
        same = [torch.equal(a, b) for a, b in zip(found, wanted, strict=True)]
        assert all(same) if expected == "amx" else not same[0]


def test_by_rows_after_a_choice() -> None:
    """The choice by name ends, and with it that of any width."""
    run = _routes(200, 16)
    first = run()
    with _extension.instruction_set("amx"):
        assert not all(map(torch.equal, first, run()))
    assert all(map(torch.equal, first, run()))
