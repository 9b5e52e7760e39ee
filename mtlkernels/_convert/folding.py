"""Norms of an existing model that follow linear layers."""

from __future__ import annotations

from typing import Any

from torch import nn

from mtlkernels.nn.level import linear_parameters
from mtlkernels.ops import _folding


def norm_refusal(linear: Any, norm: Any) -> str | None:
    """Why a norm after a linear layer cannot be fused in any mode."""
    weight, _ = linear_parameters(linear)
    shape = (norm.num_features,) if type(norm) is nn.BatchNorm1d else norm.normalized_shape
    if tuple(shape) != weight.shape[:1]:
        return f"{type(norm).__name__} of {list(shape)} features after a layer of {weight.shape[0]}"
    return None


def wants_gradient(linear: nn.Module, norm: Any) -> bool:
    """Whether a tensor that would be folded requires a gradient."""
    return _folding.wants_gradient(*linear_parameters(linear), norm)
