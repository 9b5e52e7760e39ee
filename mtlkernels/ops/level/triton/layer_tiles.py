"""The launch configurations of the normalized mixture's kernels: fixed, and reasoned rather than tuned.

As those of the expert mixture they keep every kernel within 255 registers a thread without spilling. A product whose
first operand passes through registers, to be normalized there, has less room: its steps along the depth are shorter.
"""

from __future__ import annotations

from mtlkernels.ops._triton import Tile

LAYER = {
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
