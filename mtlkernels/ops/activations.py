"""The activations of expert layers: names, codes and formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The position is the code that operators take; csrc/cpu/simd/activations.h and the Triton kernels use the same numbers.
ACTIVATIONS = ("none", "relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
# Those with a learned slope, one or one a channel.
WITH_SLOPES = ("prelu", "dice")
CODES = {name: code for code, name in enumerate((*ACTIVATIONS, *WITH_SLOPES))}
PRELU, DICE = CODES["prelu"], CODES["dice"]
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


def has_slopes(code: int) -> bool:
    """Whether the activation is one of those with a learned slope."""
    return code >= len(ACTIVATIONS)


def from_input(code: int) -> bool:
    """Whether the derivative needs the activation's input; otherwise it follows from the output."""
    return has_slopes(code) or ACTIVATIONS[code] in ("gelu", "silu")


def activate(code: int, x: Tensor, slopes: Any = None, eps: float = 0.0) -> Tensor:
    """The activation of ``x`` [..., H]; "gelu" is the exact one, "leaky_relu" has slope 0.01, as PyTorch's defaults.

    With ``slopes`` a, which broadcasts with ``x``: "prelu" is max(x, 0) + a min(x, 0), and "dice" is
    x (p + (1 - p) a) with p = sigmoid((x - mean) / sqrt(sum((x - mean)^2 + eps))), mean and sum over the features of a
    row, as torch-rechub defines it (that of Zhou et al., KDD 2018, takes them over the batch).
    """
    if code == PRELU:
        return torch.where(x > 0, x, slopes * x)
    if code == DICE:
        p = torch.sigmoid(_dice_input(x, eps)[0])
        activated: Tensor = x * (p + (1 - p) * slopes)
        return activated
    return _FORWARD[code](x)


def _dice_input(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What "dice" takes the sigmoid of, and the factor of ``x - mean`` in it."""
    distance = x - x.mean(-1, keepdim=True)
    factor = torch.rsqrt((distance.square() + eps).sum(-1, keepdim=True))
    return distance * factor, factor


def gradients_with_slopes(code: int, grad: Tensor, x: Tensor, slopes: Any, eps: float) -> tuple[Tensor, Tensor]:
    """From the gradient of :func:`activate` those of ``x``, and of the slope at each element."""
    if code == PRELU:
        return torch.where(x > 0, grad, slopes * grad), torch.where(x > 0, torch.zeros_like(x), x * grad)
    u, factor = _dice_input(x, eps)
    p = torch.sigmoid(u)
    # u's gradient; u has mean 0 and a fixed length but for eps, so what would change these is taken out.
    w = (grad * x - grad * x * slopes) * p * (1 - p)
    through = factor * (w - w.mean(-1, keepdim=True) - u * (w * u).sum(-1, keepdim=True))
    return grad * (p + (1 - p) * slopes) + through, grad * x * (1 - p)


def gradient(code: int, grad: Tensor, saved: Tensor) -> Tensor:
    """From the gradient of :func:`activate` that of its input.

    Args:
        code: of an activation without slopes.
        grad: the gradient of the output.
        saved: the activation's input where :func:`from_input` says so, otherwise its output.

    What is not finite goes the way that it goes in PyTorch: relu chooses (a NaN or an infinity in ``grad`` stays behind
    where the unit is off, and ``grad`` passes where ``saved`` is NaN), the others multiply.
    """
    name = ACTIVATIONS[code]
    if name == "none":
        return grad
    if name == "relu":
        return torch.where(saved <= 0, 0, grad)
    if name == "leaky_relu":
        return torch.where(saved > 0, grad, grad * LEAKY_SLOPE)
    return grad * _derivative(name, saved)


def _derivative(name: str, saved: Tensor) -> Tensor:
    if name == "gelu":
        cdf = 0.5 * (1 + torch.erf(saved * math.sqrt(0.5)))
        return cdf + saved * torch.exp(-0.5 * saved * saved) / math.sqrt(2 * math.pi)
    if name == "silu":
        s = torch.sigmoid(saved)
        return s * (1 + saved * (1 - s))
    if name == "tanh":
        return 1 - saved * saved
    return saved * (1 - saved)
