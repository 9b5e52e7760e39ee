"""A level with linear gates in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels.ops.expert_mixture import reference as mixture


def read_by_gates(inputs: Sequence[Tensor], num_gates: int) -> list[Tensor]:
    """What each gate reads: an input of its own, or the only one."""
    return list(inputs[:num_gates]) if len(inputs) > 1 else [inputs[0]] * num_gates


def gate_logits(
    inputs: Sequence[Tensor], gate_weights: Sequence[Tensor], gate_biases: Sequence[Tensor | None]
) -> list[Tensor]:
    """The K gates' logits [B, N_k]."""
    read = read_by_gates(inputs, len(gate_weights))
    return [F.linear(x, weight, bias) for x, weight, bias in zip(read, gate_weights, gate_biases, strict=True)]


def gate_gradients(
    grad_logits: Sequence[Tensor],
    inputs: Sequence[Tensor],
    gate_weights: Sequence[Tensor],
    grad_inputs: Sequence[Tensor],
    need_weights: bool,
    need_biases: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """From the logits' gradients those of weights, biases, and inputs, whose ``grad_inputs`` have the experts' part."""
    read = read_by_gates(inputs, len(gate_weights))
    totals = list(grad_inputs)
    for k, (grad, weight) in enumerate(zip(grad_logits, gate_weights, strict=True) if totals else ()):
        at = k if len(inputs) > 1 else 0
        totals[at] = torch.addmm(totals[at], grad, weight)
    grad_weights = [grad.t() @ x for grad, x in zip(grad_logits, read, strict=True)] if need_weights else []
    return totals, grad_weights, [grad.sum(0) for grad in grad_logits] if need_biases else []


def forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    gate_biases: Sequence[Tensor | None],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    save: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Outputs and what is saved as of an expert mixture, and the logits in one tensor."""
    logits = gate_logits(inputs, gate_weights, gate_biases)
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    outputs, saved = mixture.forward(inputs, weights, biases, logits, *routing, save)
    return outputs, saved, torch.cat(logits, 1) if save else inputs[0].new_empty(0, sum(gate_sizes))


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_weights: Sequence[Tensor],
    logits: Tensor,
    saved: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_gate_weights: bool,
    need_gate_biases: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the inputs, weights, biases, gates' weights, and gates' biases (one a weight)."""
    each = logits.split(list(gate_sizes), dim=1)
    need_logits = need_inputs or need_gate_weights or need_gate_biases
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    needs = (need_inputs, need_weights, need_biases, need_logits)
    dx, dw, db, grad_logits = mixture.backward(grad_outputs, inputs, weights, biases, each, saved, *routing, *needs)
    own = (need_gate_weights, need_gate_biases)
    dx, grad_gate_weights, grad_gate_biases = gate_gradients(grad_logits, inputs, gate_weights, dx, *own)
    return dx, dw, db, grad_gate_weights, grad_gate_biases
