"""What lies in memory, and how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def saved_layers(layers: int, device: torch.device) -> int:
    """How many of an expert mixture's layers, from the first on, the forward pass saves for the backward pass.

    Of several layers the last is small beside the others, so computing it again costs less than the memory is worth;
    Triton's backward kernels read it from memory.
    """
    return layers if layers == 1 or device.type == "cuda" else layers - 1


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


def alike(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in one order of their elements, so that memory can be walked linearly.

    As they are where all are dense with the same strides, as those of a parameter in channels-last layout are;
    otherwise contiguous.
    """
    if all(tensor.is_contiguous() for tensor in tensors):
        return list(tensors)
    if all(tensor.stride() == tensors[0].stride() for tensor in tensors) and _is_dense(tensors[0]):
        return list(tensors)
    return [tensor.contiguous() for tensor in tensors]


def by_parameter(grads: Sequence[Tensor | None], num_tasks: int) -> Iterator[dict[int, Tensor]]:
    """For each parameter its gradients by task, laid out alike; that of task t is ``grads[p * T + t]``, or None."""
    for start in range(0, len(grads), num_tasks):
        column = {t: grad for t, grad in enumerate(grads[start : start + num_tasks]) if grad is not None}
        yield dict(zip(column, alike(list(column.values())), strict=True))
