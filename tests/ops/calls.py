"""Calls of every operator, forward and backward, for tests of what all of them share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.level import gate_layers, normalized
from tests.ops.level.test_serving_operator import SERVE, experts_and_rows

ROUTING = mk.Routing.cgc(2, 1, 1)
NORMS = ((("batch", "none"), "relu"), (("none", "layer"), "prelu"), (("none", "none"), "dice"))
WIDTHS = (24, 40, 80)
Results = dict[str, list[Tensor]]


@functools.cache
def _operands(dtype: torch.dtype, rows: int) -> tuple[Any, ...]:
    """Made once, as they are drawn from PyTorch's generator, which all threads share."""
    experts, x = experts_and_rows("linear gates", dtype, rows)
    return experts.operands(*x)


def _serve(dtype: torch.dtype, rows: int) -> Results:
    return {"outputs": SERVE(*_operands(dtype, rows))}


def _kept(case: Case) -> Results:
    """The last of four calls, of which what was read is kept by then."""
    with torch.no_grad():
        return [evaluate(gate_layers.by_layers, case) for _ in range(4)][-1]


def calls(dropout: float = 0.2) -> dict[str, Callable[[], Results]]:
    """Calls by name; their results are large enough for the pool of memory, and some threads have work to share.

    ``dropout`` of the levels with norms: where it is not 0.0 they seed PyTorch's generator.
    """
    found: dict[str, Callable[[], Results]] = {}

    def add(name: str, op: Callable[..., Any], case: Case) -> None:
        found[name] = functools.partial(evaluate, op, case)
        if case.leaves():
            found[f"{name}, serving"] = functools.partial(evaluate, op, case.map(Tensor.detach))

    for dtype, rows in ((torch.float32, 3), (torch.float32, 64), (torch.bfloat16, 200)):
        make = CaseFactory(rows, dtype)
        add(f"expert_mixture, {dtype}, {rows} rows", mk.expert_mixture, make.expert_mixture(rows, WIDTHS, ROUTING))
        found[f"level_serve, {dtype}, {rows} rows"] = functools.partial(_serve, dtype, rows)
    make = CaseFactory(0, torch.float32)
    add("gate layers", gate_layers.by_layers, gate_layers.with_layers(make, 64, WIDTHS))
    for rows in (1, 64):
        lists = gate_layers.with_layers(make, rows, WIDTHS).map(Tensor.detach)
        found[f"kept lists, {rows} rows"] = functools.partial(_kept, lists)
    for kinds, activation in NORMS:
        case = normalized.case(make, 64, WIDTHS, ROUTING, kinds, activation=activation, dropout=[dropout, 0.0])
        add(f"norms, {kinds}, {activation}", normalized.fused, case)
    add("gated_mixture", mk.gated_mixture, make.gated_mixture(70, 90, ROUTING))
    add("snr_trans", mk.snr_trans, snr_trans(make, 70, [24, 33], [90, 7, 80]))
    add("stacked snr_trans", mk.snr_trans, snr_trans(make, 70, [24] * 2, [90] * 3, stacked=True))
    add("snr_aver", mk.snr_aver, snr_aver(make, 140, 50, 3, 2))
    grads = [[make.leaf(5000, requires_grad=False), make.leaf(70, 70, requires_grad=False)] for _ in range(3)]
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    found["pcgrad"] = lambda: {"grads": [grad for grad in mk.pcgrad(grads, order=order) if grad is not None]}
    return found
