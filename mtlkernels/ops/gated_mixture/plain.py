"""Gated mixture as PyTorch's own operators; see :mod:`mtlkernels.ops.level.plain`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels._tracing import holds_proxy
from mtlkernels.ops.gated_mixture import reference


def mix(
    experts: Any, logits: Sequence[Any], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """The K mixtures of ``experts`` [B, E, H]; of proxies, whose dtype is not known, in the dtypes that they have."""
    if not holds_proxy([experts, *logits]):
        return tuple(reference.forward(experts, logits, gate_experts, gate_sizes))
    outputs = []
    for gate, z in zip(reference.split_gates(gate_experts, gate_sizes), logits, strict=True):
        weight = torch.softmax(z, 1).to(experts.dtype).unsqueeze(1)
        outputs.append(torch.bmm(weight, experts[:, gate]).squeeze(1))
    return tuple(outputs)


def logits_by_gate(gate_logits: Any, sizes: Sequence[int]) -> list[Any]:
    """An entry a gate, from a sequence or from a proxy that stands for one tensor [B, sum N_k]."""
    if isinstance(gate_logits, (list, tuple)):
        return list(gate_logits)
    return [gate_logits[:, sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
