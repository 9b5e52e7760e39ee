"""The ways in which hand-batched trunks evaluate their later layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.peers.hand_batched import by_bmm, by_grouped_mm
from mtlkernels.testing import assert_within_budget


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="PyTorch has no grouped_mm")
def test_grouped_products_agree() -> None:
    torch.manual_seed(0)
    operands = [torch.randn(shape).bfloat16() for shape in ((3, 16, 32), (3, 16, 32), (3, 16))]
    cotangents = torch.randn(3, 16, 16).bfloat16()
    found = []
    for layer, dtype in ((by_grouped_mm, torch.bfloat16), (by_bmm, torch.float64), (by_bmm, torch.bfloat16)):
        leaves = [t.detach().to(dtype).requires_grad_() for t in operands]
        y = layer(*leaves)
        grads = torch.autograd.grad(y, leaves, cotangents.to(dtype))
        found.append({"outputs": [y.detach()], **{str(i): [grad] for i, grad in enumerate(grads)}})
    assert_within_budget(*found)
