"""The mixtures' operators.

The routing travels flat: ``expert_inputs`` as in :class:`mtlkernels.Routing`, ``gate_experts`` the experts of all
gates one after another, ``gate_sizes`` how many belong to each gate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtlkernels._library.definition import define, empty
from mtlkernels.ops._layout import saved_layers

# gated_mixture ------------------------------------------------------------------------------------------------------


def _gated_mixture_forward(
    experts: Tensor, gate_logits: list[Tensor], gate_experts: list[int], gate_sizes: list[int]
) -> list[Tensor]:
    rows, _, features = experts.shape
    return [empty(experts, (rows, features)) for _ in gate_sizes]


def _gated_mixture_backward(
    grad_outputs: list[Tensor],
    experts: Tensor,
    gate_logits: list[Tensor],
    gate_experts: list[int],
    gate_sizes: list[int],
    need_experts: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    grad_experts = [empty(experts, experts.shape)] if need_experts else []
    grad_logits = [empty(logits, logits.shape) for logits in gate_logits] if need_logits else []
    return grad_experts, grad_logits


define(
    "gated_mixture_forward(Tensor experts, Tensor[] gate_logits, int[] gate_experts, int[] gate_sizes) -> Tensor[]",
    _gated_mixture_forward,
    autocast=(0,),
)
define(
    "gated_mixture_backward(Tensor[] grad_outputs, Tensor experts, Tensor[] gate_logits, int[] gate_experts,"
    " int[] gate_sizes, bool need_experts, bool need_logits) -> (Tensor[], Tensor[])",
    _gated_mixture_backward,
)


# expert_mixture -----------------------------------------------------------------------------------------------------
# Weights and biases are lists over layers, then experts: layer l of expert e stands at l * E + e. ``activations`` holds
# a code a layer, see mtlkernels.ops.activations. ``saved`` holds one [E, B, H] tensor a layer: the activation's output
# where its derivative follows from that, otherwise its input; it is empty unless ``save`` asks for it. Of several
# layers the last is not saved on CPUs: the backward pass computes it again, see ``saved_layers``.


def _expert_mixture_forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_logits: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    save: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    rows, num_experts = inputs[0].shape[0], len(expert_inputs)
    widths = [weights[layer * num_experts].shape[0] for layer in range(len(activations))]
    outputs = [empty(inputs[0], (rows, widths[-1])) for _ in gate_sizes]
    kept = widths[: saved_layers(len(widths), inputs[0].device)] if save else []
    saved = [empty(inputs[0], (num_experts, rows, width)) for width in kept]
    return outputs, saved


def _expert_mixture_backward(
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_logits: list[Tensor],
    saved: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    grad_inputs = [empty(x, x.shape) for x in inputs] if need_inputs else []
    grad_weights = [empty(w, w.shape) for w in weights] if need_weights else []
    grad_biases = [empty(w, w.shape[:1]) for w in weights] if need_biases else []
    grad_logits = [empty(logits, logits.shape) for logits in gate_logits] if need_logits else []
    return grad_inputs, grad_weights, grad_biases, grad_logits


define(
    "expert_mixture_forward(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor[] gate_logits,"
    " int[] expert_inputs, int[] gate_experts, int[] gate_sizes, int[] activations, bool save)"
    " -> (Tensor[], Tensor[])",
    _expert_mixture_forward,
    autocast=(0, 1, 2),
)
define(
    "expert_mixture_backward(Tensor[] grad_outputs, Tensor[] inputs, Tensor[] weights, Tensor?[] biases,"
    " Tensor[] gate_logits, Tensor[] saved, int[] expert_inputs, int[] gate_experts, int[] gate_sizes,"
    " int[] activations, bool need_inputs, bool need_weights, bool need_biases, bool need_logits)"
    " -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    _expert_mixture_backward,
)


# expert_level -------------------------------------------------------------------------------------------------------
# An expert_mixture whose logits are linear layers of the inputs, in one operator: gate k reads inputs[k], or the only
# input. ``logits`` [B, sum of the gates' sizes] are kept for the backward pass where ``save`` asks for it, else empty.


def _expert_level_forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_weights: list[Tensor],
    gate_biases: list[Tensor | None],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    save: bool,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    outputs, saved = _expert_mixture_forward(inputs, weights, biases, [], *routing, save)
    return outputs, saved, empty(inputs[0], (inputs[0].shape[0] if save else 0, sum(gate_sizes)))


def _expert_level_backward(
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    gate_weights: list[Tensor],
    logits: Tensor,
    saved: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_gate_weights: bool,
    need_gate_biases: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    needs = (need_inputs, need_weights, need_biases, False)
    found = _expert_mixture_backward(grad_outputs, inputs, weights, biases, [], saved, *routing, *needs)
    grad_weights = [empty(w, w.shape) for w in gate_weights] if need_gate_weights else []
    return *found[:3], grad_weights, [empty(w, w.shape[:1]) for w in gate_weights] if need_gate_biases else []


define(
    "expert_level_forward(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor[] gate_weights,"
    " Tensor?[] gate_biases, int[] expert_inputs, int[] gate_experts, int[] gate_sizes, int[] activations, bool save)"
    " -> (Tensor[] outputs, Tensor[] saved, Tensor logits)",
    _expert_level_forward,
    autocast=(0, 1, 2, 3, 4),
)
define(
    "expert_level_backward(Tensor[] grad_outputs, Tensor[] inputs, Tensor[] weights, Tensor?[] biases,"
    " Tensor[] gate_weights, Tensor logits, Tensor[] saved, int[] expert_inputs, int[] gate_experts, int[] gate_sizes,"
    " int[] activations, bool need_inputs, bool need_weights, bool need_biases, bool need_gate_weights,"
    " bool need_gate_biases) -> (Tensor[] grad_inputs, Tensor[] grad_weights, Tensor[] grad_biases,"
    " Tensor[] grad_gate_weights, Tensor[] grad_gate_biases)",
    _expert_level_backward,
)


# normalized_mixture -------------------------------------------------------------------------------------------------
# A level of experts whose layers have batch norm or layer norm, dropout, or activations with slopes. Lists as of
# expert_mixture, those of scales, shifts and slopes ([H] or [1]) too. A layer's ``norms``: 0 none, 1 batch norm by the
# batch's statistics, 2 layer norm; ``dice_eps`` is that of the activation "dice".
# ``saved`` holds one [E, B, H] tensor a layer: the pre-activation before the norm. ``means`` and ``variances`` (biased)
# have an entry for each layer with a norm: [E, H] of a batch norm, [E, B] of a layer norm, float32 or float64.
# ``seed``, one int64, decides what is dropped, see mtlkernels.ops._random.


def _normalized_mixture_forward(
    inputs: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor | None],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    slopes: list[Tensor | None],
    gate_logits: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    norms: list[int],
    eps: list[float],
    dice_eps: list[float],
    dropout: list[float],
    seed: Tensor | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    outputs, _ = _expert_mixture_forward(inputs, weights, biases, gate_logits, *routing, False)
    rows, num_experts = inputs[0].shape[0], len(expert_inputs)
    widths = [weights[layer * num_experts].shape[0] for layer in range(len(activations))]
    saved = [empty(inputs[0], (num_experts, rows, width)) for width in widths]
    sizes = [
        z.shape[:2] if norm == 2 else (z.shape[0], z.shape[2]) for z, norm in zip(saved, norms, strict=True) if norm
    ]
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    means, variances = ([torch.empty(size, dtype=dtype, device=inputs[0].device) for size in sizes] for _ in range(2))
    return outputs, saved, means, variances


def _normalized_mixture_backward(
    grad_outputs: list[Tensor],
    inputs: list[Tensor],
    weights: list[Tensor],
    scales: list[Tensor | None],
    shifts: list[Tensor | None],
    slopes: list[Tensor | None],
    gate_logits: list[Tensor],
    saved: list[Tensor],
    means: list[Tensor],
    variances: list[Tensor],
    expert_inputs: list[int],
    gate_experts: list[int],
    gate_sizes: list[int],
    activations: list[int],
    norms: list[int],
    eps: list[float],
    dice_eps: list[float],
    dropout: list[float],
    seed: Tensor | None,
    need_inputs: bool,
    need_weights: bool,
    need_biases: bool,
    need_norms: bool,
    need_slopes: bool,
    need_logits: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    routing = (expert_inputs, gate_experts, gate_sizes, activations)
    needs = (need_inputs, need_weights, need_biases, need_logits)
    biases: list[Tensor | None] = [None] * len(weights)
    found = _expert_mixture_backward(grad_outputs, inputs, weights, biases, gate_logits, saved, *routing, *needs)
    grad_scales, grad_shifts, grad_slopes = (
        [empty(part, part.shape) for part in parts if part is not None] if need else []
        for parts, need in ((scales, need_norms), (shifts, need_norms), (slopes, need_slopes))
    )
    return *found[:3], grad_scales, grad_shifts, grad_slopes, found[3]


define(
    "normalized_mixture_forward(Tensor[] inputs, Tensor[] weights, Tensor?[] biases, Tensor?[] scales,"
    " Tensor?[] shifts, Tensor?[] slopes, Tensor[] gate_logits, int[] expert_inputs, int[] gate_experts,"
    " int[] gate_sizes, int[] activations, int[] norms, float[] eps, float[] dice_eps, float[] dropout, Tensor? seed)"
    " -> (Tensor[] outputs, Tensor[] saved, Tensor[] means, Tensor[] variances)",
    _normalized_mixture_forward,
    autocast=(0, 1, 2),
)
define(
    "normalized_mixture_backward(Tensor[] grad_outputs, Tensor[] inputs, Tensor[] weights, Tensor?[] scales,"
    " Tensor?[] shifts, Tensor?[] slopes, Tensor[] gate_logits, Tensor[] saved, Tensor[] means, Tensor[] variances,"
    " int[] expert_inputs, int[] gate_experts, int[] gate_sizes, int[] activations, int[] norms, float[] eps,"
    " float[] dice_eps, float[] dropout, Tensor? seed, bool need_inputs, bool need_weights, bool need_biases,"
    " bool need_norms, bool need_slopes, bool need_logits) -> (Tensor[] grad_inputs, Tensor[] grad_weights,"
    " Tensor[] grad_biases, Tensor[] grad_scales, Tensor[] grad_shifts, Tensor[] grad_slopes, Tensor[] grad_logits)",
    _normalized_mixture_backward,
)
