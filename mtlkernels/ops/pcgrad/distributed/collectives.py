"""The collectives that move gradients, under their names of PyTorch 2.13 or before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather(mine: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts to gather [n] of every rank; the result waits, and returns [ranks, n]."""
    gathered = mine.new_empty(group.size(), *mine.shape)
    # Any, as torch 2.15 knows that there is no work for a rank outside the group, which does not come here.
    work: Any = _ALL_GATHER(gathered.view(-1), mine.view(-1), group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        return gathered

    return finish


def exchanges(rows: Tensor) -> bool:
    """Whether ranks exchange their rows and each takes its own mean, instead of the backend's reduce-scatter.

    On a CPU. That moves the same bytes, where gloo makes an all-reduce of a reduce-scatter, with twice the traffic, and
    MPI has none; and the mean is rounded once.
    """
    return rows.is_cpu


def mean_scatter(stacked: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts to average [ranks, ...] over the ranks, row r for rank r; the result waits, and returns this rank's row.

    A reduce-scatter adds up gradients that are divided beforehand, as DistributedDataParallel does.
    """
    work: Any
    if exchanges(stacked):
        rows = torch.empty_like(stacked)
        work = dist.all_to_all_single(rows, stacked, group=group, async_op=True)
    else:
        rows = torch.empty_like(stacked[:1])
        divided = stacked.div_(group.size())
        work = _REDUCE_SCATTER(rows.view(-1), divided.view(-1), group=group, async_op=True)

    def finish() -> Tensor:
        work.wait()
        if len(rows) == 1:  # reduced already
            return rows[0]
        total = rows[0].to(torch.float64)
        for row in rows[1:]:
            total += row
        return total.div_(group.size()).to(rows.dtype)

    return finish
