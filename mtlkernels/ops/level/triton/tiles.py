"""The launch configurations of a level's kernels: fixed, and reasoned rather than tuned.

They keep every kernel within 255 registers a thread without spilling, which ``tests/triton/aot.py`` checks for each
entry of the tables below; that is what limits the tiles. Tables are looked up by :attr:`Kind.operands`: "half"
(bfloat16 and float16) and "tf32" run on tensor cores, "ieee" (float32) does not. Tensors that are not aligned cannot be
copied to shared memory 16 bytes at a time; each element then needs an address in registers, and tiles are smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import triton

from mtlkernels.ops._triton import Kind, Tile
from mtlkernels.ops._triton_splits import Sums


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


class Mixers(NamedTuple):
    """Tiles of the last layer's kernel: for few rows, and otherwise for up to ``few`` gates and for up to eight."""

    short: Tile
    full: Tile
    many: Tile
    few: int


# One accumulator a gate and one for the product, of 16 or 8 registers a thread each. Registers are given outright: the
# compiler would rather spill a few, for an occupancy that a loop fed by asynchronous copies does not need.
MAX_FUSED_GATES = 8
MIXING = {
    ("half", True): Mixers(Tile(16, 32, 128, 4, 3, 255), Tile(64, 64, 64, 8, 3, 255), Tile(64, 32, 64, 8, 3, 255), 6),
    ("tf32", True): Mixers(Tile(16, 32, 64, 4, 3, 255), Tile(64, 64, 32, 8, 3, 255), Tile(64, 32, 32, 8, 3, 255), 6),
    ("ieee", True): Mixers(Tile(16, 32, 16, 4, 2, 255), Tile(32, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 255), 8),
    ("half", False): Mixers(Tile(16, 32, 32, 4, 2, 255), Tile(64, 32, 32, 8, 2, 255), Tile(32, 32, 32, 8, 2, 255), 4),
    ("tf32", False): Mixers(Tile(16, 32, 32, 4, 2, 255), Tile(64, 32, 32, 8, 2, 255), Tile(32, 32, 32, 8, 2, 255), 4),
    ("ieee", False): Mixers(Tile(16, 32, 16, 4, 2, 255), Tile(32, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 255), 8),
}

WEIGHT_GRADIENT = {
    ("half", True): Tile(128, 128, 64, 8, 3),
    ("tf32", True): Tile(128, 128, 32, 8, 3),
    ("ieee", True): Tile(64, 64, 16, 4, 2),
    ("half", False): Tile(64, 64, 32, 8, 2),
    ("tf32", False): Tile(64, 64, 32, 8, 2),
    ("ieee", False): Tile(32, 32, 16, 4, 2),
}

# A product whose first operand passes through registers, to be normalized there, has less room: its steps along the
# depth are shorter.
LAYERWISE = {
    ("half", True): Tile(128, 128, 32, 8, 3, 255),
    ("tf32", True): Tile(64, 128, 32, 8, 3, 255),
    ("ieee", True): Tile(64, 64, 16, 8, 3, 255),
    ("half", False): Tile(64, 32, 32, 8, 2),
    ("tf32", False): Tile(32, 32, 32, 8, 2, 255),
    ("ieee", False): Tile(32, 32, 16, 8, 2),
}
# What works value by value: a 16-byte load a thread in half precision. Without alignment each needs its own address.
VALUES = {True: Tile(16, 64, 1, 4, 1), False: Tile(16, 32, 1, 4, 1, 255)}
# Of sums over a batch, eight such blocks of rows a program.
SUMS = {True: Tile(16, 64, 8, 4, 1), False: Tile(16, 32, 8, 4, 1)}
# Of sums over blocks: 32 of them at a time, one after another.
TOTALS = Tile(32, 32, 1, 4, 1)
# Of the channels that share a slope, one a thread at a time.
SLOPES = Tile(1, 128, 1, 4, 1)


def product(kind: Kind, rows: int, columns: int, heavy: bool = False) -> Tile:
    """For ``layer_forward`` and ``input_gradient``; ``heavy``: the epilogue recomputes an activation."""
    choice = PRODUCT[kind.operands]
    if rows <= 2 * choice.short.rows:
        return choice.short
    return choice.narrow if heavy or columns <= choice.narrow.columns else choice.full


def beside_gates(tile: Tile) -> Tile:
    """``tile`` for a ``layer_forward`` with linear gates; of two, the compiler would spill a few registers else.

    Without alignment it does so on sm_86 and sm_89 alone.
    """
    spills = tile in (PRODUCT["ieee", True].full, PRODUCT["ieee", False].full)
    return replace(tile, registers=255) if spills else tile


def mixing(kind: Kind, gates: int, rows: int) -> Tile | None:
    """For ``last_forward``; None for more gates than fit."""
    choice = MIXING[kind.operands]
    if gates > MAX_FUSED_GATES:
        return None
    if rows <= 2 * choice.short.rows:
        return choice.short
    return choice.full if gates <= choice.few else choice.many


def mixing_sums(tile: Tile, experts: int, rows: int, columns: int, depth: int, gates: int, itemsize: int) -> Sums:
    """What ``last_forward`` adds up: the experts, for every gate."""
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Sums(blocks, experts, _lines(tile) * depth * itemsize, gates * tile.rows * tile.columns)


def input_sums(tile: Tile, members: Sequence[int], rows: int, columns: int, depth: int, itemsize: int) -> Sums:
    """What ``input_gradient`` adds up: the experts of each group, of which there are ``members``."""
    blocks = len(members) * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Sums(blocks, max(members), _lines(tile) * depth * itemsize, tile.rows * tile.columns)


def weight_blocks(tile: Tile, experts: int, height: int, width: int) -> int:
    """The blocks of a layer's weights [E, height, width] in ``weight_gradient``; biases want at least one."""
    return experts * int(triton.cdiv(height, tile.rows) * triton.cdiv(max(width, 1), tile.columns))


def weight_sums(tile: Tile, blocks: int, rows: int, itemsize: int) -> Sums:
    """What ``weight_gradient`` adds up: the batch."""
    part = (tile.columns + 1) * tile.rows
    return Sums(blocks, triton.cdiv(rows, tile.depth), _lines(tile) * tile.depth * itemsize, part)


def _lines(tile: Tile) -> int:
    """Rows and columns of operands that a program reads for a step along the depth."""
    return tile.rows + tile.columns
