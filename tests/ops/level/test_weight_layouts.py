"""Weights as they may lie in memory, on every instruction set: some kernels make them ready between their products."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import DTYPES, LAYOUTS, CaseFactory
from tests import requires
from tests.ops.agreement import check
from tests.ops.level import normalized
from tests.ops.level.definition import formula

PLE = mk.Routing.cgc(2, 2, 2, shared_gate=True)

pytestmark = requires.cpp_kernels


SETS = _extension.instruction_sets()
# No kernels in float64 make weights ready: one set of them is enough.
WAYS = [(isa, kind) for kind in DTYPES for isa in SETS if kind != torch.float64 or isa == SETS[-1]]
EVERY_LAYOUT = [*LAYOUTS, "repeated columns", "mixed"]
WIDE, NARROW, THREE_LAYERS = (64, 48, 32), (33, 70, 1), (1, 17, 40, 31)
Shape = tuple[int, tuple[int, ...]]


def cases(shapes: Sequence[Shape]) -> pytest.MarkDecorator:
    """Every layout on every instruction set, each with two of the shapes by turns: these meet all of both."""
    taken = [
        pytest.param(*shapes[(i + j + step) % len(shapes)], layout, isa, kind, id=f"{i}-{layout}-{isa}-{kind}-{step}")
        for i, (isa, kind) in enumerate(WAYS)
        for j, layout in enumerate(EVERY_LAYOUT)
        for step in (0, 2)
    ]
    return pytest.mark.parametrize("rows, widths, layout, isa, kind", taken)


def _factory(seed: int, layout: str, dtype: torch.dtype) -> CaseFactory:
    if layout == "repeated columns":
        return CaseFactory(seed, dtype)
    return CaseFactory(seed, dtype, layouts=LAYOUTS if layout == "mixed" else [layout])


def _repeated(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix that repeats its first column without keeping more than that."""
    own = tensor.detach()
    return (own[..., :1].expand_as(own) if own.dim() == 2 else own).requires_grad_()


@cases([(64, THREE_LAYERS), (101, WIDE), (101, NARROW), (300, WIDE), (300, THREE_LAYERS)])
def test_every_layout(rows: int, widths: tuple[int, ...], layout: str, isa: str, kind: torch.dtype) -> None:
    case = _factory(rows, layout, kind).expert_mixture(rows, widths, PLE, activation="silu")
    if layout == "repeated columns":
        case = case.map(_repeated)
    with _extension.instruction_set(isa):
        check(mk.expert_mixture, formula, case, "cpp", 2 if rows == 101 else 1)


@cases([(101, WIDE), (101, THREE_LAYERS), (300, NARROW), (300, WIDE), (64, WIDE)])
def test_layers_that_store_their_inputs(
    rows: int, widths: tuple[int, ...], layout: str, isa: str, kind: torch.dtype
) -> None:
    """A layer at a time: rows that are one block, where two threads share the experts, and several blocks."""
    kinds = ["none"] * (len(widths) - 1)
    options = {"activation": "prelu", "dropout": [0.1] * len(kinds)}
    case = normalized.case(_factory(7, layout, kind), rows, widths, PLE, kinds, **options)
    if layout == "repeated columns":
        case = case.map(_repeated)
    with _extension.instruction_set(isa):
        check(normalized.fused, formula, case, "cpp", 2)
