"""Layers from modules in the order in which they are applied, or from the tensors and functions that stand for them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtlkernels._convert.folding import norm_refusal
from mtlkernels._convert.mlp import Layer, activation_name, name_of, odd_weight, setting_of, slopes_refusal
from mtlkernels._convert.products import Product, function_of
from mtlkernels.ops.activations import WITH_SLOPES

# One module, tensor, function or name of an activation, an nn.Sequential, or a sequence of these.
Chain = Any


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ParameterList, list, tuple)


def flatten(chain: Chain) -> list[Any]:
    """What a chain calls one by one: modules, functions, and a :class:`Product` for weights without a module."""
    if isinstance(chain, nn.Module) and type(chain) not in _CONTAINERS:
        return [chain]
    steps: list[Any] = []
    _collect(chain, steps)
    return steps


def _collect(chain: Chain, steps: list[Any]) -> None:
    kind = type(chain)
    if kind in _CONTAINERS:
        for part in chain._modules.values() if kind in (nn.Sequential, nn.ModuleList) else chain:
            _collect(part, steps)
    elif isinstance(chain, nn.Module):
        steps.append(chain)
    elif isinstance(chain, Tensor):
        last = steps[-1] if steps else None
        if type(last) is Product and last.takes(chain):
            steps[-1] = last.plus(chain)
        else:
            steps.append(Product(chain))
    elif chain is not None:  # an optional module that an instance does not have
        steps.append(function_of(chain))


def read_chain(chain: Chain) -> list[Layer] | str:
    """The layers [Linear → (norm) → (activation) → (Dropout)] of a chain, or what it has instead."""
    layers: list[Layer] = []
    linear = norm = activation = dropout = sloped = None
    for module in flatten(chain):
        kind = type(module)
        if kind is nn.Linear or kind is Product:
            if linear is not None:
                layers.append(Layer(linear, norm, activation or "none", dropout, sloped))
            linear, norm, activation, dropout, sloped = module, None, None, None, None
        elif kind is nn.Identity:
            continue
        elif linear is None:
            return f"{name_of(module)} before the first Linear"
        elif kind is nn.BatchNorm1d or kind is nn.LayerNorm:
            if norm is not None or activation is not None or dropout is not None:
                return f"{kind.__name__} that does not follow a Linear"
            reason = norm_refusal(linear, module)
            if reason is not None:
                return reason
            norm = module
        elif kind is nn.Dropout:
            if dropout is not None:
                return "two dropouts in one layer"
            dropout = module
        else:
            name = activation_name(module)
            if name is None:
                return setting_of(module)
            if activation is not None or dropout is not None:
                return f"{name_of(module)} after another activation or a dropout"
            activation = name
            if name in WITH_SLOPES:
                sloped = module
                reason = slopes_refusal(linear, module)
                if reason is not None:
                    return reason
    if linear is None:
        return "no Linear"
    layers.append(Layer(linear, norm, activation or "none", dropout, sloped))
    return layers


def refusal(chain: Chain) -> str | None:
    """Why the modules of a chain have to be called, None where they need not be."""
    layers = read_chain(chain)
    return layers if isinstance(layers, str) else odd_weight(layers)


def path_of(model: nn.Module, chain: Chain, reason: str = "") -> str:
    """The name in ``model``, in parentheses, of the module because of which a chain is refused, or of its first one.

    Nothing where it has no name.
    """
    modules = flatten(chain)
    # The last of the fewest modules that are refused for this reason.
    ends = (n for n in range(1, len(modules) + 1) if refusal(modules[:n]) == reason)
    culprit = modules[next(ends, 1) - 1] if modules else None
    return next((f" ({name})" for name, module in model.named_modules() if module is culprit), "")
