"""Tensors between pages that may not be touched: an access one element too far ends the process."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE
SIDES = ("after", "before")
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_MAPPING = 0x22  # private, anonymous

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def _mapped(size: int, side: str) -> ctypes.Array[ctypes.c_char]:
    """So many bytes with a forbidden page right after them, or right before; both are there in either case."""
    inside = -(-size // PAGE) * PAGE
    whole = inside + 2 * PAGE
    start = _libc.mmap(None, whole, _NONE, _MAPPING, -1, 0)
    if start in (None, ctypes.c_void_p(-1).value) or _libc.mprotect(start + PAGE, inside, _READ_WRITE):
        raise MemoryError(f"no pages for {size} bytes: error {ctypes.get_errno()}")
    first = start + PAGE + (inside - size if side == "after" else 0)
    array = (ctypes.c_char * size).from_address(first)
    weakref.finalize(array, _libc.munmap, start, whole)
    return array


def guarded(tensor: Tensor, side: str) -> Tensor:
    """The tensor with the same strides in memory that ends with its last element, or starts with its first.

    What lies between its elements is copied, too.
    """
    if tensor.numel() == 0:
        return tensor
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.frombuffer(_mapped(span * tensor.element_size(), side), dtype=tensor.dtype)
    flat.copy_(tensor.detach().as_strided((span,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())
