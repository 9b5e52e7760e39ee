"""The launch configurations of the expert mixture's kernels: fixed, and reasoned rather than tuned.

They keep every kernel within 255 registers a thread without spilling, which ``tests/triton/aot.py`` checks for each
entry of the tables below; that is what limits the tiles. Operands come in three kinds: "half" (bfloat16 and float16)
and "tf32" run on tensor cores, "ieee" (float32) does not. Tensors that are not aligned cannot be copied to shared
memory 16 bytes at a time; each element then needs an address in registers, and tiles are smaller.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from mtlkernels.ops._triton import Tile


class Products(NamedTuple):
    """Tiles of a grouped product: for few rows, for few columns or a heavy epilogue, and otherwise."""

    short: Tile
    narrow: Tile
    full: Tile


# A 128 x 128 tile reads two thirds of what 64 x 128 tiles do. Its 8 warps are two warp groups, each with 64 rows, and
# registers leave a multiprocessor room for one such program, which three stages in shared memory keep supplied. A
# tensor core takes 16 rows at least (64 for a warp group's).
PRODUCT = {
    ("half", True): Products(Tile(16, 64, 128, 4, 3), Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    ("tf32", True): Products(Tile(16, 64, 64, 4, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("ieee", True): Products(Tile(16, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2), Tile(64, 64, 16, 4, 3)),
    ("half", False): Products(Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    ("tf32", False): Products(Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    ("ieee", False): Products(Tile(16, 32, 32, 4, 2), Tile(32, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}

# One accumulator a gate and one for the product: at most 5 x 64 x 64 / 256 threads = 80 registers of the 255.
MAX_FUSED_GATES = 4
MIXING = {
    ("half", True): Tile(64, 64, 64, 8, 3),
    ("tf32", True): Tile(64, 64, 32, 8, 3),
    ("ieee", True): Tile(32, 32, 16, 8, 2),
    ("half", False): Tile(64, 32, 32, 8, 2),
    ("tf32", False): Tile(64, 32, 32, 8, 2),
    ("ieee", False): Tile(32, 32, 16, 4, 2),
}
# A program of the fused kernel evaluates all experts one after another. With fewer programs than about half the
# multiprocessors of a data-centre GPU, spreading the experts over programs and mixing in a launch of its own is faster.
MIN_FUSED_PROGRAMS = 64

WEIGHT_GRADIENT = {
    ("half", True): Tile(128, 128, 64, 8, 3),
    ("tf32", True): Tile(128, 128, 32, 8, 3),
    ("ieee", True): Tile(64, 64, 16, 4, 2),
    ("half", False): Tile(64, 64, 32, 8, 2),
    ("tf32", False): Tile(64, 64, 32, 8, 2),
    ("ieee", False): Tile(32, 32, 16, 4, 2),
}


def operands(dtype: torch.dtype, precision: str) -> str:
    """The kind of operands: "half", "tf32" or "ieee"."""
    return precision if dtype == torch.float32 else "half"


def product(kind: str, aligned: bool, rows: int, columns: int, heavy: bool = False) -> Tile:
    """For ``layer_forward`` and ``input_gradient``; ``heavy``: the epilogue recomputes an activation."""
    choice = PRODUCT[kind, aligned]
    if rows <= 2 * choice.short.rows:
        return choice.short
    return choice.narrow if heavy or columns <= choice.narrow.columns else choice.full


def fuses(kind: str, aligned: bool, gates: int, rows: int, columns: int) -> bool:
    """Whether the last layer's kernel mixes too."""
    tile = MIXING[kind, aligned]
    programs = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return gates <= MAX_FUSED_GATES and programs >= MIN_FUSED_PROGRAMS
