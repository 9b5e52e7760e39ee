"""Layers of existing models, and what they are now: in training, in evaluation, with batch norm folded into them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels._convert.folding import fold, may_cache, wants_gradient
from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops import activations as act

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


def folds(layer: Layer, few: bool) -> bool:
    """Whether a layer is one linear layer now, its batch norm folded into it if it has any."""
    norm = layer.norm
    return norm is None or not (norm.training or (few and wants_gradient(layer.linear, norm)))


def drops(dropout: Any) -> bool:
    """Whether a dropout, or None, drops anything now."""
    return dropout is not None and dropout.p > 0 and dropout.training


def parameters(layer: Layer, cache: bool) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, its batch norm folded into them."""
    linear, norm, _, _ = layer
    return linear_parameters(linear) if norm is None else fold(linear, norm, cache)


def kind_of(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """What experts must have in common to be evaluated together; a folded layer always has a bias."""
    found = []
    for linear, norm, activation, _ in layers:
        weight, bias = linear_parameters(linear)
        found.append((weight.shape, bias is None and norm is None, activation))
    return tuple(found)


def fusible(layers: Sequence[Layer], few: bool) -> bool:
    """Whether an expert is nothing but linear layers and activations now."""
    return all(folds(layer, few) and not drops(layer.dropout) for layer in layers)


class Experts(NamedTuple):
    """What ``expert_mixture`` takes: weights and biases by layer, then expert, and the layers' activations."""

    weights: Sequence[Sequence[Tensor]]
    biases: Sequence[Sequence[Tensor] | None]
    activation: str | Sequence[str]


def join(experts: Sequence[Sequence[Layer]]) -> Experts:
    """Experts of one kind."""
    cache = may_cache()
    weights: list[Sequence[Tensor]] = []
    biases: list[Any] = []
    for layers in zip(*experts, strict=True):
        pairs = [parameters(layer, cache) for layer in layers]
        weights.append([weight for weight, _ in pairs])
        biases.append(None if pairs[0][1] is None else [bias for _, bias in pairs])
    names = [layer.activation for layer in experts[0]]
    return Experts(weights, biases, names[0] if len(set(names)) == 1 else names)
