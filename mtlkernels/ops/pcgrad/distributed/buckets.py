"""Gradients of several parameters as pieces of equal size, one a rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mtlkernels.ops.pcgrad.distributed.collectives import all_gather, mean_scatter

# Bytes that one call sends, all tasks together: as DistributedDataParallel's buckets, large enough for full bandwidth.
BUCKET_BYTES = 25 * 2**20


class _Piece(NamedTuple):
    """Elements [start, stop) of a parameter."""

    parameter: int
    start: int
    stop: int


class Buckets:
    """Parameters of one dtype, that have gradients of the same tasks, laid end to end and cut into equal buckets.

    A bucket holds ``shard`` elements a rank; the last one is padded. Memory beyond the shards is that of two buckets:
    one travels while the next one is packed.
    """

    def __init__(self, sizes: Sequence[int], num_tasks: int, dtype: torch.dtype, group: dist.ProcessGroup) -> None:
        total = sum(sizes)
        num_buckets = -(-total * num_tasks * dtype.itemsize // BUCKET_BYTES)
        self.group, self.num_tasks = group, num_tasks
        self.shard = -(-total // (num_buckets * group.size())) if num_buckets else 0
        self.sizes = sizes
        self.pieces = [list(pieces) for pieces in _cut(sizes, self.shard * group.size())]

    def scatter(self, grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
        """The mean over ranks of each task's gradients: for each bucket this rank's shard [tasks, shard].

        Args:
            grads: the tasks' gradients, parameter by parameter; None counts as zero.
            like: of the dtype and on the device of the gradients.
        """
        zeros = like.new_zeros(self.shard * self.group.size())
        return list(_one_ahead(mean_scatter(self._packed(grads, pieces, zeros), self.group) for pieces in self.pieces))

    def _packed(self, grads: Sequence[Tensor | None], pieces: list[_Piece], zeros: Tensor) -> Tensor:
        """A bucket as [ranks, tasks, shard]."""
        padding = len(zeros) - sum(stop - start for _, start, stop in pieces)
        parts = []
        for task in range(self.num_tasks):
            for p, start, stop in pieces:
                grad = grads[p * self.num_tasks + task]
                parts.append(zeros[: stop - start] if grad is None else grad.reshape(-1)[start:stop])
            parts.append(zeros[:padding])
        by_task = torch.cat(parts).view(self.num_tasks, self.group.size(), self.shard)
        return by_task.transpose(0, 1).contiguous()

    def gather(self, shards: Sequence[Tensor], like: Tensor) -> list[Tensor]:
        """All elements of each parameter, [size], from a [shard] a bucket on every rank; ``like`` as above."""
        results = [like.new_empty(size) for size in self.sizes]
        for bucket, pieces in zip(_one_ahead(all_gather(s, self.group) for s in shards), self.pieces, strict=True):
            flat = bucket.view(-1)
            at = 0
            for p, start, stop in pieces:
                results[p][start:stop].copy_(flat[at : at + stop - start])
                at += stop - start
        return results


def _cut(sizes: Sequence[int], length: int) -> Iterator[Iterable[_Piece]]:
    """For each ``length`` elements of the parameters end to end, the pieces that they are of."""
    pieces: list[_Piece] = []
    room = length
    for p, size in enumerate(sizes):
        start = 0
        while start < size:
            stop = min(size, start + room)
            pieces.append(_Piece(p, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield pieces
                pieces, room = [], length
    if pieces:
        yield pieces


def _one_ahead(started: Iterable[Callable[[], Tensor]]) -> Iterator[Tensor]:
    """The results, each waited for when the next has been started."""
    previous = None
    for finish in started:
        if previous is not None:
            yield previous()
        previous = finish
    if previous is not None:
        yield previous()
