"""What lies in memory, and how."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def _is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def in_memory(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """The tensors, with their values in memory; None stays.

    PyTorch's dispatcher does not look into lists of optional tensors, for those that a bit says are negated, and for
    zeros without memory.
    """
    return [t if t is None or not (t.is_neg() or t._is_zerotensor()) else _resolved(t) for t in tensors]


def _resolved(tensor: Tensor) -> Tensor:
    zeros = tensor._is_zerotensor()
    return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device) if zeros else tensor.resolve_neg()


def first_of(tensors: Iterable[Tensor | None]) -> Tensor | None:
    """The first that is not None."""
    return next((tensor for tensor in tensors if tensor is not None), None)


def alike(tensors: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors in one order of their elements, so that memory can be walked linearly.

    As they are where all are dense with the same strides, as those of a parameter in channels-last layout are;
    otherwise contiguous.
    """
    if all(tensor is None or tensor.is_contiguous() for tensor in tensors):
        return tensors
    like = first_of(tensors)
    assert like is not None
    strides = like.stride()
    if _is_dense(like) and all(tensor is None or tensor.stride() == strides for tensor in tensors):
        return tensors
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def by_parameter(grads: Sequence[Tensor | None], num_tasks: int) -> list[Sequence[Tensor | None]]:
    """For each parameter its T gradients, laid out alike; that of task t is ``grads[p * T + t]``, or None."""
    return [alike(grads[start : start + num_tasks]) for start in range(0, len(grads), num_tasks)]
