"""Expert mixture as PyTorch's own operators and modules, for whoever can see nothing else.

Where ``torch.jit.trace``, ``torch.fx.symbolic_trace``, an ONNX exporter, ``FlopCounterMode`` or forward-mode
differentiation looks on (:func:`mtlkernels._tracing.needs_plain`) a call is this: what it records needs no mtlkernels
where it is loaded. Norms are called as the modules that they are, so that their statistics are theirs to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mtlkernels import _tracing
from mtlkernels.ops import activations as act
from mtlkernels.ops._checks import check_logits, check_routing, numbers_by_layer
from mtlkernels.ops.expert_level.reference import read_by_gates
from mtlkernels.ops.expert_mixture.arguments import Arguments, check_arguments
from mtlkernels.ops.expert_mixture.checks import activation_codes, check_gate_layers
from mtlkernels.ops.expert_mixture.running import check_gate_norms
from mtlkernels.ops.gated_mixture.plain import logits_by_gate, mix
from mtlkernels.ops.normalized_mixture.norms import check_dropout
from mtlkernels.routing import Routing

# Weights, biases and norms; no norms at all, or an entry a gate.
GateLayers = tuple[Sequence[Any], Sequence[Any], Sequence[Any]]


def expert_mixture(
    inputs: Any,
    weights: Any,
    biases: Any,
    routing: Any,
    activation: Any,
    norms: Any,
    dropout: Any,
    slopes: Any,
    dice_eps: Any,
    gate_logits: Any,
    gate_weights: Any,
    gate_biases: Any,
    gate_norms: Any,
) -> tuple[Tensor, ...]:
    """The public function's arguments, in another order, checked where they are tensors and not proxies."""
    parts = (inputs, weights, biases, routing, activation, norms, dropout, slopes, dice_eps)
    if _tracing.holds_proxy((inputs, weights, biases, slopes, gate_logits, gate_weights, gate_biases)):
        return _of_proxies(*parts, gate_logits, gate_weights, gate_biases, gate_norms)
    arguments, gates, logits = _tracing.quietly(_check, parts, gate_logits, gate_weights, gate_biases, gate_norms)
    streams, layers, bias_list, codes, layer_norms, rates, slope_list, epsilons = arguments
    modules = [None if norm is None else norm.modules for norm in layer_norms]
    own = (_by_layer(bias_list, len(layers)), modules, _by_layer(slope_list, len(layers)))
    return _evaluate(streams, layers, *own, gates, logits, routing, codes, rates, epsilons)


def _check(
    parts: tuple[Any, ...], gate_logits: Any, gate_weights: Any, gate_biases: Any, gate_norms: Any
) -> tuple[Arguments, GateLayers | None, list[Tensor]]:
    found = check_arguments(*parts)
    streams, routing = found.streams, parts[3]
    gates = check_gate_layers(gate_logits, gate_weights, gate_biases, streams, routing)
    modules = check_gate_norms(gate_norms, gates, streams[0])
    if gates is not None:
        return found, (*gates, modules), []
    return found, None, check_logits(gate_logits, routing, streams[0].shape[0], streams[0])


def _evaluate(
    streams: Sequence[Any],
    layers: Sequence[Any],
    biases: Sequence[Any],
    norms: Sequence[Any],
    slopes: Sequence[Any],
    gates: GateLayers | None,
    logits: Sequence[Any],
    routing: Routing,
    codes: Sequence[int],
    dropout: Sequence[float],
    dice_eps: Sequence[float],
) -> tuple[Tensor, ...]:
    """The level's K outputs.

    Args:
        streams: the input streams, or the only input.
        layers, biases, norms, slopes: an entry a layer, each with an entry an expert, or None.
        gates: of gates that are linear layers, in the place of ``logits``.
        logits: an entry a gate.
        routing: of all experts; those that no gate mixes are left out.
        codes, dropout, dice_eps: an entry a layer.
    """
    wiring = routing.wiring
    hidden = []
    for e in wiring.live:
        x = streams[routing.expert_inputs[e] if len(streams) > 1 else 0]
        for i, code in enumerate(codes):
            bias, norm, slope = (None if parts[i] is None else parts[i][e] for parts in (biases, norms, slopes))
            x = F.linear(x, layers[i][e], bias)
            x = act.activate(code, x if norm is None else norm(x), slope, dice_eps[i])
            x = F.dropout(x, dropout[i]) if dropout[i] else x
        hidden.append(x)
    if gates is not None:
        read = read_by_gates(streams, len(gates[0]))
        logits = [F.linear(*operands) for operands in zip(read, *gates[:2], strict=True)]
        if gates[2]:
            logits = [z if norm is None else norm(z) for z, norm in zip(logits, gates[2], strict=True)]
    return mix(torch.stack(hidden, dim=1), logits, wiring.gate_experts, wiring.gate_sizes)


def _of_proxies(
    inputs: Any,
    weights: Any,
    biases: Any,
    routing: Any,
    activation: Any,
    norms: Any,
    dropout: Any,
    slopes: Any,
    dice_eps: Any,
    gate_logits: Any,
    gate_weights: Any,
    gate_biases: Any,
    gate_norms: Any,
) -> tuple[Tensor, ...]:
    """Of arguments of which some are proxies, each of which stands for one tensor; nobody can check these."""
    check_routing(routing)
    sizes, count = routing.wiring.gate_sizes, len(weights)
    streams = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    offsets_by_layer, norms_by_layer, slopes_by_layer = (
        [None] * count if parts is None else parts for parts in (biases, norms, slopes)
    )
    gates = None
    if gate_weights is not None:
        offsets = [None] * len(sizes) if gate_biases is None else _by_gate(gate_biases, sizes)
        gates = (_by_gate(gate_weights, sizes), offsets, list(gate_norms or ()))
    logits = [] if gates is not None else logits_by_gate(gate_logits, sizes)
    rates = check_dropout(dropout, count)
    epsilons = numbers_by_layer("dice_eps", "number", dice_eps, count)
    codes = activation_codes(activation, count)
    own = (offsets_by_layer, norms_by_layer, slopes_by_layer)
    return _evaluate(streams, weights, *own, gates, logits, routing, codes, rates, epsilons)


def _by_layer(tensors: Sequence[Any], layers: int) -> list[Sequence[Any]]:
    """An entry a layer of a list over layers, then experts."""
    experts = len(tensors) // layers
    return [tensors[at : at + experts] for at in range(0, len(tensors), experts)]


def _by_gate(value: Any, sizes: Sequence[int]) -> list[Any]:
    """An entry a gate, from a sequence or from one tensor in which the gates' rows follow each other."""
    if isinstance(value, (list, tuple, torch.nn.ParameterList)):
        return list(value)
    return [value[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
