"""Gated mixture as PyTorch's own operators; see :mod:`mtlkernels.ops.level.plain`."""

from __future__ import annotations

import functools
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
    gates = reference.split_gates(gate_experts, gate_sizes)
    return tuple(_mixture_of_proxies(experts[:, gate], z) for gate, z in zip(gates, logits, strict=True))


def mix_each(
    experts: Sequence[Any], logits: Sequence[Any], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> tuple[Tensor, ...]:
    """:func:`mix` of experts [B, H] in a list: what only unused outputs read keeps no gradient.

    Each gate gets a stack of the experts that it mixes, which gates that mix the same ones share: the gradient of a
    stack of all would be zeros for the others, and zeros times what is not finite are NaN.
    """
    proxies = holds_proxy([*experts, *logits])
    one_gate = _mixture_of_proxies if proxies else reference.mixture
    experts = experts if proxies else _of_one_dtype(experts)
    stacks: dict[tuple[int, ...], Any] = {}
    outputs = []
    for gate, z in zip(map(tuple, reference.split_gates(gate_experts, gate_sizes)), logits, strict=True):
        if gate not in stacks:
            stacks[gate] = torch.stack([experts[e] for e in gate], dim=1)
        outputs.append(one_gate(stacks[gate], z))
    return tuple(outputs)


def _mixture_of_proxies(experts: Any, logits: Any) -> Any:
    weight = torch.softmax(logits, 1).to(experts.dtype).unsqueeze(1)
    return torch.bmm(weight, experts).squeeze(1)


def _of_one_dtype(experts: Sequence[Tensor]) -> Sequence[Tensor]:
    """The experts in the widest of their dtypes, which a stack of all would have; autocast may leave several."""
    dtypes = {expert.dtype for expert in experts}
    if len(dtypes) == 1:
        return experts
    widest = functools.reduce(torch.promote_types, dtypes)
    return [expert.to(widest) for expert in experts]


def logits_by_gate(gate_logits: Any, sizes: Sequence[int]) -> list[Any]:
    """An entry a gate, from a sequence or from a proxy that stands for one tensor [B, sum N_k]."""
    if isinstance(gate_logits, (list, tuple)):
        return list(gate_logits)
    return [gate_logits[:, sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
