"""A level by the C++ kernels of every instruction set that this processor has, not only of its best."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import CaseFactory, random_expert_mixture
from tests.ops import agreement
from tests.ops.level import normalized
from tests.ops.level.definition import formula

LOWER = pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
PLE = mk.Routing.cgc(2, 2, 1, shared_gate=True)


@LOWER
@pytest.mark.parametrize("seed", range(1000, 1006))
def test_expert_mixture(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        agreement.check(mk.expert_mixture, formula, random_expert_mixture(seed, dtype), "cpp")


@LOWER
@pytest.mark.parametrize("seed", range(1000, 1004))
def test_norms(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        normalized.check(normalized.random_case(seed, dtype), "cpp")


@LOWER
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_norms_of_few_rows(rows: int, isa: str, dtype: torch.dtype) -> None:
    make = CaseFactory(rows, dtype)
    case = normalized.case(make, rows, [33, 40, 17], PLE, ["layer", "none"], dropout=[0.3, 0.0], activation="prelu")
    with _extension.instruction_set(isa):
        normalized.check(case, "cpp")
