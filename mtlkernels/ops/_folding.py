"""Batch norm in evaluation, folded into the linear layer before it.

With running statistics batch norm is an affine map of each channel, so that ``Linear → BatchNorm1d`` is one linear
layer (Jacob et al., CVPR 2018, section 3.2). The parameters stay as they are: what is folded is a copy.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mtlkernels import _tracing

# Measured with experts of (256, 128): on fewer rows than this, folding with gradients takes as long as not fusing.
FOLD_ROWS = 128


class _Folded(NamedTuple):
    """A folded layer and what it was made of.

    ``keep`` shares the sources' memory, so that no other tensor can come to lie at their addresses while this is
    compared with: ``.to()`` gives a parameter new memory, and changes neither its identity nor its version.
    """

    sources: tuple[Tensor | None, ...]
    versions: tuple[int, ...]
    addresses: tuple[int, ...]
    keep: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor


_folded: weakref.WeakKeyDictionary[nn.Module, _Folded] = weakref.WeakKeyDictionary()


def may_cache() -> bool:
    """Whether tensors are what they seem: nothing traces or transforms the call."""
    return not _tracing.observed()


def few_rows(x: Tensor) -> bool:
    """Whether folding batch norm in a way that gradients flow through takes longer than what fusing saves.

    Then nothing that is folded is kept, and autograd follows it: work in proportion to the weights, at each call.
    """
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.shape[0] < FOLD_ROWS


def wants_gradient(weight: Tensor, bias: Tensor | None, norm: Any) -> bool:
    """Whether a tensor that would be folded requires a gradient."""
    return any(t is not None and t.requires_grad for t in (weight, bias, *_norm_tensors(norm)))


def fold(weight: Tensor, bias: Tensor | None, norm: Any, cache: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of the one linear layer that ``norm(x weight^T + bias)`` is in evaluation.

    Where a gradient is wanted, and without ``cache`` (see :func:`may_cache`), they are computed from the parameters by
    differentiable operators. Otherwise they are kept until one of the parameters or buffers is another tensor, has
    another address or was changed in place. ``num_batches_tracked`` stands for the running statistics as well, whose
    versions PyTorch's batch norm does not count up in training. What no version counts, such as writes to ``.data`` and
    replaying a CUDA graph, shows after :func:`forget`, which the converted module's ``train()`` and ``eval()`` call.
    """
    sources = (weight, bias, *_norm_tensors(norm))
    if not cache or (torch.is_grad_enabled() and wants_gradient(weight, bias, norm)):
        return _fold(sources, norm.eps)
    found = _folded.get(norm)
    if found is not None and _unchanged(found, sources):
        return found.weight, found.bias
    tensors = [t for t in sources if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.is_inference() for t in tensors):
        return _fold(sources, norm.eps)
    # Read first, so that what another thread changes meanwhile counts as changed.
    versions, addresses = tuple(t._version for t in tensors), tuple(t.data_ptr() for t in tensors)
    with torch.inference_mode(False), torch.no_grad():
        folded = _fold(sources, norm.eps)
        keep = tuple(t.detach() for t in tensors)
    _folded[norm] = _Folded(sources, versions, addresses, keep, *folded)
    return folded


def forget(module: nn.Module) -> None:
    """Drops what is folded of the batch norms in ``module``."""
    for part in module.modules():
        _folded.pop(part, None)


def _norm_tensors(norm: Any) -> tuple[Tensor | None, ...]:
    """Running mean and variance, weight, bias and number of batches, past ``nn.Module.__getattr__`` where it can be."""
    own, buffers = norm._parameters, norm._buffers
    if "weight" not in own:  # a replica of nn.DataParallel
        return norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.num_batches_tracked
    batches = buffers.get("num_batches_tracked")
    return buffers["running_mean"], buffers["running_var"], own["weight"], own["bias"], batches


def _unchanged(found: _Folded, sources: tuple[Tensor | None, ...]) -> bool:
    at = 0
    for old, new in zip(found.sources, sources, strict=True):
        if new is not old:
            return False
        if new is None:
            continue
        if new._version != found.versions[at] or new.data_ptr() != found.addresses[at]:
            return False
        at += 1
    return True


def _fold(sources: tuple[Any, ...], eps: float) -> tuple[Tensor, Tensor]:
    """In float32 at least; the result has the weight's dtype."""
    weight, bias, mean, var, gamma, beta, _ = sources
    dtype = torch.promote_types(var.dtype, torch.float32)
    scale = torch.rsqrt(var.to(dtype) + eps)
    if gamma is not None:
        scale = scale * gamma
    offset = -mean * scale if bias is None else (bias - mean) * scale
    if beta is not None:
        offset = offset + beta
    return (weight * scale.unsqueeze(1)).to(weight.dtype), offset.to(weight.dtype)
