"""Which modules, functions and names are an activation that the operators have, and what the others are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels.ops import activations as act

# The operators' name of an activation -> the functions that apply it as it is when called with one tensor.
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "relu": (F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu),
    "leaky_relu": (F.leaky_relu,),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "tanh": (torch.tanh, F.tanh, Tensor.tanh),
    "sigmoid": (torch.sigmoid, F.sigmoid, Tensor.sigmoid),
}
_NAMES: dict[Any, str] = {function: name for name, functions in _FUNCTIONS.items() for function in functions}
_MODULES: dict[type, str] = {
    nn.ReLU: "relu",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.SiLU: "silu",
    nn.Identity: "none",
    nn.PReLU: "prelu",
}
# torch-rechub's, whose gate has statistics of each row; deepctr-torch's fails in its experts, before and after.
_DICE = "torch_rechub.basic.activation.Dice"


def function_of(part: Any) -> Callable[..., Any]:
    """The function that a part of a chain, neither module nor tensor, stands for.

    Raises:
        TypeError: it is neither a name nor callable.
        ValueError: no activation has that name.
    """
    if isinstance(part, str):
        if part not in _FUNCTIONS:
            raise ValueError(f"an activation must be one of {', '.join(_FUNCTIONS)}, or a module, got {part!r}")
        return _FUNCTIONS[part][0]
    if not callable(part):
        kinds = "a module, a tensor, a function or the name of an activation"
        raise TypeError(f"a part of an expert or gate must be {kinds}, got {type(part).__name__}")
    function: Callable[..., Any] = part
    return function


def activation_name(step: Any) -> str | None:
    """The operators' name of an activation, None where they have none."""
    kind = type(step)
    if not issubclass(kind, nn.Module):
        return _NAMES.get(step)
    if kind is nn.GELU and step.approximate == "none":
        return "gelu"
    if kind is nn.LeakyReLU and step.negative_slope == act.LEAKY_SLOPE:
        return "leaky_relu"
    if kind not in _MODULES and full_name(kind) == _DICE and step.epsilon > 0:
        return "dice"
    return _MODULES.get(kind)


def full_name(kind: type) -> str:
    """A class's name with that of its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def name_of(step: Any) -> str:
    """What a reason calls a module or a function: its class, or its own name."""
    return type(step).__name__ if isinstance(step, nn.Module) else getattr(step, "__name__", type(step).__name__)


def setting_of(module: Any) -> str:
    """A module's class and what of its settings keeps it from being fused, in the report's words."""
    kind = type(module)
    if not isinstance(module, nn.Module):
        return name_of(module)
    if kind is nn.LeakyReLU:
        return f"LeakyReLU with slope {module.negative_slope:g}"
    if kind is nn.GELU:
        return f"GELU with approximate={module.approximate!r}"
    if kind.__name__ == "Dice":
        if any(isinstance(part, nn.BatchNorm1d) for part in module.children()):
            return "Dice over the batch"
        return f"Dice with epsilon {module.epsilon:g}" if f"{kind.__module__}.Dice" == _DICE else "Dice"
    if kind.__module__ == nn.ReLU.__module__ and kind is not nn.Softmax and module.extra_repr():
        return f"{kind.__name__} with {module.extra_repr()}"
    return kind.__name__
