"""Layers without modules: weights that are tensors of their own, and activations that are functions or names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The operators' name of an activation -> the functions that apply it as it is when called with one tensor.
_FUNCTIONS: dict[str, tuple[Callable[..., Tensor], ...]] = {
    "relu": (F.relu, torch.relu, F.relu_, torch.relu_, Tensor.relu),
    "leaky_relu": (F.leaky_relu,),
    "gelu": (F.gelu,),
    "silu": (F.silu,),
    "tanh": (torch.tanh, F.tanh, Tensor.tanh),
    "sigmoid": (torch.sigmoid, F.sigmoid, Tensor.sigmoid),
}
_NAMES = {function: name for name, functions in _FUNCTIONS.items() for function in functions}


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
    found: Callable[..., Any] = part
    return found


def function_name(function: Any) -> str | None:
    """The operators' name of an activation that is a function, None for any other."""
    return _NAMES.get(function)


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

    @property
    def weight(self) -> Tensor:
        """[H, D]."""
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def lies_across(self) -> bool:
        """Whether kernels, which read a weight along its rows, have to copy it first."""
        return self.weight.stride(1) != 1 and self.weight.shape[1] > 1

    def takes(self, tensor: Tensor) -> bool:
        """Whether a tensor behind it can only be its bias: [H], or [1, H] where that cannot be another matrix."""
        if self._parameters["bias"] is not None:
            return False
        width = self.weight.shape[0]
        return tensor.dim() == 1 or (tensor.shape == (1, width) and width > 1)

    def plus(self, bias: Tensor) -> Product:
        """The same with a bias."""
        return Product(self.weight.t(), bias if bias.dim() == 1 else bias.squeeze(0))

    def parameters(self) -> list[Tensor]:
        """As a module's."""
        return [tensor for tensor in self._parameters.values() if tensor is not None]

    def __call__(self, x: Tensor) -> Tensor:
        """[B, D] → [B, H]."""
        return F.linear(x, self.weight, self._parameters["bias"])
