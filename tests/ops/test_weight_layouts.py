"""Weights as they may lie in memory, on every instruction set: some kernels make them ready between their products."""

from __future__ import annotations

import functools

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import LAYOUTS, CaseFactory
from tests.ops.definition import assert_agrees, reference_op

PLE = mk.Routing.cgc(2, 2, 2, shared_gate=True)

pytestmark = pytest.mark.skipif(not _extension.loaded(), reason="no C++ kernels")


@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("layout", [*LAYOUTS, "repeated columns", "mixed"])
@pytest.mark.parametrize("widths", [(64, 48, 32), (33, 70, 1), (1, 17, 40, 31)], ids=str)
@pytest.mark.parametrize("rows", [64, 101, 300])
def test_every_layout(rows: int, widths: tuple[int, ...], layout: str, isa: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and isa != _extension.instruction_sets()[-1]:
        pytest.skip("no kernels in float64 make weights ready: one set of them is enough")
    if layout == "repeated columns":
        case = CaseFactory(rows, dtype).expert_mixture(rows, widths, PLE, activation="silu")
        case = case.map(lambda t: (t.detach()[..., :1].expand_as(t) if t.dim() == 2 else t.detach()).requires_grad_())
    else:
        case = CaseFactory(rows, dtype, layouts=LAYOUTS if layout == "mixed" else [layout]).expert_mixture(
            rows, widths, PLE, activation="silu"
        )
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        assert_agrees(
            mk.expert_mixture, case, functools.partial(reference_op, mk.expert_mixture), 2 if rows == 101 else 1
        )
