"""Experts and gates of existing models as layers, and one fused call for a level of them.

All is read at each call, so that weights are never stale, and so that whatever is done to the modules later (training
of batch norm or dropout, an exchanged layer) is seen; then the library's own code runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels._convert.folding import fold, may_cache, wants_gradient
from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops import activations as act
from mtlkernels.ops.expert_mixture import expert_mixture
from mtlkernels.routing import Routing

ACTIVATIONS: dict[type, str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.Identity: "none",
}


# Measured with experts of (256, 128): on fewer rows than this, folding takes as long as the library's own evaluation.
FOLD_ROWS = 128


class Layer(NamedTuple):
    """``dropout(activation(norm(linear(x))))``."""

    linear: Any
    norm: Any
    activation: str
    dropout: Any


class Gate(NamedTuple):
    """Logits as a linear function of the last of some hidden layers, or of the input.

    ``hidden`` is None where the module ``run`` has to be called in their place; ``final`` likewise, and then ``run``
    is the whole gate.
    """

    hidden: Sequence[Layer] | None
    final: Layer | None
    run: Any = None


def activation_name(module: Any) -> str | None:
    """The operators' name of an activation, None where they have none."""
    name = ACTIVATIONS.get(type(module))
    if name is not None:
        return name
    if type(module) is nn.GELU and module.approximate == "none":
        return "gelu"
    if type(module) is nn.LeakyReLU and module.negative_slope == act.LEAKY_SLOPE:
        return "leaky_relu"
    return None


def few_rows(x: Tensor) -> bool:
    """Whether folding batch norm in a way that gradients flow through takes longer than what fusing saves.

    Then nothing that is folded is kept, and autograd follows it: work in proportion to the weights, at each call.
    """
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.shape[0] < FOLD_ROWS


def obstacle(layers: Iterable[Layer], few: bool) -> str | None:
    """Why layers that can be fused are not now: their mode, or ``few`` rows, as :func:`few_rows` says."""
    for linear, norm, _, dropout in layers:
        if norm is not None:
            if norm.training:
                return "batch norm in training"
            if few and wants_gradient(linear, norm):
                return "batch norm with gradients for few rows"
        if dropout is not None and dropout.p > 0 and dropout.training:
            return "dropout"
    return None


def parameters(layer: Layer, cache: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, its batch norm folded into them."""
    linear, norm, _, _ = layer
    return linear_parameters(linear) if norm is None else fold(linear, norm, cache)


def describe(experts: Sequence[Any], gates: Sequence[Sequence[Layer]]) -> str:
    """The report's words for a level that is replaced; of a gate, the layers that decide when it is not fused."""
    depth = "1 layer" if len(experts[0]) == 1 else f"{len(experts[0])} layers"
    detail = f"{len(experts)} experts of {depth} and {len(gates)} gates in one expert_mixture"
    layers = [layer for part in (*experts, *gates) for layer in part]
    rate = max((layer.dropout.p for layer in layers if layer.dropout is not None), default=0)
    reasons = ["batch norm"] if any(layer.norm is not None for layer in layers) else []
    reasons += [f"dropout {rate}"] if rate > 0 else []
    return detail + (f"; in training as before, because of {' and '.join(reasons)}" if reasons else "")


class Experts(NamedTuple):
    """What ``expert_mixture`` takes: weights and biases by layer, then expert, and the layers' activations."""

    weights: Sequence[Sequence[Tensor]]
    biases: Any
    activations: Sequence[str]


def read_experts(experts: Iterable[Sequence[Layer] | str], few: bool) -> Experts | str:
    """The experts of a level, or why they cannot be fused now; an expert that is a string is such a reason."""
    cache = may_cache()
    weights, biases, kinds, names = [], [], [], []
    for layers in experts:
        reason = layers if isinstance(layers, str) else obstacle(layers, few)
        if reason is not None:
            return reason
        pairs = [parameters(layer, cache) for layer in layers]  # type: ignore[arg-type]
        weights.append([weight for weight, _ in pairs])
        biases.append([bias for _, bias in pairs])
        kinds.append([(weight.shape, bias is None) for weight, bias in pairs])
        names.append([layer[2] for layer in layers])
    if kinds.count(kinds[0]) != len(kinds):
        return "experts of unequal shape"
    if names.count(names[0]) != len(names):
        return "experts of unequal activations"
    return Experts(list(zip(*weights, strict=True)), list(zip(*biases, strict=True)), names[0])


def mix(inputs: Sequence[Tensor], experts: Experts, gates: Sequence[Gate], routing: Routing) -> tuple[Tensor, ...]:
    """The level's K outputs. Gate k reads ``inputs[k]``, or the only one; inputs that no expert reads come last."""
    weights, biases, names = experts
    activation = names[0] if len(set(names)) == 1 else names
    single = all(x is inputs[0] for x in inputs)
    streams = inputs[0] if single else list(inputs[: routing.num_inputs])
    cache = may_cache()
    every = single or len(inputs) == routing.num_inputs
    if every and all(gate.hidden is not None and not gate.hidden and gate.final is not None for gate in gates):
        pairs = [parameters(gate.final, cache) for gate in gates]  # type: ignore[arg-type]
        gate_weights, gate_biases = zip(*pairs, strict=True)
        linear = {"gate_weights": gate_weights, "gate_biases": gate_biases}
        return expert_mixture(streams, weights, biases, None, routing, activation=activation, **linear)
    read = inputs if len(inputs) > 1 else list(inputs) * len(gates)
    logits = [_logits(gate, x, cache) for gate, x in zip(gates, read, strict=False)]
    return expert_mixture(streams, weights, biases, logits, routing, activation=activation)


def _logits(gate: Gate, x: Tensor, cache: bool) -> Tensor:
    """The logits of one gate, without the cost of calling modules where nothing listens to the calls."""
    if gate.hidden is None:
        x = gate.run(x)
    else:
        for layer in gate.hidden:
            x = act.activate(act.CODES[layer.activation], F.linear(x, *parameters(layer, cache)))
    return x if gate.final is None else F.linear(x, *parameters(gate.final, cache))
