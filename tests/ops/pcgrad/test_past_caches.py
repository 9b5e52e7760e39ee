"""Results that are too large for the caches, which kernels write past them."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from tests.ops.pcgrad.definition import OPTIONS, assert_agrees

LARGE = 4 * 2**20  # bytes of all results, csrc/cpu/pcgrad/pcgrad.cpp


@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_formula(isa: str, dtype: torch.dtype) -> None:
    """Of tensors of whole vectors and of others."""
    sizes = [LARGE // dtype.itemsize, 4096 + 3, 1000, 5]
    grads = [[torch.randn(size).to(dtype) for size in sizes] for _ in range(3)]
    order = torch.stack([torch.randperm(3) for _ in range(3)])
    for options in OPTIONS[:2]:
        with _extension.instruction_set(isa), mk.use_backend("cpp"):
            assert_agrees(grads, order, **options)
