"""What the optimizers refuse of FSDP2 before they compute anything, on one rank and on two replicas of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

import mtlkernels as mk
from tests import requires

pytestmark = requires.gloo
NO_SYNC, NO_ALL_REDUCE = FSDPModule.set_requires_gradient_sync, FSDPModule.set_requires_all_reduce


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def build(*, replicas: bool, plain: bool) -> tuple[Any, mk.optim.PCGrad, Callable[[], list[Tensor]]]:
    """A sharded trunk of two units, maybe beside a plain parameter that every loss reaches."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    names = ("replica", "shard") if replicas else ("shard",)
    mesh = init_device_mesh("cpu", (1,) * len(names), mesh_dim_names=names)
    for module in (trunk[0], trunk):
        fully_shard(module, mesh=mesh)
    variances = nn.Parameter(torch.zeros(2))
    optimizer = mk.optim.PCGrad(torch.optim.SGD([*trunk.parameters(), variances]), shared=trunk.parameters())
    x = torch.randn(6, 4)
    return trunk, optimizer, lambda: list(trunk(x).square().mean(0) + (variances if plain else 0))


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(("turn", "replicas"), [(NO_SYNC, False), (NO_SYNC, True), (NO_ALL_REDUCE, True)])
@pytest.mark.parametrize("part", [False, True])
def test_reductions_that_are_off(turn: Any, replicas: bool, plain: bool, part: bool) -> None:
    """Of one unit of two, too; the next call is as if this one had not been."""
    trunk, optimizer, losses = build(replicas=replicas, plain=plain)
    expected = optimizer.pc_backward(losses())
    optimizer.zero_grad()
    turn(trunk[0] if part else trunk, False)
    with pytest.raises(RuntimeError, match="FSDP must reduce the gradients of every backward pass"):
        optimizer.pc_backward(losses())
    assert all(parameter.grad is None for parameter in trunk.parameters())
    turn(trunk, True)
    assert torch.equal(optimizer.pc_backward(losses()), expected)


def test_no_all_reduce_without_replicas() -> None:
    """A setting that changes nothing."""
    trunk, optimizer, losses = build(replicas=False, plain=False)
    trunk.set_requires_all_reduce(False)
    assert optimizer.pc_backward(losses()).any()


@pytest.mark.parametrize(("turn", "replicas"), [(NO_SYNC, False), (NO_ALL_REDUCE, True)])
def test_gradients_that_were_held_back(turn: Any, replicas: bool) -> None:
    """Those of an ordinary backward pass before: they would land in the first task's gradient."""
    trunk, optimizer, losses = build(replicas=replicas, plain=False)
    expected = optimizer.pc_backward(losses())
    optimizer.zero_grad()
    turn(trunk, False)
    torch.stack(losses()).sum().backward()
    turn(trunk, True)
    with pytest.raises(RuntimeError, match="FSDP must hold no gradients of earlier backward passes"):
        optimizer.pc_backward(losses())
    torch.stack(losses()).sum().backward()
    assert all(isinstance(parameter.grad, DTensor) for parameter in trunk.parameters())
    optimizer.zero_grad()
    assert torch.equal(optimizer.pc_backward(losses()), expected)


def test_units_of_other_models() -> None:
    """They may accumulate as they like."""
    other, _, _ = build(replicas=False, plain=False)
    other.set_requires_gradient_sync(False)
    _, optimizer, losses = build(replicas=False, plain=False)
    assert optimizer.pc_backward(losses()).any()
