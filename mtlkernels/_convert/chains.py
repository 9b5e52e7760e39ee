"""Layers from modules in the order in which they are applied."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtlkernels._convert.folding import norm_refusal
from mtlkernels._convert.mlp import Layer, Reason, activation_name, setting_of, slopes_refusal
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
            return Reason(f"{kind.__name__} before the first Linear", module)
        elif kind is nn.BatchNorm1d or kind is nn.LayerNorm:
            if norm is not None or activation is not None or dropout is not None:
                return Reason(f"{kind.__name__} that does not follow a Linear", module)
            reason = norm_refusal(linear, module)
            if reason is not None:
                return Reason(reason, module)
            norm = module
        elif kind is nn.Dropout:
            if dropout is not None:
                return Reason("two dropouts in one layer", module)
            dropout = module
        else:
            name = activation_name(module)
            if name is None:
                return Reason(setting_of(module), module)
            if activation is not None or dropout is not None:
                return Reason(f"{kind.__name__} after another activation or a dropout", module)
            activation = name
            if name in WITH_SLOPES:
                sloped = module
                reason = slopes_refusal(linear, module)
                if reason is not None:
                    return Reason(reason, module)
    if linear is None:
        return "no Linear"
    layers.append(Layer(linear, norm, activation or "none", dropout, sloped))
    return layers


def path_of(model: nn.Module, chain: Chain, reason: str = "") -> str:
    """The name in ``model``, in parentheses, of the module that a reason is about, or of a chain's first one.

    Nothing where it has no name.
    """
    first = reason.module if isinstance(reason, Reason) else next(iter(flatten(chain)), None)
    return next((f" ({name})" for name, module in model.named_modules() if module is first), "")
