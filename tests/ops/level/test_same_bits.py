"""The same call on the same number of threads gives the same bits, whichever thread does what."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

SHAPE = {"in_features": 40, "num_tasks": 2, "expert_units": (48, 40), "num_specific": 2, "num_shared": 2}


def run(trunk: mk.nn.PLE | mk.nn.MMoE, x: Tensor) -> list[Tensor]:
    """Outputs and gradients; dropout draws the same numbers each time."""
    torch.manual_seed(1)
    outputs = trunk(x)
    loss = torch.stack([y.square().mean() for y in outputs]).sum()
    return [*outputs, *torch.autograd.grad(loss, [x, *trunk.parameters()])]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [5, 1537])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm and dropout"])
def test_same_bits(norm: bool, rows: int, threads: int) -> None:
    torch.set_num_threads(threads)
    trunk = mk.nn.PLE(**SHAPE, num_levels=2, batch_norm=norm, dropout=0.2 if norm else 0.0)  # type: ignore[arg-type]
    x = torch.randn(rows, 40, requires_grad=True)
    first = run(trunk, x)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(trunk, x), strict=True))


@requires.cpp_kernels
@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("rows", [20, 256])
@pytest.mark.parametrize(("experts", "threads"), [(8, 9), (16, 18)])
def test_a_few_threads_more_than_experts(experts: int, threads: int, rows: int, isa: str) -> None:
    """What a thread without an expert would leave is in no sum: memory holds the NaN of a step before."""
    trunk = mk.nn.MMoE(40, 2, (48, 40), num_experts=experts)
    x = torch.randn(rows, 40, requires_grad=True)
    with mk.use_backend("reference"):
        expected = run(trunk, x)
    torch.set_num_threads(threads)
    with mk.use_backend("cpp"), _extension.instruction_set(isa):
        run(trunk, torch.full_like(x, torch.nan).requires_grad_())
        for found, value in zip(run(trunk, x), expected, strict=True):
            torch.testing.assert_close(found, value)
