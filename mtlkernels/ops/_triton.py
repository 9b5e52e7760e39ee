"""What the launchers of Triton kernels share.

Kernels find tensors through the call's table, see :mod:`mtlkernels.ops._table`: parameters of different experts stay
where they are. The launchers pass the place in the table where each run of entries starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from mtlkernels import _backends
from mtlkernels.ops._table import Table as Table
from mtlkernels.ops._table import on_device as on_device

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Kind(NamedTuple):
    """What all kernels of a call have in common, in one compile-time argument.

    The dtype of inputs and parameters; whether kernels may use 16-byte accesses, see :func:`aligned`; the
    ``input_precision`` of products; and whether these take float32 operands.
    """

    dtype: Any
    aligned: bool
    precision: str = ""
    upcast: bool = False

    @staticmethod
    def of(dtype: torch.dtype, aligned: bool) -> Kind:
        """With PyTorch's own precision: TF32 for float32 where its products may use it, by either of its two settings.

        Triton's interpreter computes products of bfloat16 wrongly.
        """
        tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
        return Kind(DTYPES[dtype], aligned, "tf32" if tf32 else "ieee", _backends.interpreting())

    @property
    def without_products(self) -> Kind:
        """That of kernels without products, which their precision does not concern."""
        return Kind(self.dtype, self.aligned)

    @property
    def operands(self) -> tuple[str, bool]:
        """The kind of operands ("half", "tf32" or "ieee") and ``aligned``: where tables of tiles are looked up."""
        return self.precision if self.dtype == tl.float32 else "half", self.aligned


@dataclass(frozen=True)
class Tile:
    """A launch configuration: the block that a program works on, its warps and the depth of its pipeline.

    ``registers``: how many a thread may have. Left to itself, the compiler may spill to have more programs at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None


def aligned(tensors: Iterable[Tensor], lengths: Iterable[int]) -> bool:
    """Whether kernels may use 16-byte accesses: all addresses, and all lengths of rows or strides, are multiples of 16.

    What a launcher allocates itself is aligned if its rows are.
    """
    return all(length % 16 == 0 for length in lengths) and all(t.data_ptr() % 16 == 0 for t in tensors)


def contiguous(tensors: Iterable[Any]) -> list[Any]:
    """The tensors, copied where they are not contiguous; None stays.

    Kernels read rows of unit stride, in whole vectors; a strided operand is read by many programs, so that one copy
    costs less than scattered reads.
    """
    return [None if t is None else t.contiguous() for t in tensors]


class Launch(NamedTuple):
    """A launch that has been made. ``compiled`` is what Triton made of the kernel, None in its interpreter."""

    kernel: Any
    compiled: Any
    programs: int
    args: tuple[Any, ...]
    constants: dict[str, Any]


# Makes a launch, once the table is complete and on the device.
Run = Callable[[Tensor], Launch | None]


def launch(kernel: Any, programs: int, tile: Tile, *args: Any, **constants: Any) -> Launch | None:
    """Launches ``programs`` programs of a kernel, if any."""
    if not programs:
        return None
    constants.update(ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth)
    options: dict[str, Any] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    if tile.registers is not None:
        options["maxnreg"] = tile.registers
    return Launch(kernel, kernel[(programs,)](*args, **constants, **options), programs, args, constants | options)
