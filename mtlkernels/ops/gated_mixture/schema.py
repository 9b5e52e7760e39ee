"""The operators of gated_mixture.

The routing travels flat: ``gate_experts`` are the experts of all gates one after another, ``gate_sizes`` how many
belong to each gate.
"""

from __future__ import annotations

from torch import Tensor

from mtlkernels._library import cast_first, define, empty


def _forward(
    experts: Tensor, gate_logits: list[Tensor], gate_experts: list[int], gate_sizes: list[int]
) -> list[Tensor]:
    rows, _, features = experts.shape
    return [empty(experts, (rows, features)) for _ in gate_sizes]


def _backward(
    grad_outputs: list[Tensor],
    experts: Tensor,
    gate_logits: list[Tensor],
    gate_experts: list[int],
    gate_sizes: list[int],
    need_experts: bool,
    need_logits: bool,
) -> list[Tensor]:
    grad_experts = [empty(experts, experts.shape)] if need_experts else []
    grad_logits = [empty(logits, logits.shape) for logits in gate_logits] if need_logits else []
    return grad_experts + grad_logits


define("gated_mixture_forward", _forward, cast_first(1))
define("gated_mixture_backward", _backward)
