"""What only loss.backward() serves is refused: no parameter is silently left untrained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from tests import requires
from tests.seeding import seed


class Model(nn.Module):
    """A trunk, as modules or as a level, a layer that nobody uses, and two heads."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        seed(0)
        self.trunk: nn.Module = mk.nn.MMoE(12, 2, (8,), num_experts=2) if fused else nn.Linear(12, 8)
        self.idle = nn.Linear(2, 2)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(2))

    def forward(self, x: Tensor, reentrant: bool | None = None) -> list[Tensor]:
        found = self.trunk(x) if reentrant is None else checkpoint(self.trunk, x, use_reentrant=reentrant)
        streams = [found] * 2 if isinstance(found, Tensor) else found
        return [head(h).square().mean() for head, h in zip(self.heads, streams, strict=True)]


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_reentrant_checkpoints(fused: bool, batched: bool | None) -> None:
    model, x = Model(fused), torch.randn(20, 12, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), batched=batched)
    with pytest.raises(RuntimeError, match="call it with use_reentrant=False"):
        optimizer.pc_backward(model(x, reentrant=True))
    assert all(p.grad is None for p in model.parameters())
    if batched is not True:  # which checkpoints do not stand
        optimizer.pc_backward(model(x, reentrant=False))
        assert all(p.grad is not None for p in model.trunk.parameters())


def test_a_part_of_the_trunk_that_is_hidden() -> None:
    """Also in a later call, and of the others' parameters, beside some that nothing reaches."""
    model, front = Model(False), nn.Linear(12, 12)
    x = torch.randn(20, 12, requires_grad=True)
    parameters = [*model.parameters(), *front.parameters()]
    optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters), shared=model.trunk.parameters())
    optimizer.pc_backward(model(front(x)))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.pc_backward(model(checkpoint(front, x, use_reentrant=True)))
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        optimizer.pc_backward(model(checkpoint(front, x, use_reentrant=True)))


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_parameters_that_something_else_reaches(fused: bool, batched: bool | None) -> None:
    """Hidden from one loss alone, or beside a penalty that sees them; also where a call before had no such loss."""
    model, x = Model(fused), torch.randn(20, 12, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), batched=batched)
    optimizer.pc_backward(model(x)[:1])
    before = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    penalty = sum(p.square().sum() for p in model.parameters())
    seen, hidden = model(x), model(x, reentrant=True)
    head = checkpoint(nn.Sequential(nn.Linear(12, 8), model.heads[1]), x, use_reentrant=True).sum()
    for losses in ([loss + penalty for loss in hidden], [seen[0], hidden[1]], [seen[0], head]):
        with pytest.raises(RuntimeError, match="use_reentrant=False"):
            optimizer.pc_backward(losses)
    for parameter, grad in zip(model.parameters(), before, strict=True):
        assert (parameter.grad is None) == (grad is None) and (grad is None or torch.equal(parameter.grad, grad))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP", "ignore:.*NO_SHARD")
def test_the_older_fsdp() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    def sharded(keeps_parameters: bool) -> Any:
        return FullyShardedDataParallel(
            nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 2)),
            use_orig_params=keeps_parameters,
            device_id=torch.device("cpu"),
        )

    model = sharded(True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    with pytest.raises(RuntimeError, match="fully_shard"):
        optimizer.pc_backward(list(model(torch.randn(20, 12)).square().mean(0)))
    with pytest.raises(ValueError, match="optimizer must hold a model's own parameters"):
        mk.optim.PCGrad(torch.optim.SGD(sharded(False).parameters()))


@requires.gloo
@pytest.mark.usefixtures("one_process")
def test_static_graphs() -> None:
    """DistributedDataParallel would take the call for its first backward pass, and reduce nothing in later ones."""
    from torch.nn.parallel import DistributedDataParallel

    model, x = nn.Linear(12, 2), torch.randn(20, 12)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    wrapped = DistributedDataParallel(model, static_graph=True)

    def losses() -> list[Tensor]:
        return list(wrapped(x).square().mean(0))

    for _ in range(2):
        with pytest.raises(RuntimeError, match="DistributedDataParallel with static_graph=True"):
            optimizer.pc_backward(losses())
        assert all(parameter.grad is None for parameter in model.parameters())
    early = losses()
    torch.stack(losses()).sum().backward()
    for later in (early, losses()):
        optimizer.zero_grad()
        optimizer.pc_backward(later)
        assert all(parameter.grad is not None for parameter in model.parameters())
