"""Which batch norms of an existing model can be folded into the linear layer before them, and their folding."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops import _folding
from mtlkernels.ops._folding import forget, may_cache

__all__ = ["fold", "forget", "may_cache", "norm_refusal", "wants_gradient"]


def norm_refusal(linear: Any, norm: Any) -> str | None:
    """Why a batch norm after a linear layer cannot be folded in any mode."""
    if type(norm) is not nn.BatchNorm1d:
        return f"{type(norm).__name__} in the place of BatchNorm1d"
    mean = norm._buffers.get("running_mean")
    if mean is None or norm._buffers.get("running_var") is None:
        return "batch norm by the batch's statistics in evaluation too (track_running_stats=False)"
    weight, _ = linear_parameters(linear)
    if mean.shape[0] != weight.shape[0]:
        return f"batch norm of {mean.shape[0]} features after a layer of {weight.shape[0]}"
    return None


def wants_gradient(linear: nn.Module, norm: Any) -> bool:
    """Whether a tensor that would be folded requires a gradient."""
    return _folding.wants_gradient(*linear_parameters(linear), norm)


def fold(linear: nn.Module, norm: Any, cache: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that ``norm(linear(x))`` is in evaluation."""
    return _folding.fold(*linear_parameters(linear), norm, cache)
