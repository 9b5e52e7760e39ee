"""A converted model under DistributedDataParallel."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mtlkernels as mk
from tests.convert.models import by_name, features, rechub_mmoe, rechub_ple

ROWS = 40


def check_gradients_are_the_mean_of_all_ranks() -> None:
    """As the library's own model makes them of each rank's rows; wrapped before and after the conversion."""
    for make in (rechub_ple, rechub_mmoe):
        for wrap_first in (False, True):
            model = make()
            original = copy.deepcopy(model)
            if not wrap_first:
                assert mk.convert(model, force=True).replaced
            wrapped: Any = DistributedDataParallel(model)
            if wrap_first:
                assert mk.convert(wrapped, force=True).replaced
            wrapped(by_name(features(ROWS, dist.get_rank()).float())).square().sum().backward()
            for rank in range(dist.get_world_size()):
                (original(by_name(features(ROWS, rank).float())).square().sum() / dist.get_world_size()).backward()
            largest = max(p.grad.norm().item() for p in original.parameters())
            for (name, found), expected in zip(model.named_parameters(), original.parameters(), strict=True):
                assert (found.grad - expected.grad).norm().item() <= 1e-5 * largest, name


def check_gradients_under_autocast() -> None:
    """As the converted model makes them of each rank's rows: casts of all of a level's weights are one node."""
    model = rechub_ple()
    assert mk.convert(model, force=True).replaced
    alone, wrapped = copy.deepcopy(model), DistributedDataParallel(model)

    def differentiate(module: Any, rank: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            predictions = module(by_name(features(ROWS, rank).float()))
        predictions.float().square().sum().backward()

    differentiate(wrapped, dist.get_rank())
    for rank in range(dist.get_world_size()):
        differentiate(alone, rank)
    for (name, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert found.grad.dtype is torch.float32, name
        torch.testing.assert_close(found.grad, expected.grad / dist.get_world_size(), msg=name)


def check_training_keeps_ranks_alike() -> None:
    """Parameters stay the same on all ranks, and the optimizer made before the conversion goes on."""
    model = rechub_ple()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mk.convert(model, force=True)
    wrapped: Any = DistributedDataParallel(model)
    before = [p.detach().clone() for p in model.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        rows = by_name(features(ROWS, 10 * step + dist.get_rank()).float())
        (wrapped(rows) - 0.3).square().sum().backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = flat.clone()
    dist.broadcast(first, 0)
    assert torch.equal(flat, first)
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
