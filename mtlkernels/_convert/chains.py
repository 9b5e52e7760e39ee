"""Layers from modules in the order in which they are applied."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtlkernels._convert.folding import norm_refusal
from mtlkernels._convert.mlp import Layer, activation_name, odd_weight, setting_of, slopes_refusal
from mtlkernels.ops.activations import WITH_SLOPES

# One module, an nn.Sequential, or a sequence of these.
Chain = Any


_CONTAINERS = (nn.Sequential, nn.ModuleList, list, tuple)


def flatten(chain: Chain) -> list[Any]:
    """The modules of a chain one by one."""
    if type(chain) not in _CONTAINERS:
        return [chain]
    modules: list[Any] = []
    for part in chain._modules.values() if isinstance(chain, nn.Module) else chain:
        if type(part) in _CONTAINERS:
            modules += flatten(part)
        else:
            modules.append(part)
    return modules


def read_chain(chain: Chain) -> list[Layer] | str:
    """The layers [Linear → (norm) → (activation) → (Dropout)] of a chain, or what it has instead."""
    layers: list[Layer] = []
    linear = norm = activation = dropout = sloped = None
    for module in flatten(chain):
        kind = type(module)
        if kind is nn.Linear:
            if linear is not None:
                layers.append(Layer(linear, norm, activation or "none", dropout, sloped))
            linear, norm, activation, dropout, sloped = module, None, None, None, None
        elif kind is nn.Identity:
            continue
        elif linear is None:
            return f"{kind.__name__} before the first Linear"
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
                return f"{kind.__name__} after another activation or a dropout"
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
