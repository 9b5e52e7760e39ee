"""Calls of levels whose gates are linear layers."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory
from tests.ops.agreement import assert_agrees, reference_op
from tests.ops.level.definition import formula, linear_gates

ROUTING = mk.Routing.cgc(2, 2, 1, shared_gate=True)  # 5 experts, 3 streams, gates of 3, 3 and 5


def random_layers(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """Arguments with gate layers: one stream or one a gate, biases in all gates, some or none, stacked or not."""
    rng = random.Random(seed)
    make = CaseFactory(seed, dtype, layouts=("contiguous", "transposed", "strided"))
    streams = rng.random() < 0.5
    widths = [rng.randint(1, 60) for _ in range(rng.randint(2, 3))]
    rows = rng.choice((0, 1, 2, 3, 4, 5, 16, 33, 64, 130, 300))
    arguments = dict(make.expert_mixture(rows, widths, ROUTING, streams=streams, activation="silu").arguments)
    del arguments["gate_logits"]
    sizes = [len(gate) for gate in ROUTING.gate_experts]
    weights: Any = [make.leaf(size, widths[0], scale=widths[0] ** -0.5) for size in sizes]
    biases: Any = [make.leaf(size) if rng.random() < 0.7 else None for size in sizes]
    if rng.random() < 0.3:
        weights = make.leaf(sum(sizes), widths[0], scale=widths[0] ** -0.5)
        biases = make.leaf(sum(sizes)) if rng.random() < 0.5 else None
    return {**arguments, "gate_weights": weights, "gate_biases": biases}


def with_layers(
    make: CaseFactory,
    rows: int,
    widths: Sequence[int],
    *,
    activation: str = "silu",
    streams: bool = True,
    routing: mk.Routing = ROUTING,
) -> Case:
    """A call whose gates are linear layers, the first of them with biases."""
    arguments = dict(make.expert_mixture(rows, widths, routing, activation=activation, streams=streams).arguments)
    del arguments["gate_logits"]
    sizes = [len(gate) for gate in routing.gate_experts]
    weights, biases = [make.leaf(size, widths[0]) for size in sizes], [make.leaf(sizes[0]), *[None] * (len(sizes) - 1)]
    return Case({**arguments, "gate_weights": weights, "gate_biases": biases}, make.dtype)


def by_layers(**arguments: Any) -> tuple[Tensor, ...]:
    """The call, which has no logits."""
    return mk.expert_mixture(gate_logits=None, **arguments)


def by_logits(*, gate_weights: Any, gate_biases: Any, **rest: Any) -> tuple[Tensor, ...]:
    """The same with the gates outside."""
    logits = linear_gates(rest["inputs"], gate_weights, gate_biases, rest["routing"])
    return mk.expert_mixture(gate_logits=logits, **rest)


def check(seed: int, dtype: torch.dtype, grad: bool) -> None:
    """A random call by the implementation that the block around asks for."""
    case = Case(random_layers(seed, dtype), dtype)
    if not grad:
        case = case.map(Tensor.detach)
    with torch.set_grad_enabled(grad):
        assert_agrees(by_layers, formula, case, functools.partial(reference_op, by_logits))
