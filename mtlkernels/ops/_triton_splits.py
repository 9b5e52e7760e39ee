"""Into how many parts a sum is split where a launch would have too few blocks for a GPU's multiprocessors.

Blocks of an output are one program each, which adds many terms: the experts that a gate mixes or that read a stream, or
the rows of a batch. Where blocks are fewer than multiprocessors, several programs share one. Each stores its part in
float32, and the last one to arrive adds all of them, in the same order every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from mtlkernels.ops._table import Table

# The last program adds the parts alone.
MAX_SPLITS = 32


@dataclass(frozen=True)
class Sums:
    """Sums that a launch computes.

    Args:
        blocks: how many blocks of outputs there are.
        terms: how many pieces the sum of a block has.
        term: the bytes that a program reads for one piece.
        part: the float32 elements that it adds up.
    """

    blocks: int
    terms: int
    term: int
    part: int


LARGE = ((9, 0), (10, 0))


class Card(NamedTuple):
    """What of a GPU decides launch configurations: its multiprocessors, and their compute capability."""

    multiprocessors: int
    capability: tuple[int, int]

    @property
    def large(self) -> bool:
        """Whether a multiprocessor has 227 KiB of shared memory and products of groups of warps."""
        return self.capability in LARGE


_H100 = Card(132, (9, 0))


@lru_cache(maxsize=64)
def card(device: torch.device) -> Card:
    """A GPU's; where there is none, an H100's."""
    if device.type != "cuda":
        return _H100
    multiprocessors = int(torch.cuda.get_device_properties(device).multi_processor_count)
    return Card(multiprocessors, torch.cuda.get_device_capability(device))


def splits(sums: Sums, multiprocessors: int) -> int:
    """The number of programs a block with which the busiest multiprocessor moves the fewest bytes."""
    return _fewest(sums, multiprocessors)[1]


def moved(sums: Sums, multiprocessors: int) -> int:
    """How many bytes that are."""
    return _fewest(sums, multiprocessors)[0]


@lru_cache(maxsize=4096)
def _fewest(sums: Sums, multiprocessors: int) -> tuple[int, int]:
    """Bytes, and the number of programs."""

    def moved(count: int) -> int:
        waves = _quotient(sums.blocks * count, multiprocessors)
        terms = waves * _quotient(sums.terms, count) * sums.term
        if count == 1:
            return terms
        return terms + (waves + count * _quotient(sums.blocks, multiprocessors)) * 4 * sums.part

    most = min(sums.terms, MAX_SPLITS, 2 * multiprocessors // max(sums.blocks, 1))
    return min((moved(count), count) for count in range(1, max(most, 1) + 1))


def _quotient(a: int, b: int) -> int:
    """Rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Split:
    """How a launch is split: its programs, and where its parts and counters are in the call's table."""

    programs: int
    count: int = 1
    parts: Tensor | None = None
    at_parts: int = 0
    at_counters: int = 0

    @property
    def arguments(self) -> tuple[int, int, int]:
        """As the kernels take them."""
        return self.at_parts, self.at_counters, self.count


def split(table: Table, sums: Sums, like: Tensor) -> Split:
    """Chooses the number of programs a block; appends the address of the parts, and counters at zero."""
    count = splits(sums, card(like.device).multiprocessors)
    if count == 1:
        return Split(sums.blocks)
    parts = table.room(like, (sums.blocks * count * sums.part,), torch.float32)
    at_parts = table.pointers([parts])
    return Split(sums.blocks * count, count, parts, at_parts, table.integers([0] * sums.blocks))
