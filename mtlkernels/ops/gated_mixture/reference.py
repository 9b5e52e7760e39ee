"""Gated mixture in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, otherwise float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def split_gates(gate_experts: Sequence[int], gate_sizes: Sequence[int]) -> Iterator[list[int]]:
    """The experts of each gate, from the flat form that operators take."""
    start = 0
    for size in gate_sizes:
        yield list(gate_experts[start : start + size])
        start += size


def mixed_by(experts: Tensor, gate: Sequence[int]) -> Tensor:
    """``experts[:, gate]``, as the runs of consecutive experts that it is made of.

    A list as an index would become a tensor, which ``torch.jit.trace`` keeps as a constant: one that was made under
    ``torch.inference_mode`` could never be saved for a backward pass.
    """
    starts = [i for i, e in enumerate(gate) if i == 0 or e != gate[i - 1] + 1]
    ends = [*starts[1:], len(gate)]
    runs = [experts.narrow(1, gate[start], end - start) for start, end in zip(starts, ends, strict=True)]
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)


def forward(
    experts: Tensor, gate_logits: Sequence[Tensor], gate_experts: Sequence[int], gate_sizes: Sequence[int]
) -> list[Tensor]:
    """``y_k = sum_e softmax(logits_k)_e * experts[:, e]``: K tensors [B, H] of the dtype of ``experts``."""
    gates = split_gates(gate_experts, gate_sizes)
    return [mixture(mixed_by(experts, gate), logits) for gate, logits in zip(gates, gate_logits, strict=True)]


def mixture(experts: Tensor, logits: Tensor) -> Tensor:
    """What one gate makes of the experts [B, N, H] that it mixes, by its logits [B, N]."""
    acc = accumulation_dtype(experts, logits)
    weight = torch.softmax(logits.to(acc), dim=1)
    mixed = torch.bmm(weight.unsqueeze(1), experts.to(acc)).squeeze(1)
    return mixed.to(experts.dtype, copy=True)  # a copy, so that no output is a view


def backward(
    grad_outputs: Sequence[Tensor],
    experts: Tensor,
    gate_logits: Sequence[Tensor],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    need_experts: bool,
    need_logits: bool,
) -> list[Tensor]:
    """Gradients of ``experts`` and of each gate's logits, those that are wanted.

    With p the softmax of a gate's logits and g_e = <dy, experts[:, e]>:
    d experts[:, e] = sum over gates of p_e * dy, and d logits_e = p_e * (g_e - sum_j p_j * g_j).
    """
    acc = accumulation_dtype(experts, *gate_logits)
    grad_experts = torch.zeros(experts.shape, dtype=acc, device=experts.device)
    grad_logits = []
    gates = split_gates(gate_experts, gate_sizes)
    for gate, logits, grad in zip(gates, gate_logits, grad_outputs, strict=True):
        weight = torch.softmax(logits.to(acc), dim=1)
        grad = grad.to(acc)
        if need_experts:
            # A gate may name an expert twice where operators are called directly.
            places = torch.tensor(gate, device=experts.device)
            grad_experts = grad_experts.index_add(1, places, weight.unsqueeze(2) * grad.unsqueeze(1))
        if need_logits:
            inner = torch.bmm(mixed_by(experts, gate).to(acc), grad.unsqueeze(2)).squeeze(2)
            grad_logits.append((weight * (inner - (weight * inner).sum(1, keepdim=True))).to(logits.dtype))
    return [grad_experts.to(experts.dtype), *grad_logits] if need_experts else grad_logits
