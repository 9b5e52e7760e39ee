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

from mtlkernels import _tracing


def uses_running(module: Any) -> bool:
    """Whether a norm uses running statistics, as PyTorch decides it."""
    if type(module) is not nn.BatchNorm1d or module.training:
        return False
    return module._buffers.get("running_mean") is not None


def fold(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: Sequence[Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of the linear layers that ``norm(x weight^T + bias)`` are in evaluation.

    Differentiable, and computed in float32 at least; results have the weights' dtypes. The norms' vectors, of equal
    length, are put together first, so that a layer of experts takes a few operators instead of a few for each. In
    eager PyTorch, vectors of a layer whose result nobody uses keep no gradient, as if it had been folded by itself.
    """
    mean, variance = (torch.stack([getattr(norm, part) for norm in norms]) for part in ("running_mean", "running_var"))
    dtype = torch.promote_types(variance.dtype, torch.float32)
    inverse = torch.rsqrt(variance.to(dtype) + norms[0].eps)
    vectors = ([norm.weight for norm in norms], biases, [norm.bias for norm in norms])
    if len(norms) == 1 or _tracing.observed() or not torch.is_grad_enabled() or inverse.requires_grad:
        scale, shift = _scale_and_shift(mean, inverse, *vectors)
        scales, shifts = scale.unbind(0), shift.unbind(0)
    else:
        both = _ScalesAndShifts.apply(mean, inverse, *(vector for part in vectors for vector in part))
        scales, shifts = both[: len(norms)], both[len(norms) :]
    folded = [(w * s.unsqueeze(1)).to(w.dtype) for w, s in zip(weights, scales, strict=True)]
    return folded, [b.to(w.dtype) for w, b in zip(weights, shifts, strict=True)]


def _scale_and_shift(
    mean: Tensor,
    inverse: Tensor,
    gammas: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    betas: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor]:
    """What norms of these means and inverse deviations, [E, H], make of a product without a bias, both [E, H]."""
    scale = inverse
    if any(gamma is not None for gamma in gammas):
        scale = scale * _stacked(gammas, mean, 1.0)
    shift = -mean * scale if all(bias is None for bias in biases) else (_stacked(biases, mean, 0.0) - mean) * scale
    if any(beta is not None for beta in betas):
        shift = shift + _stacked(betas, mean, 0.0)
    return scale, shift


class _ScalesAndShifts(torch.autograd.Function):
    """``apply(mean, inverse, *gammas, *biases, *betas)`` -> E scales [H], then E shifts."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, inverse: Tensor, *vectors: Tensor | None) -> Any:
        count = len(mean)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(mean, inverse, *vectors)
        parts = (vectors[i : i + count] for i in range(0, 3 * count, count))
        return tuple(row for stacked in _scale_and_shift(mean, inverse, *parts) for row in stacked.unbind(0))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        mean, inverse, *vectors = ctx.saved_tensors
        count = len(mean)
        used = [e for e in range(count) if grads[e] is not None or grads[count + e] is not None]
        found: list[Any] = [None] * len(vectors)
        if used:
            mean, inverse = mean[used], inverse[used]
            gammas, biases = (_stacked([vectors[at + e] for e in used], mean, c) for at, c in ((0, 1.0), (count, 0.0)))
            by_scale, by_shift = (_stacked([grads[at + e] for e in used], inverse, 0.0) for at in (0, count))
            parts = ((by_scale + by_shift * (biases - mean)) * inverse, by_shift * inverse * gammas, by_shift)
            for at, part in zip(range(0, len(vectors), count), parts, strict=True):
                for e, grad in zip(used, part.unbind(0), strict=True):
                    vector = vectors[at + e]
                    found[at + e] = None if vector is None else grad.to(vector.dtype)
        return (None, None, *found)


def _stacked(vectors: Sequence[Tensor | None], like: Tensor, absent: float) -> Tensor:
    """[E, H]; a constant for those that are None."""
    return torch.stack([like.new_full(like.shape[1:], absent) if vector is None else vector for vector in vectors])
