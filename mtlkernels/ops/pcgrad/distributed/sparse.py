"""Parameters with sparse gradients under data parallelism: every rank gathers what all ranks hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mtlkernels.ops.pcgrad.distributed.agreement import ColumnFacts
from mtlkernels.ops.pcgrad.distributed.collectives import all_gather


def mean_column(
    column: Sequence[Tensor | None], facts: ColumnFacts, device: torch.device, group: dist.ProcessGroup
) -> list[Tensor | None]:
    """The mean over ranks of one parameter's gradients, of which at least one is sparse.

    A gradient that is sparse stays so; the ranks' entries are added up in float64. One that is dense, for another task,
    is reduced in one piece. On a GPU this waits for the numbers of entries.
    """
    results: list[Tensor | None] = []
    for grad, kind in zip(column, facts.kinds, strict=True):
        if kind is None:
            results.append(None)
        elif kind:
            results.append(_mean_sparse(grad, kind, facts, device, group))
        else:
            shape = facts.shape or ()
            total = torch.zeros(shape, dtype=facts.dtype, device=device) if grad is None else grad / group.size()
            total = total.contiguous()  # memory is added up in its order, of which ranks have their own
            dist.all_reduce(total, group=group)
            results.append(total)
    return results


def _mean_sparse(
    grad: Tensor | None, sparse_dim: int, facts: ColumnFacts, device: torch.device, group: dist.ProcessGroup
) -> Tensor:
    shape = facts.shape or ()
    if grad is None:
        indices = torch.empty(sparse_dim, 0, dtype=torch.int64, device=device)
        values = torch.empty(0, *shape[sparse_dim:], dtype=facts.dtype, device=device)
    else:
        if not grad.is_coalesced():  # one entry a row to send
            grad = grad.to(torch.float64).coalesce()
        indices, values = grad._indices(), grad._values().to(facts.dtype)
    counts = all_gather(torch.tensor([len(values)], device=device), group)().flatten().tolist()
    all_indices = _gathered(indices.T, counts, group)
    all_values = _gathered(values, counts, group).to(torch.float64) / group.size()
    mean = torch.sparse_coo_tensor(all_indices.T, all_values, shape, check_invariants=False)
    return mean.coalesce().to(facts.dtype)


def _gathered(mine: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """[sum of counts, ...] from [counts[r], ...] of rank r, which is padded to the longest for the way."""
    padded = mine.new_zeros(max(counts), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = all_gather(padded, group)()
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
