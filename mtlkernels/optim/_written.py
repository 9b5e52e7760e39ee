"""How gradients get into ``.grad``: into that of all parameters or of none, also where a signal's handler raises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels._dtensors import has_dtensor

Grads = list[Tensor | None]


def set_grads(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Sets the ``.grad`` of each parameter; an exception may leave some of them as they were."""
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = grad


def accumulate(parameters: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Adds to ``.grad``, in place where that can be; gradients that are the first become ``.grad``.

    A signal's handler may raise between any two lines. What takes memory comes first; then ``.grad`` is set where it
    becomes another tensor, which can be undone; last all sums in place are one call, which no handler enters.
    """
    changed: list[Tensor] = []
    before: Grads = []
    after: Grads = []
    totals: list[Tensor] = []
    addends: list[Tensor] = []
    distributed = has_dtensor(grads)
    for parameter, grad in zip(parameters, grads, strict=True):
        if grad is None:
            continue
        total = parameter.grad
        if total is None:
            written = grad
        elif total.is_sparse:
            written = total + grad if grad.is_sparse else grad.add_(total)
        elif distributed and not _placed_alike(total, grad):
            written = placed_as(grad, total) + grad
        elif not _takes_sums(total):
            written = total + grad
        else:
            # One call takes DTensors alone or none: these stand for theirs, whose memory they are.
            totals.append(_local(total) if distributed else total)
            addends.append(_local(grad) if distributed else grad)
            continue
        changed.append(parameter)
        before.append(total)
        after.append(written if distributed and has_dtensor((written,)) else _laid_out(written, parameter))
    version = totals[0]._version if totals else 0
    try:
        set_grads(changed, after)
        if totals:
            torch._foreach_add_(totals, addends)
    except BaseException:
        # A handler may raise as soon as the call returns, before anything here could note that it has.
        if not totals or totals[0]._version == version:
            set_grads(changed, before)
        raise


def _takes_sums(total: Any) -> bool:
    """Whether PyTorch writes to a dense tensor in place: not where entries share memory, or inference mode made it."""
    if total.is_inference() and not torch.is_inference_mode_enabled():
        return False
    if has_dtensor((total,)):
        return True
    return not any(step == 0 and size > 1 for step, size in zip(total.stride(), total.shape, strict=True))


def _placed_alike(a: Any, b: Any) -> bool:
    """Whether neither or both are DTensors, whose parts on this rank can be added up."""
    of_a, of_b = (tensor.placements if has_dtensor((tensor,)) else None for tensor in (a, b))
    return bool(of_a == of_b)


def _local(tensor: Any) -> Tensor:
    """The part of a DTensor that lies on this rank, or another tensor itself."""
    part: Tensor = tensor.to_local() if has_dtensor((tensor,)) else tensor
    return part


def placed_as(like: Any, grad: Any) -> Any:
    """A gradient as its parameter, or an earlier gradient, is placed, where both are DTensors.

    That of a replicated parameter whose ranks see parts of the rows, as under sequence parallelism, is a sum over ranks
    that nobody has taken yet; and each task may have its own placements.
    """
    if not has_dtensor((grad,)) or not has_dtensor((like,)) or grad.placements == like.placements:
        return grad
    with torch.no_grad():
        return grad.redistribute(placements=like.placements)


def _laid_out(grad: Tensor, parameter: Tensor) -> Tensor:
    """``grad`` with the parameter's strides, as ``loss.backward()`` leaves it; contiguous where that has gaps.

    Fused optimizers on CPUs walk both in the order of memory.
    """
    if grad.layout != torch.strided or grad.stride() == parameter.stride():
        return grad
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return grad.new_empty_strided(grad.shape, parameter.stride()).copy_(grad) if dense else grad.contiguous()
