"""Layers from modules in the order in which they are applied, or from the tensors and functions that stand for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _torch
from mtlkernels._convert.activations import activation_name, function_of, name_of, setting_of
from mtlkernels._convert.classes import is_torchs
from mtlkernels.ops._fusing import Layer, linear_parameters, norm_refusal, slopes_refusal, weight_refusal
from mtlkernels.ops.activations import WITH_SLOPES

# One module, tensor, function or name of an activation, an nn.Sequential or what calls its parts as that does, or a
# sequence of these.
Chain = Any

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ParameterList, list, tuple)


class Product:
    """``x @ matrix + bias`` by tensors that no module holds; weight and bias are where ``nn.Linear`` has them.

    Args:
        matrix: [D, H], as ``x @ matrix`` has it: the transpose of an ``nn.Linear``'s weight.
        bias: [H] or None.
    """

    __slots__ = ("_parameters",)

    def __init__(self, matrix: Tensor, bias: Tensor | None = None) -> None:
        if matrix.dim() != 2:
            raise ValueError(f"a tensor in an expert or gate must be a matrix [D, H], got shape {list(matrix.shape)}")
        self._parameters = {"weight": matrix.t(), "bias": bias}

    def plus(self, tensor: Tensor) -> Product | None:
        """The same with a bias, None where a tensor behind it is not one: [H], or [1, H] where that is no matrix."""
        weight, bias = linear_parameters(self)
        may_be_row = tensor.shape == (1, len(weight)) and len(weight) > 1
        if bias is not None or not (tensor.dim() == 1 or may_be_row):
            return None
        return Product(weight.t(), tensor if tensor.dim() == 1 else tensor.squeeze(0))

    def parameters(self) -> list[Tensor]:
        """As a module's."""
        return [tensor for tensor in linear_parameters(self) if tensor is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, D] → [B, H]."""
        return F.linear(x, *linear_parameters(self))


def flatten(chain: Chain) -> list[Any]:
    """What a chain calls one by one: modules, functions, and a :class:`Product` for weights without a module."""
    class_of = _torch.class_teller()
    if isinstance(chain, nn.Module) and not _is_container(class_of(chain)):
        return [chain]
    steps: list[Any] = []
    _collect(chain, steps, class_of)
    return steps


def _is_container(kind: type) -> bool:
    """Whether a chain goes on inside: also in a class of somebody's that calls its parts as nn.Sequential does."""
    if kind in _CONTAINERS or not issubclass(kind, nn.Sequential):
        return kind in _CONTAINERS
    return kind.forward is nn.Sequential.forward and kind.__call__ is nn.Sequential.__call__


def _collect(chain: Chain, steps: list[Any], class_of: Callable[[Any], Any]) -> None:
    kind = class_of(chain)
    if _is_container(kind):
        for part in chain._modules.values() if issubclass(kind, (nn.Sequential, nn.ModuleList)) else chain:
            _collect(part, steps, class_of)
    elif isinstance(chain, nn.Module):
        steps.append(chain)
    elif isinstance(chain, Tensor):
        with_bias = steps[-1].plus(chain) if steps and type(steps[-1]) is Product else None
        if with_bias is None:
            steps.append(Product(chain))
        else:
            steps[-1] = with_bias
    elif chain is not None:  # an optional module that an instance does not have
        steps.append(function_of(chain))


def leaves(*modules: Any) -> list[Any]:
    """The modules in lists of them, which may lie in one another; what is no list stands for itself."""
    return _leaves(modules, _torch.class_teller())


def _leaves(modules: Iterable[Any], class_of: Callable[[Any], Any]) -> list[Any]:
    inner: list[Any] = []
    for module in modules:
        is_list = class_of(module) in (nn.ModuleList, nn.ModuleDict)
        inner += _leaves(module._modules.values(), class_of) if is_list else [module]
    return inner


def chains_of(is_mlp: Callable[[type], bool], *modules: Any) -> list[Chain]:
    """Of the modules in lists, the chain that an MLP of a library holds as ``mlp``.

    Anything else stands for itself, and is refused by its name.
    """
    class_of = _torch.class_teller()
    return [m._modules["mlp"] if is_mlp(class_of(m)) else m for m in _leaves(modules, class_of)]


def run_chain(chain: Chain, x: Tensor) -> Tensor:
    """What a chain makes of its input."""
    for step in flatten(chain):
        x = step(x)
    return x


def read_chain(chain: Chain) -> list[Layer] | str:
    """The layers [Linear → (norm) → (activation) → (Dropout)] of a chain, or what it has instead."""
    layers: list[Layer] = []
    pair = norm = activation = dropout = sloped = None
    for module in _torch.all_unproxied(flatten(chain)):
        kind = type(module)
        if kind is nn.Linear or kind is Product:
            if pair is not None:
                layers.append(Layer(*pair, norm, activation or "none", dropout, sloped))
            norm = activation = dropout = sloped = None
            pair = linear_parameters(module)
        elif kind is nn.Identity:
            continue
        elif pair is None:
            own = isinstance(module, nn.Module) and not is_torchs(kind)
            return f"{name_of(module)}{', whose forward is not known' if own else ' before the first Linear'}"
        elif kind is nn.BatchNorm1d or kind is nn.LayerNorm:
            if norm is not None or activation is not None or dropout is not None:
                return f"{kind.__name__} that does not follow a Linear"
            reason = norm_refusal(pair[0], module)
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
                reason = slopes_refusal(pair[0], module)
                if reason is not None:
                    return reason
    if pair is None:
        return "no Linear"
    layers.append(Layer(*pair, norm, activation or "none", dropout, sloped))
    return layers


def refusal(chain: Chain) -> str | None:
    """Why the modules of a chain have to be called, None where they need not be."""
    layers = read_chain(chain)
    return layers if isinstance(layers, str) else weight_refusal(layers)


def path_of(model: nn.Module, chain: Chain, reason: str = "") -> str:
    """The name in ``model``, in parentheses, of the module because of which a chain is refused, or of its first one.

    Nothing where it has no name.
    """
    modules = flatten(chain)
    # The last of the fewest modules that are refused for this reason.
    ends = (n for n in range(1, len(modules) + 1) if refusal(modules[:n]) == reason)
    culprit = modules[next(ends, 1) - 1] if modules else None
    return next((f" ({name})" for name, module in model.named_modules() if module is culprit), "")
