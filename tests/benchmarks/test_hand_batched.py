"""The ways in which hand-batched trunks evaluate their later layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers.hand_batched import by_bmm, by_grouped_mm


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch has no grouped_mm")
def test_grouped_products_agree() -> None:
    torch.manual_seed(0)
    operands = [torch.randn(shape).bfloat16().requires_grad_() for shape in ((3, 16, 32), (3, 16, 32), (3, 16))]
    found = []
    for layer in (by_bmm, by_grouped_mm):
        y = layer(*operands)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), operands)])
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, rtol=0.05, atol=0.5)
