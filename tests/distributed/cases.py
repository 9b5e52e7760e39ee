"""Gradients of several ranks, which every rank makes all of, so that each can check the result alone."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mtlkernels.testing import random_task_gradients

Grads = list[list[Tensor | None]]


def world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def random_rank_gradients(seed: int, ranks: int) -> tuple[list[Grads], Tensor]:
    """For each rank gradients of its own, some of them None on it, and an order."""
    case = random_task_gradients(seed)
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    missing = rng.choice((0.0, 0.3))
    found: list[Grads] = []
    for _ in range(ranks):
        rows: Grads = []
        for row in case.grads:
            own: list[Tensor | None] = []
            for grad in row:
                if grad is None or rng.random() < missing:
                    own.append(None)
                    continue
                factor = 1 + 0.5 * torch.randn(grad.shape, generator=generator, dtype=torch.float64)
                own.append(torch.empty_like(grad).copy_(grad.double() * factor))
            rows.append(own)
        found.append(rows)
    return found, case.order


def mean_gradients(ranks: Sequence[Grads]) -> Grads:
    """The mean over ranks, None where no rank has any: in float64, rounded to the dtype once."""
    return [[_mean(list(grads), len(ranks)) for grads in zip(*rows, strict=True)] for rows in zip(*ranks, strict=True)]


def _mean(grads: list[Tensor | None], ranks: int) -> Tensor | None:
    found = [grad for grad in grads if grad is not None]
    if not found:
        return None
    total = sum(grad.to_dense().double() for grad in found)
    assert isinstance(total, Tensor)
    return (total / ranks).to(found[0].dtype)


def bits(tensor: Any) -> bytes | None:
    if tensor is None:
        return None
    dense = tensor.to_dense().contiguous()
    return hashlib.sha256(dense.flatten().view(torch.uint8).numpy().tobytes() if dense.numel() else b"").digest()


def assert_same_on_all_ranks(tensors: Sequence[Tensor | None], group: dist.ProcessGroup | None = None) -> None:
    mine = [bits(tensor) for tensor in tensors]
    found: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, mine, group=group)
    assert all(other == mine for other in found)


def assert_refused(function: Any, kind: type[Exception], *parts: str) -> None:
    """The call raises ``kind`` with a message that contains ``parts``, on this rank."""
    try:
        function()
    except kind as error:
        assert type(error) is kind, repr(error)
        for part in parts:
            assert part in str(error), str(error)
    else:
        raise AssertionError(f"no {kind.__name__}")
