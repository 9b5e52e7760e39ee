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
from mtlkernels.ops._checks import check_routing, numbers_by_layer
from mtlkernels.ops.gated_mixture.plain import logits_by_gate, mix_each
from mtlkernels.ops.level.checks import activation_codes, check_arguments
from mtlkernels.ops.level.norms import check_dropout
from mtlkernels.routing import Routing


def expert_mixture(*arguments: Any) -> tuple[Tensor, ...]:
    """The public function's arguments, checked where they are tensors and not proxies."""
    inputs, weights, biases, gate_logits, routing, activation, gate_weights, gate_biases, gate_norms, *rest = arguments
    norms, dropout, slopes, dice_eps = rest
    if not _tracing.holds_proxy(arguments):
        found = _tracing.quietly(check_arguments, *arguments)
        count = len(found.layers)
        modules = [None if norm is None else norm.modules for norm in found.norms]
        of_layers: Any = (_by_layer(found.biases, count), modules, _by_layer(found.slopes, count))
        gates: Any = (found.gates, found.logits, routing, found.codes, found.dropout, found.dice_eps)
        return _evaluate(found.streams, found.layers, *of_layers, *gates)
    # Of proxies, each of which stands for one tensor, nobody can check anything.
    check_routing(routing)
    sizes, count = routing.wiring.gate_sizes, len(weights)
    streams = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    offsets_by_layer, norms_by_layer, slopes_by_layer = (
        [None] * count if parts is None else parts for parts in (biases, norms, slopes)
    )
    by_layer = (offsets_by_layer, norms_by_layer, slopes_by_layer)
    layers = None
    if gate_weights is not None:
        offsets = [None] * len(sizes) if gate_biases is None else _by_gate(gate_biases, sizes)
        layers = (_by_gate(gate_weights, sizes), offsets, list(gate_norms or ()))
    logits = [] if layers is not None else logits_by_gate(gate_logits, sizes)
    rates, epsilons = check_dropout(dropout, count), numbers_by_layer("dice_eps", "number", dice_eps, count)
    codes = activation_codes(activation, count)
    return _evaluate(streams, weights, *by_layer, layers, logits, routing, codes, rates, epsilons)


def _evaluate(
    streams: Sequence[Any],
    layers: Sequence[Any],
    biases: Sequence[Any],
    norms: Sequence[Any],
    slopes: Sequence[Any],
    gates: tuple[Sequence[Any], Sequence[Any], Sequence[Any]] | None,
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
        gates: weights, biases, and norms or none at all, of gates that are linear layers, in the place of ``logits``.
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
        read = streams if len(streams) > 1 else [streams[0]] * len(gates[0])
        logits = [F.linear(*operands) for operands in zip(read, *gates[:2], strict=False)]
        if gates[2]:
            logits = [z if norm is None else norm(z) for z, norm in zip(logits, gates[2], strict=True)]
    return mix_each(hidden, logits, wiring.gate_experts, wiring.gate_sizes)


def _by_layer(tensors: Sequence[Any], layers: int) -> list[Sequence[Any]]:
    """An entry a layer of a list over layers, then experts."""
    experts = len(tensors) // layers
    return [tensors[at : at + experts] for at in range(0, len(tensors), experts)]


def _by_gate(value: Any, sizes: Sequence[int]) -> list[Any]:
    """An entry a gate, from a sequence or from one tensor in which the gates' rows follow each other."""
    if isinstance(value, (list, tuple, torch.nn.ParameterList)):
        return list(value)
    return [value[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(len(sizes))]
