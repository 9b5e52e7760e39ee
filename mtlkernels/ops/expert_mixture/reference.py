"""Expert mixture in PyTorch: the specification that every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels.ops import activations as act
from mtlkernels.ops._layout import saved_layers
from mtlkernels.ops.gated_mixture import reference as mixture


def forward(
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    save: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Every expert is an MLP, ``x <- activation(x W^T + b)`` a layer; every gate mixes the experts that it sees.

    Returns the K outputs [B, H_L] and, with ``save``, one [E, B, H] tensor for each of the ``saved_layers``, for
    :func:`backward`.
    """
    num_experts = len(expert_inputs)
    kept = saved_layers(len(activations), inputs[0].device) if save else 0
    hidden = [inputs[stream] for stream in expert_inputs]
    saved = []
    for layer, code in enumerate(activations):
        at = layer * num_experts
        before = [F.linear(hidden[e], weights[at + e], biases[at + e]) for e in range(num_experts)]
        hidden = [act.activate(code, x) for x in before]
        if layer < kept:
            saved.append(torch.stack(before if act.from_input(code) else hidden))
    outputs = mixture.forward(torch.stack(hidden, dim=1), gate_logits, gate_experts, gate_sizes)
    return outputs, saved


def backward(
    grad_outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    gate_logits: Sequence[Tensor],
    saved: Sequence[Tensor],
    expert_inputs: Sequence[int],
    gate_experts: Sequence[int],
    gate_sizes: Sequence[int],
    activations: Sequence[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the inputs, weights, biases (one a weight, whether there is a bias or not) and logits."""
    num_experts, num_layers = len(expert_inputs), len(activations)
    saved = list(saved)
    after: list[Tensor] = []
    for layer, code in enumerate(activations):
        if layer == len(saved):  # not saved
            at = layer * num_experts
            before = torch.stack([F.linear(after[-1][e], weights[at + e], biases[at + e]) for e in range(num_experts)])
            saved.append(before if act.from_input(code) else act.activate(code, before))
        after.append(act.activate(code, saved[layer]) if act.from_input(code) else saved[layer])
    grad_experts, grad_logits = mixture.backward(
        grad_outputs, after[-1].transpose(0, 1), gate_logits, gate_experts, gate_sizes, True, need_logits
    )
    grad_inputs = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in inputs]
    grad_weights = [torch.empty(0)] * len(weights)
    grad_biases = [torch.empty(0)] * len(weights)
    for e, stream in enumerate(expert_inputs):
        grad = grad_experts[0][:, e]
        for layer in reversed(range(num_layers)):
            at = layer * num_experts + e
            grad = act.gradient(activations[layer], grad, saved[layer][e])
            below = after[layer - 1][e] if layer else inputs[stream]
            if need_weights:
                grad_weights[at] = grad.t() @ below
            if need_biases:
                grad_biases[at] = grad.sum(0)
            if layer or need_inputs:
                grad = grad @ weights[at]
        if need_inputs:
            grad_inputs[stream] += grad
    return (
        grad_inputs if need_inputs else [],
        grad_weights if need_weights else [],
        grad_biases if need_biases else [],
        grad_logits,
    )
