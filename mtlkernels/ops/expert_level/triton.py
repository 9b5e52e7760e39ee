"""Expert level on NVIDIA GPUs: the launches of an expert mixture, whose grids have further programs for the gates.

The logits are computed beside the experts' first layer; where that is the one that mixes, by a launch in front of it.
Backward, the gates are one more term of the inputs' gradients, and their weights one more layer of all weights'.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mtlkernels.ops._triton import contiguous
from mtlkernels.ops.expert_mixture import triton as mixture
from mtlkernels.ops.expert_mixture.triton_gates import GateGradients, GateLayers


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
    """As the reference: outputs, what is saved, and, with ``save``, the logits in one tensor."""
    inputs, gate_weights = contiguous(inputs), contiguous(gate_weights)
    offsets = [None if bias is None else bias.contiguous() for bias in gate_biases]
    logits = inputs[0].new_empty((inputs[0].shape[0], sum(gate_sizes)))
    gates = GateLayers(inputs, gate_weights, offsets, logits)
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    outputs, saved = mixture.forward(inputs, weights, biases, gates.each(), *routing, save, gates)
    return outputs, saved, logits if save else logits.new_empty((0, logits.shape[1]))


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
    """As the reference: gradients of the inputs, weights, biases, gates' weights and gates' biases (one a weight)."""
    inputs, gate_weights = contiguous(inputs), contiguous(gate_weights)
    layers = GateLayers(inputs, gate_weights, [], logits)
    gates = GateGradients.of(layers, need_gate_weights, need_gate_biases)
    need_logits = need_inputs or need_gate_weights or need_gate_biases
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    needs = (need_inputs, need_weights, need_biases, need_logits)
    operands = (grad_outputs, inputs, weights, biases, layers.each(), saved)
    grad_inputs, grad_weights, grad_biases, _ = mixture.backward(*operands, *routing, *needs, gates)
    return grad_inputs, grad_weights, grad_biases, gates.weights, gates.biases
