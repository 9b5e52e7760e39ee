"""Hard concrete coding variables and their L0 penalty (Louizos et al., ICLR 2018)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _tracing
from mtlkernels.ops._checks import DTYPES, check_dense, shape_of
from mtlkernels.ops._operands import check_memory

# By which share of the stretched interval zeta has to exceed 1.
_FAR_ABOVE = 0.01


def hard_concrete(
    log_alpha: Tensor, noise: Tensor | None = None, *, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1
) -> Tensor:
    """Coding variables z in [0, 1], each exactly 0 or 1 with a probability that ``log_alpha`` sets.

    Equations 10 and 11 of Louizos et al. (ICLR 2018), which SNR (Ma et al., AAAI 2019) takes for its routes: with noise
    u, ``s = sigmoid((log u - log(1 - u) + log_alpha) / beta)``; without, as at test time, ``s = sigmoid(log_alpha)``.
    Then ``z = clamp(s * (zeta - gamma) + gamma, 0, 1)``, whose gradient is zero where the clamp cuts off. Plain PyTorch
    operations: differentiable to any order, in float32 for the narrower dtypes.

    Args:
        log_alpha: any shape; float32, bfloat16, float16 or float64.
        noise: uniform in (0, 1), of the shape and on the device of ``log_alpha``, any of the four dtypes; 0 and 1,
            which rounding can make of it, count as their neighbours.
        beta: the temperature, positive.
        gamma: where the stretched interval begins, negative.
        zeta: where it ends, above 1.

    Returns:
        z, of the shape and dtype of ``log_alpha``.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: ``noise`` has another shape or device, or a parameter is out of range.
    """
    _tracing.quietly(_check_tensor, "log_alpha", log_alpha)
    check_interval(beta, gamma, zeta)
    x = _wide(log_alpha)
    if noise is not None:
        _tracing.quietly(_check_noise, noise, log_alpha)
        u = _wide(noise).to(x.dtype)
        info = torch.finfo(u.dtype)
        drawn = u.clamp(info.tiny, 1 - info.eps / 2).logit()
        x = torch.add(drawn / beta, x, alpha=1 / beta)
    # Where torch.sigmoid's derivative has lost the digits of 1 - s the clamp cuts off, unless zeta is nearly 1.
    s = torch.sigmoid(x) if zeta - 1 > _FAR_ABOVE * (zeta - gamma) else _sigmoid(x)
    return (s * (zeta - gamma) + gamma).clamp(0, 1).to(log_alpha.dtype)


def l0_penalty(log_alpha: Tensor, *, beta: float = 2 / 3, gamma: float = -0.1, zeta: float = 1.1) -> Tensor:
    """The expected number of coding variables that are not zero, ``sum sigmoid(log_alpha - beta log(-gamma / zeta))``.

    Equation 12 of Louizos et al. (ICLR 2018): the penalty on open routes in SNR's loss.

    Args:
        log_alpha: any shape; float32, bfloat16, float16 or float64.
        beta, gamma, zeta: as for :func:`mtlkernels.hard_concrete`.

    Returns:
        A scalar of the dtype of ``log_alpha``, summed in float32 for the narrower dtypes.

    Raises:
        TypeError: an argument is of the wrong kind or dtype.
        ValueError: a parameter is out of range.
    """
    _tracing.quietly(_check_tensor, "log_alpha", log_alpha)
    check_interval(beta, gamma, zeta)
    return _sigmoid(_wide(log_alpha) - beta * math.log(-gamma / zeta)).sum().to(log_alpha.dtype)


def check_interval(beta: Any, gamma: Any, zeta: Any) -> None:
    """The temperature and the stretched interval, which must reach beyond [0, 1] on both sides."""
    for name, value in (("beta", beta), ("gamma", gamma), ("zeta", zeta)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < beta < math.inf:  # comparisons, which torch.compile makes of a number that changes
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not -math.inf < gamma < 0:
        raise ValueError(f"gamma must be negative and finite, got {gamma}")
    if not 1 < zeta < math.inf:
        raise ValueError(f"zeta must be above 1 and finite, got {zeta}")


def _check_noise(noise: Any, log_alpha: Tensor) -> None:
    _check_tensor("noise", noise)
    if noise.shape != log_alpha.shape:
        raise ValueError(f"noise must have the shape of log_alpha, {shape_of(log_alpha)}, got {shape_of(noise)}")
    if noise.device != log_alpha.device:
        raise ValueError(f"noise must be on the device of log_alpha, {log_alpha.device}, got {noise.device}")


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        _tracing.refuse_proxies(name, value)
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    check_dense(name, value)
    check_memory(name, value)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _sigmoid(x: Tensor) -> Tensor:
    """The sigmoid with derivatives that are right on both sides: s * (1 - s) is 0 as soon as s rounds to 1."""
    positive = x >= 0
    e = torch.where(positive, -x, x).exp()
    return torch.where(positive, 1, e) / (1 + e)
