"""Coding variables of random calls of the two SNR operators."""

from __future__ import annotations

import torch
from torch import Tensor

from mtlkernels.testing import CaseFactory

SHARES = (0.0, 0.3, 0.5, 0.8, 1.0)  # of routes that are open


def coding(make: CaseFactory, outputs: int, inputs: int, share: float, dtype: torch.dtype | None = None) -> Tensor:
    """z [outputs, inputs]: a share of it open, of that a third exactly 1, as hard concrete samples are."""
    drawn = [[make.rng.random() for _ in range(inputs)] for _ in range(outputs)]
    kept = [[make.rng.random() < share for _ in range(inputs)] for _ in range(outputs)]
    values = [
        [(1.0 if x > 2 / 3 else x + 0.1) if k else 0.0 for x, k in zip(xs, ks, strict=True)]
        for xs, ks in zip(drawn, kept, strict=True)
    ]
    return torch.tensor(values, dtype=dtype or make.dtype, device=make.device).requires_grad_()
