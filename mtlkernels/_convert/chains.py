"""Layers and gates from modules in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from mtlkernels._convert.folding import norm_refusal
from mtlkernels._convert.mlp import Gate, Layer, activation_name

# One module, an nn.Sequential, or a sequence of these.
Chain = Any


def flatten(chain: Chain) -> Iterator[Any]:
    """The modules of a chain one by one."""
    if type(chain) in (nn.Sequential, nn.ModuleList):
        for part in chain._modules.values():
            yield from flatten(part)
    elif isinstance(chain, (list, tuple)):
        for part in chain:
            yield from flatten(part)
    else:
        yield chain


def read_chain(chain: Chain) -> list[Layer] | str:
    """The layers [Linear → (BatchNorm1d) → (activation) → (Dropout)] of a chain, or what it has instead."""
    layers: list[Layer] = []
    for module in flatten(chain):
        if type(module) is nn.Linear:
            layers.append(Layer(module, None, "none", None))
            continue
        name = activation_name(module)
        if name == "none":
            continue
        found = _extended(layers[-1], module, name) if layers else f"{type(module).__name__} before the first Linear"
        if isinstance(found, str):
            return found
        layers[-1] = found
    return layers or "no Linear"


def _extended(layer: Layer, module: Any, activation: str | None) -> Layer | str:
    """A layer with one module more behind it, or why that is none of what may follow."""
    kind = type(module).__name__
    if activation is not None:
        free = layer.activation == "none" and layer.dropout is None
        return layer._replace(activation=activation) if free else f"{kind} after another activation or a dropout"
    if type(module) is nn.Dropout:
        return layer._replace(dropout=module) if layer.dropout is None else "two dropouts in one layer"
    if type(module) is nn.BatchNorm1d:
        if layer.norm is not None or layer.activation != "none" or layer.dropout is not None:
            return "batch norm that does not follow a Linear"
        return norm_refusal(layer.linear, module) or layer._replace(norm=module)
    return kind


def read_gate(chain: Chain) -> Gate | str:
    """A gate from a chain that ends with its logits, or with their softmax and perhaps a dropout; or what it has."""
    modules = list(flatten(chain))
    dropout = modules.pop() if modules and type(modules[-1]) is nn.Dropout else None
    if modules and type(modules[-1]) is nn.Softmax and modules[-1].dim in (1, -1):
        modules.pop()
    layers = read_chain(modules if dropout is None else [*modules, dropout])
    if isinstance(layers, str):
        return layers
    if layers[-1].activation != "none":
        return f"activation {layers[-1].activation} on logits"
    return Gate(layers[:-1], layers[-1])


def path_of(model: nn.Module, chain: Chain) -> str:
    """The name in ``model`` of a chain's first module, in parentheses; nothing where it has none."""
    first = next(flatten(chain), None)
    return next((f" ({name})" for name, module in model.named_modules() if module is first), "")
