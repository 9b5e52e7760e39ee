"""Gradients of weights that are too large for the caches, which kernels write past them."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import Case, CaseFactory
from tests.ops import agreement
from tests.ops.level import normalized
from tests.ops.level.definition import formula

INSTRUCTION_SETS = pytest.mark.parametrize("isa", _extension.instruction_sets()[1:])  # the lowest has no such way
PLE = mk.Routing.cgc(2, 3, 3)
# Whole vectors of each dtype; rows of odd lengths, which cannot go past the caches, in one layer and in both.
CASES = [(3, [320, 192, 64]), (16, [320, 192, 64]), (640, [320, 192, 64]), (16, [310, 192, 70]), (100, [310, 190, 70])]
CACHED_BYTES = 2**20  # of a chosen instruction set: csrc/cpu/runtime/caches.cpp


def assert_large(case: Case) -> None:
    weights = [weight for layer in case.arguments["weights"] for weight in layer]
    assert sum(weight.nbytes for weight in weights) >= CACHED_BYTES


@INSTRUCTION_SETS
@pytest.mark.parametrize(("rows", "widths"), CASES)
def test_formula(rows: int, widths: list[int], isa: str, dtype: torch.dtype) -> None:
    case = CaseFactory(rows, dtype).expert_mixture(rows, widths, PLE)
    assert_large(case)
    with _extension.instruction_set(isa):
        agreement.check(mk.expert_mixture, formula, case, "cpp", threads=2)


@INSTRUCTION_SETS
def test_norms(isa: str, dtype: torch.dtype) -> None:
    case = normalized.case(CaseFactory(0, dtype), 48, [320, 192, 64], PLE, ["layer", "none"])
    assert_large(case)
    with _extension.instruction_set(isa):
        normalized.check(case, "cpp", threads=2)
