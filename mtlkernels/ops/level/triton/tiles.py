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
import triton.language as tl

from mtlkernels.ops._triton import Kind, Tile
from mtlkernels.ops._triton_splits import Card, Sums, moved, splits
from mtlkernels.ops.activations import CODES, from_input
from mtlkernels.ops.level.triton.chain_kernels import FLAT_GATES


class Products(NamedTuple):
    """Tiles of a grouped product: for few rows, for few columns or a heavy epilogue, and otherwise."""

    short: Tile
    narrow: Tile
    full: Tile


# A 128 x 128 tile reads two thirds of what 64 x 128 tiles do. Its 8 warps are two warp groups, each with 64 rows. A
# tensor core takes 16 rows at least (64 for a warp group's). In half precision, by `python -m benchmarks.gpu_model` for
# workload A at 65,536 rows, steps of 32 instead of 64 take 379 us instead of 404 in layer_forward, as 416 inputs are 13
# of them: registers then leave a multiprocessor room for two programs, of which one copies while the other waits for
# its next expert. Of 128 x 256 tiles, which read a quarter less, there is room for one: 394 us. Where registers are
# given, gelu's derivative spilled a few on sm_120.
PRODUCT = {
    ("half", True): Products(Tile(16, 64, 128, 4, 3), Tile(128, 64, 64, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("tf32", True): Products(Tile(16, 64, 64, 4, 3), Tile(128, 64, 32, 8, 3), Tile(128, 128, 32, 8, 3)),
    ("ieee", True): Products(Tile(16, 32, 32, 4, 3), Tile(64, 32, 32, 4, 2), Tile(64, 64, 16, 4, 3)),
    ("half", False): Products(Tile(16, 32, 32, 4, 2, 128), Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    ("tf32", False): Products(Tile(16, 32, 32, 4, 2), Tile(64, 32, 32, 8, 2), Tile(64, 32, 32, 8, 2)),
    ("ieee", False): Products(Tile(16, 32, 32, 4, 2), Tile(32, 32, 16, 4, 2), Tile(32, 32, 16, 4, 2)),
}


class Mixers(NamedTuple):
    """Tiles of the last layer's kernel: for few rows, and otherwise for up to ``few`` gates and for up to eight.

    ``wide``, if there is one, is for as many columns where the kernel is one loop.
    """

    short: Tile
    full: Tile
    many: Tile
    few: int
    wide: Tile | None = None


# One accumulator a gate and one for the product, of 16 or 8 registers a thread each. Registers are given outright: the
# compiler would rather spill a few, for an occupancy that a loop fed by asynchronous copies does not need. By the
# model, three gates take 299 us at 65,536 rows of workload A and 25 at 4,096 with 64 x 128 x 32, where an expert's
# shares are looked up once a row, instead of 421 and 27 with 64 x 64 x 64; but silu would spill.
MAX_FUSED_GATES = 8
MIXING = {
    ("half", True): Mixers(
        Tile(16, 32, 128, 4, 3, 255),
        Tile(64, 64, 64, 8, 3, 255),
        Tile(64, 32, 64, 8, 3, 255),
        6,
        Tile(64, 128, 32, 8, 3, 255),
    ),
    ("tf32", True): Mixers(Tile(16, 32, 64, 4, 3, 255), Tile(64, 64, 32, 8, 3, 255), Tile(64, 32, 32, 8, 3, 255), 5),
    ("ieee", True): Mixers(Tile(16, 32, 16, 4, 2, 255), Tile(32, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 255), 8),
    ("half", False): Mixers(Tile(16, 32, 32, 4, 2, 255), Tile(64, 32, 32, 8, 2, 255), Tile(32, 32, 32, 8, 2, 255), 4),
    ("tf32", False): Mixers(Tile(16, 32, 32, 4, 2, 255), Tile(64, 32, 32, 8, 2, 255), Tile(32, 32, 32, 8, 2, 255), 4),
    ("ieee", False): Mixers(Tile(16, 32, 16, 4, 2, 255), Tile(32, 32, 16, 8, 2, 255), Tile(32, 32, 16, 8, 2, 255), 8),
}

# By the model, workload A at 65,536 rows takes 543 us with 128 x 128, as each multiprocessor has one program and copies
# take two thirds longer than products. Where registers are given, the compiler spilled a few of this tile's on sm_86,
# 89 or 120 for the sake of more programs.
WEIGHT_GRADIENT = {
    ("half", True): Tile(128, 128, 64, 8, 3),
    ("tf32", True): Tile(128, 128, 32, 8, 3),
    ("ieee", True): Tile(64, 64, 16, 4, 2, 255),
    ("half", False): Tile(64, 64, 32, 8, 2, 255),
    ("tf32", False): Tile(64, 64, 32, 8, 2, 255),
    ("ieee", False): Tile(32, 32, 16, 4, 2, 255),
}

# For a loop that copies ahead, see ``last_forward``: by the model 211 us at 65,536 rows of workload A instead of 299
# with 64 x 128 x 32, and 20 instead of 25 at 4,096. In training three gates in sums that are split spill a few
# registers, on sm_80 and 86 others do, and Triton 3.9 does not compile it for sm_100.
AHEAD_MIXING = {("half", True): Tile(64, 128, 128, 8, 3, 255)}
AHEAD = (9, 0)  # the capability
ITEMSIZE = 2  # of bfloat16 and float16, which alone have such tiles

# Of a large card, see :class:`mtlkernels.ops._triton_splits.Card`, by the model for workload A at 65,536 rows: tiles of
# 128 x 256 read a quarter less than 128 x 128, and reading is what gradients wait for: 336 us for the inputs' instead
# of 413, 424 for the weights' instead of 543. On sm_80 the weights' spill.
# With relu's signs the compiler would take 140 registers, which leave a multiprocessor one program instead of two:
# 336 us instead of 214, of which memory takes 211. On other cards it would spill.
LARGE_SIGNS = {("half", True): Tile(128, 128, 32, 8, 3, 128)}
LARGE_INPUT = {("half", True): Tile(128, 256, 32, 8, 3)}
LARGE_WEIGHT = {("half", True): Tile(128, 256, 64, 8, 3)}

# Where LARGE_INPUT's columns do not fit a width, programs share it evenly: for 416 inputs 208 columns each instead of
# 256, of which a fifth would be absent, 293 us instead of 336. They are pieces of powers of two, each with products.
EVEN_INPUT = {("half", True): Tile(128, 256, 64, 8, 3, 255)}
PIECES = (128, 64, 32, 16)
MOST_PIECES = 3  # with a fourth, of 16, 240 columns would be little less than 256

# A product whose first operand passes through registers, to be normalized there, has less room: its steps along the
# depth are shorter.
LAYERWISE = {
    ("half", True): Tile(128, 128, 32, 8, 3, 255),
    ("tf32", True): Tile(64, 128, 32, 8, 3, 255),
    ("ieee", True): Tile(64, 64, 16, 8, 3, 255),
    ("half", False): Tile(64, 32, 32, 8, 2),
    ("tf32", False): Tile(32, 32, 32, 8, 2, 255),
    ("ieee", False): Tile(32, 32, 16, 8, 2, 255),
}
# What works value by value: a 16-byte load a thread in half precision. Without alignment each needs its own address.
# Where registers are not given, the compiler spills a few in Dice's gradient on sm_100 and 120.
VALUES = {True: Tile(16, 64, 1, 4, 1, 255), False: Tile(16, 32, 1, 4, 1, 255)}
# Of sums over a batch, eight such blocks of rows a program.
SUMS = {True: Tile(16, 64, 8, 4, 1), False: Tile(16, 32, 8, 4, 1)}
# Of sums over blocks: 32 of them at a time, one after another.
TOTALS = Tile(32, 32, 1, 4, 1)
# Of the channels that share a slope, one a thread at a time.
SLOPES = Tile(1, 128, 1, 4, 1)


def product(kind: Kind, rows: int, columns: int, heavy: bool = False) -> Tile:
    """For ``layer_forward`` and, mostly, ``input_gradient``; ``heavy``: the epilogue recomputes an activation."""
    choice = PRODUCT[kind.operands]
    if rows <= 2 * choice.short.rows:
        return choice.short
    return choice.narrow if heavy or columns <= choice.narrow.columns else choice.full


def hidden_gradient(kind: Kind, rows: int, columns: int, code: int, card: Card) -> Tile:
    """For ``input_gradient`` behind an activation."""
    tile = product(kind, rows, columns, heavy=from_input(code))
    fewer = LARGE_SIGNS.get(kind.operands) if card.large and code == CODES["relu"] else None
    return fewer if fewer and tile == PRODUCT[kind.operands].full else tile


def roomy(tile: Tile) -> Tile:
    """``tile`` for a product with linear gates, or that keeps signs; of two, the compiler would spill a few registers.

    In ``layer_forward``, without alignment on sm_86 and sm_89 alone; in ``input_gradient`` of split sums on sm_100.
    """
    spills = tile in (PRODUCT["ieee", True].full, PRODUCT["ieee", False].full)
    return replace(tile, registers=255) if spills else tile


def mixing(
    kind: Kind, gates: int, experts: int, rows: int, columns: int, depth: int, code: int, save: bool, card: Card
) -> Tile | None:
    """For ``last_forward`` with an activation of that code, which saves or does not; None for more gates than fit."""
    choice = MIXING[kind.operands]
    if gates > MAX_FUSED_GATES:
        return None
    if rows <= 2 * choice.short.rows:
        return choice.short
    if choice.wide and columns >= choice.wide.columns and gates <= FLAT_GATES.value and code <= CODES["leaky_relu"]:
        ahead = AHEAD_MIXING[kind.operands]
        sums = mixing_sums(ahead, experts, rows, columns, depth, gates, ITEMSIZE)
        spills = save and gates == FLAT_GATES.value and splits(sums, card.multiprocessors) > 1
        steps = depth > 0  # without any, that loop would not come to the biases
        return ahead if card.capability == AHEAD and steps and not spills else choice.wide
    return choice.full if gates <= choice.few else choice.many


def mixing_sums(tile: Tile, experts: int, rows: int, columns: int, depth: int, gates: int, itemsize: int) -> Sums:
    """What ``last_forward`` adds up: the experts, for every gate."""
    blocks = triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Sums(blocks, experts, _lines(tile) * depth * itemsize, gates * tile.rows * tile.columns)


def inputs(
    kind: Kind, members: Sequence[int], rows: int, columns: int, depth: int, itemsize: int, card: Card
) -> tuple[Tile, Sums]:
    """For ``input_gradient`` without an activation below; and what it adds up, see :func:`input_sums`."""
    few = rows <= 2 * PRODUCT[kind.operands].short.rows
    larger = LARGE_INPUT.get(kind.operands) if card.large and not few else None
    choice = [product(kind, rows, columns), *([larger] if larger else [])]
    return _smaller_or_larger(
        [(tile, input_sums(tile, members, rows, columns, depth, itemsize)) for tile in choice], card
    )


def even_input(kind: Kind, tile: Tile, columns: int) -> Tile | None:
    """For ``wide_input_gradient``, which serves what ``inputs`` chose ``tile`` for and is not split; None: it need not.

    It has as many programs.
    """
    even = EVEN_INPUT.get(kind.operands)
    if even is None or tile != LARGE_INPUT.get(kind.operands):
        return None
    each = 16 * triton.cdiv(triton.cdiv(columns, triton.cdiv(columns, tile.columns)), 16)
    return replace(even, columns=each) if each > PIECES[0] and 1 < len(pieces(each)) <= MOST_PIECES else None


def pieces(columns: int) -> tuple[int, ...]:
    """Powers of two that so many columns are, a multiple of 16; a single one where they are one themselves."""
    return tuple(piece for piece in (2 * PIECES[0], *PIECES) if columns & piece)


def piece_constants(tile: Tile) -> dict[str, tuple[tl.constexpr, ...]]:
    """The pieces of a tile's columns and where they start, in the constants that Triton 3.6 wants within tuples."""
    each = pieces(tile.columns)
    starts = (sum(each[:i]) for i in range(len(each)))
    return {"PIECES": tuple(map(tl.constexpr, each)), "STARTS": tuple(map(tl.constexpr, starts))}


def input_sums(tile: Tile, members: Sequence[int], rows: int, columns: int, depth: int, itemsize: int) -> Sums:
    """What ``input_gradient`` adds up: the experts of each group, of which there are ``members``."""
    blocks = len(members) * triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns)
    return Sums(blocks, max(members), _lines(tile) * depth * itemsize, tile.rows * tile.columns)


def weights(
    kind: Kind, shapes: Sequence[tuple[int, int, int]], rows: int, itemsize: int, card: Card
) -> tuple[Tile, Sums]:
    """For ``weight_gradient`` of so many layers of such outputs and inputs each; and what it adds up: the batch."""
    larger = LARGE_WEIGHT.get(kind.operands) if card.large else None
    choice = [WEIGHT_GRADIENT[kind.operands], *([larger] if larger else [])]
    return _smaller_or_larger([(tile, weight_sums(tile, shapes, rows, itemsize)) for tile in choice], card)


def weight_blocks(tile: Tile, experts: int, height: int, width: int) -> int:
    """The blocks of a layer's weights [E, height, width] in ``weight_gradient``; biases want at least one."""
    return experts * int(triton.cdiv(height, tile.rows) * triton.cdiv(max(width, 1), tile.columns))


def weight_sums(tile: Tile, shapes: Sequence[tuple[int, int, int]], rows: int, itemsize: int) -> Sums:
    """What ``weight_gradient`` adds up: the batch."""
    blocks = sum(weight_blocks(tile, *shape) for shape in shapes)
    part = (tile.columns + 1) * tile.rows
    return Sums(blocks, triton.cdiv(rows, tile.depth), _lines(tile) * tile.depth * itemsize, part)


def _smaller_or_larger(choice: Sequence[tuple[Tile, Sums]], card: Card) -> tuple[Tile, Sums]:
    """The last of one or two, if the busiest multiprocessor then moves a tenth fewer bytes than by the first.

    With less to gain, adding more parts takes longer: by the model, at 4,096 rows of workload A the weights' gradient
    would take 45 us instead of 38 for 6% fewer bytes.
    """
    first, last = (moved(sums, card.multiprocessors) for _, sums in (choice[0], choice[-1]))
    return choice[-1] if 10 * last <= 9 * first else choice[0]


def _lines(tile: Tile) -> int:
    """Rows and columns of operands that a program reads for a step along the depth."""
    return tile.rows + tile.columns
