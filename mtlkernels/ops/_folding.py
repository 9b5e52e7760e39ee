"""Batch norm in evaluation, folded into the linear layer before it.

With running statistics batch norm is an affine map of each channel, so that ``Linear → BatchNorm1d`` is one linear
layer (Jacob et al., CVPR 2018, section 3.2). Folding is done anew at each call, from what is in memory then: nothing
that writes to a parameter or a statistic need tell anybody. On CPUs the C++ kernels do better where no gradient is
wanted: a scale and a shift behind the product, made of the norm's vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def uses_running(module: Any) -> bool:
    """Whether a norm uses running statistics, as PyTorch decides it."""
    if type(module) is not nn.BatchNorm1d or module.training:
        return False
    return module._buffers.get("running_mean") is not None


def fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the linear layers that ``norm(x weight^T + bias)`` are in evaluation.

    Differentiable, and computed in float32 at least; results have the weights' dtypes. Where nothing is differentiated
    the vectors, of equal length, are put together first, so that a layer of experts takes a few operators instead of a
    few for each. Otherwise each expert keeps its own graph, so that one that no loss reaches gets no gradient.
    """
    gammas, betas = [norm.weight for norm in norms], [norm.bias for norm in norms]
    if _differentiated((*gammas, *betas, *biases)):
        mean, scale = _statistics(norms)
        of_each = zip(weights, biases, gammas, betas, mean.unbind(0), scale.unbind(0), strict=True)
        pairs = [_fold_one(*own) for own in of_each]
        return [weight for weight, _ in pairs], [bias for _, bias in pairs]
    scale, shift = scale_and_shift(biases, norms)
    folded = [(w * s.unsqueeze(1)).to(w.dtype) for w, s in zip(weights, scale.unbind(0), strict=True)]
    return folded, [b.to(w.dtype) for w, b in zip(weights, shift.unbind(0), strict=True)]


def scale_and_shift(biases: Sequence[Tensor | None], norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """``norm(product + bias) = product * scale + shift`` of norms of one width, each [E, H]; float32 at least."""
    mean, scale = _statistics(norms)
    gammas, betas = [norm.weight for norm in norms], [norm.bias for norm in norms]
    if any(gamma is not None for gamma in gammas):
        scale = scale * _stacked(gammas, mean, 1.0)
    shift = -mean * scale if all(bias is None for bias in biases) else (_stacked(biases, mean, 0.0) - mean) * scale
    if any(beta is not None for beta in betas):
        shift = shift + _stacked(betas, mean, 0.0)
    return scale, shift


def _statistics(norms: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Means, and what the norms multiply by on their account."""
    mean, variance = (torch.stack([getattr(norm, part) for norm in norms]) for part in ("running_mean", "running_var"))
    dtype = torch.promote_types(variance.dtype, torch.float32)
    return mean.to(dtype), torch.rsqrt(variance.to(dtype) + norms[0].eps)


def _differentiated(vectors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(vector is not None and vector.requires_grad for vector in vectors)


def _fold_one(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """One expert's; ``scale`` is what the statistics divide by."""
    if gamma is not None:
        scale = scale * gamma
    shift = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        shift = shift + beta
    return (weight * scale.unsqueeze(1)).to(weight.dtype), shift.to(weight.dtype)


def _stacked(vectors: Sequence[Tensor | None], like: Tensor, absent: float) -> Tensor:
    """[E, H]; a constant for those that are None."""
    filled = [like.new_full(like.shape[1:], absent) if vector is None else vector for vector in vectors]
    return torch.stack([vector if vector.dtype == like.dtype else vector.to(like.dtype) for vector in filled])
