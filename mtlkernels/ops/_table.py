"""The table of a call: one int64 tensor through which kernels on a GPU find their tensors.

It holds addresses, strides and indices. Tensors thus stay where they are, however many there are, and a call copies one
small array to the device. What the call allocates, results and scratch, is allocated through its table as well, so that
a recording of the call knows all of it, see :mod:`mtlkernels.ops._recording`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _extension, _torch

# A CUDA graph reads the host's copy of a tensor whenever it is replayed. Since 2.11 PyTorch gives pinned memory that
# was allocated during a capture to nobody else; before, the copies have to stay here.
GRAPHS_KEEP_PINNED = _torch.VERSION >= (2, 11)
_captured: list[Tensor] = []


class Table:
    """Collects what the kernels of a call look up, and what the call allocates.

    ``addresses`` are the places in it that hold addresses, and in which tensor these lie; ``rooms`` are the call's
    allocations, of one or several tensors; ``launches`` those that it has made; ``unmoved`` are results that were then
    multiplied by zero.
    """

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.addresses: list[tuple[int, Tensor | None]] = []
        self.rooms: list[list[Tensor]] = []
        self.launches: list[Any] = []
        self.unmoved: list[Tensor] = []

    def room(self, like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """An empty tensor on the device of ``like``, of its dtype unless another is given."""
        self.rooms.append([like.new_empty(shape, dtype=dtype)])
        return self.rooms[-1][0]

    def together(self, like: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The same for several shapes. Where there is a C++ module they share one allocation, and are no views."""
        if not shapes:
            return []
        if not _extension.has_module():
            return [self.room(like, shape, dtype) for shape in shapes]
        found: list[Tensor] = _extension.function("together")(like, dtype or like.dtype, shapes)
        self.rooms.append(found)
        return found

    def integers(self, values: Iterable[int]) -> int:
        """Appends integers and returns where they start."""
        start = len(self.entries)
        self.entries += values
        return start

    def pointers(self, tensors: Iterable[Tensor | None]) -> int:
        """Appends the addresses of tensors, 0 for None, and returns where they start."""
        found = list(tensors)
        start = self.integers(0 if t is None else t.data_ptr() for t in found)
        self.addresses += zip(range(start, len(self.entries)), found, strict=True)
        return start

    def slices(self, tensor: Tensor | None, numbers: Iterable[int]) -> int:
        """Appends the addresses of ``tensor[i]`` for each of ``numbers``, or zeros, and returns where they start."""
        first, step = (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0) * tensor.element_size())
        start = self.integers(first + i * step for i in numbers)
        self.addresses += ((place, tensor) for place in range(start, len(self.entries)))
        return start

    def to(self, device: torch.device) -> Tensor:
        """The table on the device, without waiting for it, as only a copy from pinned memory is sure not to."""
        return copied(
            torch.tensor(self.entries, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda"), device
        )


def copied(pinned: Tensor, device: torch.device) -> Tensor:
    """What lies in pinned memory on the device, without waiting for it; on a CPU it is there."""
    if device.type != "cuda":
        return pinned
    if not GRAPHS_KEEP_PINNED and torch.cuda.is_current_stream_capturing():
        _captured.append(pinned)
    return pinned.to(device, non_blocking=True)


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device; unless it is traced or transformed, without waiting for that."""
    if device.type == "cuda" and tensor.is_cpu:
        if not (_torch.compiling() or _torch.func_transforms_active()):
            # A copy of its own: what the caller has pinned may be written to, for the next step, before the device has
            # read it. Contiguous, as PyTorch pins nothing that is expanded, and has a graph read what is otherwise
            # strided from memory that is gone when it is replayed.
            own = tensor.clone(memory_format=torch.contiguous_format) if tensor.is_pinned() else tensor.contiguous()
            return copied(own.pin_memory(), device)
    elif tensor.device == device:
        return tensor
    return tensor.to(device)


# GPUs whose float64 arithmetic runs at half the rate of float32; on all others at 1/64 of it.
_FAST_FLOAT64 = ((8, 0), (9, 0), (10, 0))


def has_fast_float64(device: torch.device) -> bool:
    """Whether float64 products take less time on this GPU than the operands take to arrive."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) in _FAST_FLOAT64


def on_device(device: torch.device) -> Any:
    """Makes ``device`` the current one, where launches go."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
