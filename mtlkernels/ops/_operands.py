"""What kernels and products refuse that read addresses: operators can be called directly, and memory may be gone.

A tensor of another dtype would be read as numbers that it does not hold, one of another device or shape is an illegal
access. The C++ kernels for CPUs refuse the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops._checks import shape_of

Shape = tuple[int, ...]


def check_count(name: str, entries: Sequence[Any], count: int, what: str) -> None:
    """There is an entry for each of ``count`` of what there is."""
    if len(entries) != count:
        raise ValueError(f"{name} must hold an entry for each of {count} {what}, got {len(entries)}")


def check_operands(
    name: str,
    tensors: Iterable[Tensor | None],
    shapes: Iterable[Shape],
    like: Tensor,
    dtypes: Sequence[torch.dtype] | None = None,
) -> None:
    """Dense tensors of those shapes on the device of ``like``, of its dtype or one of ``dtypes``; None passes."""
    device, allowed = like.device, dtypes or (like.dtype,)
    for i, (tensor, shape) in enumerate(zip(tensors, shapes, strict=True)):
        # Nearly all of them, which may be hundreds, are told to be right here.
        if tensor is None or (
            tensor.dtype in allowed
            and tensor.device == device
            and tensor.shape == shape
            and tensor.layout is torch.strided
            and tensor.untyped_storage().nbytes() >= _reached(tensor)
        ):
            continue
        raise _mistake(f"{name}[{i}]", tensor, shape, device, allowed)


def _mistake(
    name: str, tensor: Tensor, shape: Shape, device: torch.device, dtypes: Sequence[torch.dtype]
) -> TypeError | ValueError:
    if tensor.layout is not torch.strided:
        return TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
    if tensor.dtype not in dtypes:
        return TypeError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device != device:
        return ValueError(f"{name} must be on {device}, got {tensor.device}")
    if tensor.shape == shape:
        return _too_little_memory(name, tensor)
    return ValueError(f"{name} must have shape {list(shape)}, got {shape_of(tensor)}")


def _reached(tensor: Tensor) -> int:
    """The bytes from the beginning of its memory to the end of the furthest of its values."""
    if tensor.numel() == 0 or tensor._is_zerotensor():
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset() * tensor.itemsize + tensor.nbytes)
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((tensor.storage_offset() + steps + 1) * tensor.itemsize)


def has_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor has the memory that its values take; tensors of other kinds are not looked into."""
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_nested or tensor.layout is not torch.strided:
        return True
    return _torch.is_func_wrapped(tensor) or tensor.untyped_storage().nbytes() >= _reached(tensor)


def check_memory(name: str, tensor: Tensor) -> None:
    """A plain tensor has the memory that its values take; the compiler, which makes its own, is not asked."""
    if not _torch.compiling() and not has_memory(tensor):
        raise _too_little_memory(name, tensor)


def check_memory_of_all(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Of a list's tensors, which others may have let go of; None passes."""
    if _torch.compiling():
        return
    for i, tensor in enumerate(tensors):
        if tensor is not None and not has_memory(tensor):
            raise _too_little_memory(f"{name}[{i}]", tensor)


def _too_little_memory(name: str, tensor: Tensor) -> ValueError:
    memory = tensor.untyped_storage().nbytes()
    return ValueError(f"{name} must have {_reached(tensor)} bytes of memory, got {memory}")


def check_gate_logits(logits: Sequence[Tensor], sizes: Sequence[int], rows: int, like: Tensor) -> None:
    """Logits [B, N_k] of one dtype; float64 only beside float64."""
    check_count("gate_logits", logits, len(sizes), "gates")
    dtype = logits[0].dtype if logits else like.dtype
    if dtype == torch.float64 != like.dtype or not dtype.is_floating_point:
        raise TypeError(f"gate_logits[0] must be float32 or narrower beside {like.dtype}, got {dtype}")
    check_operands("gate_logits", logits, [(rows, size) for size in sizes], like, (dtype,))
