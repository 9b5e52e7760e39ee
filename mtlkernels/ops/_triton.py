"""What the launchers of Triton kernels share: the pointer table, and launching.

Kernels find tensors through a *table*, one int64 tensor a call that holds addresses, strides and indices. Parameters of
different experts thus stay where they are, however many there are, and a call copies one small array to the device.
The launchers pass the place in the table where each run of entries starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from mtlkernels import _backends

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Hosts' copies of tables that a CUDA graph reads whenever it is replayed.
_captured: list[Tensor] = []


@dataclass(frozen=True)
class Tile:
    """A launch configuration: the block that a program works on, its warps and the depth of its pipeline."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


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

    def slices(self, tensor: Tensor | None, count: int) -> int:
        """Appends the addresses of ``tensor[i]`` for each i, or zeros, and returns where they start."""
        if tensor is None:
            return self.integers([0] * count)
        step = tensor.stride(0) * tensor.element_size()
        return self.integers(tensor.data_ptr() + i * step for i in range(count))

    def to(self, device: torch.device) -> Tensor:
        """The table on the device, without waiting for it."""
        if device.type != "cuda":
            return torch.tensor(self.entries, dtype=torch.int64)
        # CUDA stages a pageable copy of this size at once. A graph reads the source again at every replay, so there it
        # must be pinned, and stay.
        capturing = torch.cuda.is_current_stream_capturing()
        host = torch.tensor(self.entries, dtype=torch.int64, pin_memory=capturing)
        if capturing:
            _captured.append(host)
        return host.to(device, non_blocking=True)


def aligned(tensors: Iterable[Tensor], lengths: Iterable[int]) -> bool:
    """Whether kernels may use 16-byte accesses: all addresses, and all lengths of rows or strides, are multiples of 16.

    What a launcher allocates itself is aligned if its rows are.
    """
    return all(length % 16 == 0 for length in lengths) and all(t.data_ptr() % 16 == 0 for t in tensors)


def on_device(device: torch.device) -> Any:
    """Makes ``device`` the current one, as Triton launches on that."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, copied where they are not contiguous.

    Kernels read rows of unit stride, in whole vectors; a strided operand is read by many programs, so that one copy
    costs less than scattered reads.
    """
    return [t.contiguous() for t in tensors]


def launch(kernel: Any, programs: int, tile: Tile, *args: Any, **constants: Any) -> None:
    """Launches ``programs`` programs of a kernel, if any."""
    if programs:
        kernel[(programs,)](
            *args,
            **constants,
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            DEPTH=tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
        )


def precision(dtype: torch.dtype) -> str:
    """The ``input_precision`` of a product: TF32 for float32 where PyTorch's own products may use it."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def upcast() -> bool:
    """Whether products take float32 operands: Triton's interpreter computes those of bfloat16 wrongly."""
    return _backends.interpreting()


def gate_entries(table: Table, gate_logits: Sequence[Tensor], gate_experts: Sequence[int], sizes: Sequence[int]) -> int:
    """Appends what kernels know of K gates; see ``gate_logits`` in _triton_functions.py.

    K addresses of logits, K row strides, K column strides, K + 1 offsets into the experts of all gates, these experts.
    """
    start = table.pointers(gate_logits)
    table.integers(logits.stride(0) for logits in gate_logits)
    table.integers(logits.stride(1) for logits in gate_logits)
    table.integers(sum(sizes[:k]) for k in range(len(sizes) + 1))
    table.integers(gate_experts)
    return start
