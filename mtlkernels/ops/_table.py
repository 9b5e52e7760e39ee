"""The table of a call: one int64 tensor through which kernels on a GPU find their tensors.

It holds addresses, strides and indices. Tensors thus stay where they are, however many there are, and a call copies one
small array to the device.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _torch

# A CUDA graph reads the host's copy of a tensor whenever it is replayed. Since 2.11 PyTorch gives pinned memory that
# was allocated during a capture to nobody else; before, the copies have to stay here.
GRAPHS_KEEP_PINNED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
_captured: list[Tensor] = []


class Table:
    """Collects what the kernels of a call look up."""

    def __init__(self) -> None:
        self.entries: list[int] = []

    def integers(self, values: Iterable[int]) -> int:
        """Appends integers and returns where they start."""
        start = len(self.entries)
        self.entries += values
        return start

    def pointers(self, tensors: Iterable[Tensor | None]) -> int:
        """Appends the addresses of tensors, 0 for None, and returns where they start."""
        return self.integers(0 if t is None else t.data_ptr() for t in tensors)

    def slices(self, tensor: Tensor | None, numbers: Iterable[int]) -> int:
        """Appends the addresses of ``tensor[i]`` for each of ``numbers``, or zeros, and returns where they start."""
        start, step = (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0) * tensor.element_size())
        return self.integers(start + i * step for i in numbers)

    def to(self, device: torch.device) -> Tensor:
        """The table on the device, without waiting for it, as only a copy from pinned memory is sure not to."""
        if device.type != "cuda":
            return torch.tensor(self.entries, dtype=torch.int64)
        return _copied(torch.tensor(self.entries, dtype=torch.int64, pin_memory=True), device)


def _copied(pinned: Tensor, device: torch.device) -> Tensor:
    if not GRAPHS_KEEP_PINNED and torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; unless it is traced or transformed, without waiting for that."""
    plain = not (torch.compiler.is_compiling() or _torch.func_transforms_active())
    if device.type == "cuda" and tensor.is_cpu and plain:
        return _copied(tensor.pin_memory(), device)
    return tensor.to(device)


# GPUs whose float64 arithmetic runs at half the rate of float32; on all others at 1/64 of it.
_FAST_FLOAT64 = ((8, 0), (9, 0), (10, 0))


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 products take less time on this GPU than the operands take to arrive."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64


def on_device(device: torch.device) -> Any:
    """Makes ``device`` the current one, where launches go."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
