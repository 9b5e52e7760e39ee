"""gated_mixture by its formula, term by term, independent of the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def _logits_by_gate(gate_logits: Any, routing: Any) -> list[Tensor]:
    if not isinstance(gate_logits, Tensor):
        return list(gate_logits)
    return list(gate_logits.split([len(gate) for gate in routing.gate_experts], 1))


def mix(experts: Sequence[Tensor], gate_logits: Any, routing: Any) -> list[Tensor]:
    """The mixture of experts of any dtype, each [B, H]."""
    outputs = []
    for gate, logits in zip(routing.gate_experts, _logits_by_gate(gate_logits, routing), strict=True):
        exponentials = [column.exp() for column in logits.unbind(1)]
        total = sum(exponentials)
        terms = [(value / total)[:, None] * experts[e] for e, value in zip(gate, exponentials, strict=True)]
        outputs.append(sum(terms))
    return [y.to(experts[0].dtype) for y in outputs]


def formula(experts: Tensor, gate_logits: Any, routing: Any) -> list[Tensor]:
    """y_k = sum over e in gate k of exp(l_ke) / sum_j exp(l_kj) * experts_e."""
    return mix(experts.unbind(1), gate_logits, routing)
