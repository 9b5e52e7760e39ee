"""The C++ kernels of every instruction set that this processor has, not only of its best."""

from __future__ import annotations

import functools

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import CaseFactory, random_expert_mixture, random_gated_mixture
from tests.ops import normalized
from tests.ops.definition import assert_agrees, reference_op
from tests.ops.snr_cases import random_snr_aver, random_snr_trans

LOWER = _extension.instruction_sets()[:-1]
PLE = mk.Routing.cgc(2, 2, 1, shared_gate=True)

pytestmark = pytest.mark.skipif(not LOWER, reason="no C++ kernels, or only one instruction set")


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("seed", range(1000, 1020))
def test_expert_mixture(seed: int, isa: str, dtype: torch.dtype) -> None:
    case = random_expert_mixture(seed, dtype)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(mk.expert_mixture, case, functools.partial(reference_op, mk.expert_mixture), 1)


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("seed", range(1000, 1008))
def test_normalized_mixture(seed: int, isa: str, dtype: torch.dtype) -> None:
    case = normalized.random_case(seed, dtype)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(normalized.fused, case, normalized.by_reference, 1, normalized.definition, 5.0)


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_normalized_mixture_of_few_rows(rows: int, isa: str, dtype: torch.dtype) -> None:
    make = CaseFactory(rows, dtype)
    case = normalized.case(make, rows, [33, 40, 17], PLE, ["layer", "none"], dropout=[0.3, 0.0], activation="prelu")
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(normalized.fused, case, normalized.by_reference, 1, normalized.definition, 5.0)


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("seed", range(1000, 1005))
def test_gated_mixture(seed: int, isa: str, dtype: torch.dtype) -> None:
    case = random_gated_mixture(seed, dtype)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(mk.gated_mixture, case, functools.partial(reference_op, mk.gated_mixture), 1)


@pytest.mark.parametrize("isa", LOWER)
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_snr(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        for op, random_case in ((mk.snr_trans, random_snr_trans), (mk.snr_aver, random_snr_aver)):
            assert_agrees(op, random_case(seed, dtype), functools.partial(reference_op, op), 1)


def test_the_choice_ends_with_the_block() -> None:
    best = _extension.instruction_sets()[-1]
    with _extension.instruction_set(LOWER[0]):
        assert _extension.build_facts()["runs as"] == LOWER[0]
    assert _extension.build_facts()["runs as"] == best


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be one of .* got 'mmx'"), _extension.instruction_set("mmx"):
        pass
