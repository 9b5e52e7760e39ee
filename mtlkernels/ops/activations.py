"""The activations of expert layers: names, codes and formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# The position is the code that operators take; csrc/cpu/activations.h and the Triton kernels use the same numbers.
ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
LEAKY_SLOPE = 0.01

_FORWARD: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x,
    F.relu,
    lambda x: F.leaky_relu(x, LEAKY_SLOPE),
    F.gelu,
    F.silu,
    torch.tanh,
    torch.sigmoid,
)


def from_input(code: int) -> bool:
    """Whether the derivative needs the activation's input; otherwise it follows from the output."""
    return ACTIVATIONS[code] in ("gelu", "silu")


def activate(code: int, x: Tensor) -> Tensor:
    """The activation of ``x``; "gelu" is the exact one, "leaky_relu" has slope 0.01, as PyTorch's defaults."""
    return _FORWARD[code](x)


def derivative(code: int, saved: Tensor) -> Tensor:
    """The derivative, from the activation's input where :func:`from_input` says so, otherwise from its output."""
    name = ACTIVATIONS[code]
    if name == "none":
        return torch.ones_like(saved)
    if name == "relu":
        return (saved > 0).to(saved.dtype)
    if name == "leaky_relu":
        return torch.where(saved > 0, torch.ones_like(saved), LEAKY_SLOPE)
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(saved * math.sqrt(0.5)))
        return cdf + saved * torch.exp(-0.5 * saved * saved) / math.sqrt(2 * math.pi)
    if name == "silu":
        s = torch.sigmoid(saved)
        return s * (1 + saved * (1 - s))
    if name == "tanh":
        return 1 - saved * saved
    return saved * (1 - saved)
