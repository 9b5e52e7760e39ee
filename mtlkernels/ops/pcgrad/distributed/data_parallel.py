"""Data parallelism: every rank holds the gradients of its part of the batch, of all parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.distributed.agreement import ColumnFacts, agree, facts_of, succeed_together
from mtlkernels.ops.pcgrad.distributed.buckets import Buckets
from mtlkernels.ops.pcgrad.distributed.sparse import mean_column
from mtlkernels.ops.pcgrad.parameters import Parameters

Result = TypeVar("Result")


class DataParallel:
    """The mean over the ranks of a group of T gradients for each of P parameters; in use like :class:`Parameters`.

    Dense gradients are reduced and scattered: of each, every rank has one shard, takes part in the Gram matrix with it,
    and projects it; then the results are gathered. That is (T + 1) / 2T of the traffic of T all-reduces, and T / ranks
    of the memory. Parameters with sparse gradients are small in what they hold: every rank gathers all of it.

    Raises:
        ValueError: on every rank, if the ranks' gradients or options differ.
        RuntimeError: another rank has failed.
    """

    def __init__(self, mine: Parameters, group: dist.ProcessGroup, options: dict[str, Any]) -> None:
        facts = agree(group, facts_of(mine, options))
        self.num_tasks, self.group, self._mine, self._facts = mine.num_tasks, group, mine, facts.columns
        # A rank that has no gradient at all, where others have some on GPUs, takes its own current GPU.
        known = facts.device in (None, mine.device.type)
        self.device = mine.device if known else torch.empty(0, device=facts.device).device
        self._empty = facts.device is None
        with torch.no_grad():
            self._with_sparse = [p for p, column in enumerate(facts.columns) if any(column.kinds)]
            gathered: list[Tensor | None] = []
            for p in self._with_sparse:
                gathered += mean_column(mine.column(p), facts.columns[p], self.device, group)
            self._gathered = Parameters(gathered, self.num_tasks)
            self._buckets: list[tuple[list[int], Buckets]] = []
            shards: list[Tensor | None] = []
            for (dtype, kinds), members in _alike(facts.columns).items():
                tasks = [t for t, kind in enumerate(kinds) if kind is not None]
                sizes = [torch.Size(facts.columns[p].shape or ()).numel() for p in members]
                buckets = Buckets(sizes, len(tasks), dtype, group)
                grads = [mine.column(p)[t] for p in members for t in tasks]
                for shard in buckets.scatter(grads, torch.empty(0, dtype=dtype, device=self.device)):
                    by_task = dict(zip(tasks, shard, strict=True))
                    shards += [by_task.get(t) for t in range(self.num_tasks)]
                self._buckets.append((members, buckets))
            self._shards = Parameters(shards, self.num_tasks)

    def gram(self) -> Tensor:
        """[T, T] in float64, the same on every rank."""
        gram = self._shards.gram().to(self.device)
        if self._with_sparse and self.group.rank() == 0:  # every rank has these: they count once
            gram = gram + self._gathered.gram()
        if not self._empty:
            dist.all_reduce(gram, group=self.group)
        return gram

    def agreed(self, coefficients: Tensor) -> Tensor:
        """The coefficients of the group's rank 0, whose order of projections they stand for."""
        if not self._empty:
            dist.broadcast(coefficients, group=self.group, group_src=0)
        return coefficients

    def succeed_together(self, function: Callable[[], Result]) -> Result:
        """Calls what may fail on some ranks of the group; an exception becomes one on all of them."""
        return succeed_together([self.group], function)

    @torch.no_grad()
    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The sum over tasks of coefficient times mean gradient, for each parameter; the same on every rank."""
        results: list[Tensor | None] = [None] * len(self._facts)
        for p, result in zip(self._with_sparse, self._gathered.combine(coefficients), strict=True):
            results[p] = result
        shards = iter(self._shards.combine(coefficients))
        for members, buckets in self._buckets:
            mine = [shard for shard in islice(shards, len(buckets.pieces)) if shard is not None]
            like = torch.empty(0, dtype=self._facts[members[0]].dtype, device=self.device)
            for p, flat in zip(members, buckets.gather(mine, like), strict=True):
                results[p] = _laid_out(flat.view(self._facts[p].shape or ()), self._mine.column(p))
        return results


def _alike(columns: Sequence[ColumnFacts]) -> dict[tuple[torch.dtype, tuple[int | None, ...]], list[int]]:
    """The parameters with dense gradients alone, by dtype and by the tasks that have one."""
    members: dict[tuple[torch.dtype, tuple[int | None, ...]], list[int]] = {}
    for p, column in enumerate(columns):
        if column.dtype is not None and not any(column.kinds):
            members.setdefault((column.dtype, column.kinds), []).append(p)
    return members


def _laid_out(result: Tensor, column: Sequence[Tensor | None]) -> Tensor:
    """The result in the memory format of this rank's gradients, where these have one."""
    first = first_of(column)
    if first is None or any(grad.stride() != first.stride() for grad in column if grad is not None):
        return result
    like = torch.empty_like(first)
    return result if like.stride() == result.stride() else like.copy_(result)
