"""The optimizers and tensor parallelism: against one process that has plain parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import mtlkernels as mk
from tests.distributed.cases import assert_refused, assert_same_on_all_ranks
from tests.distributed.weighting import Shuffled, equal_norms

Losses = Callable[[], list[Tensor]]


def towers_on_a_plain_trunk(*, parallel: bool) -> tuple[nn.ModuleDict, Losses]:
    torch.manual_seed(3)
    trunk = mk.nn.MMoE(5, 3, (7, 4), num_experts=2, activation="tanh")
    towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in range(3))
    model = nn.ModuleDict({"trunk": trunk, "towers": towers}).double()
    if parallel:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for tower in towers:
            parallelize_module(tower, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    x, targets = torch.randn(8, 5, dtype=torch.float64), torch.randn(3, 8, 1, dtype=torch.float64)
    return model, lambda: [
        (tower(h) - y).square().mean() for tower, h, y in zip(towers, trunk(x), targets, strict=True)
    ]


def assert_alike(found: Sequence[Any], expected: Sequence[Any]) -> None:
    for grad, want in zip(found, expected, strict=True):
        assert (grad is None) == (want is None)
        if want is not None:
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert torch.allclose(whole, want, rtol=1e-11, atol=1e-13)


def check_plain_trunks_follow_the_first_rank() -> None:
    """Ranks draw other orders, or have weightings of their own."""

    def train(parallel: bool, random_weights: bool) -> list[Any]:
        model, losses = towers_on_a_plain_trunk(parallel=parallel)
        sgd, shared = torch.optim.SGD(model.parameters(), lr=0.5), model["trunk"].parameters()
        if random_weights:
            optimizer = mk.optim.GramWeighted(sgd, Shuffled(own=parallel), shared=shared)
        else:
            generator = torch.Generator().manual_seed(5 + parallel * dist.get_rank())
            optimizer = mk.optim.PCGrad(sgd, shared=shared, generator=generator)
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.backward(losses())
            optimizer.step()
        return list(model.parameters())

    for random_weights in (False, True):
        found = train(True, random_weights)
        assert_alike(found, train(False, random_weights))
        assert_same_on_all_ranks([parameter for parameter in found if not isinstance(parameter, DTensor)])


def check_a_failing_weighting_reaches_every_rank() -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    model, losses = towers_on_a_plain_trunk(parallel=True)
    weighting = (lambda gram: gram) if last else equal_norms
    sgd = torch.optim.SGD(model.parameters())
    optimizer = mk.optim.GramWeighted(sgd, weighting, shared=model["trunk"].parameters())
    words = "weighting must return a weight a task"
    kind, told = (ValueError, words) if last else (RuntimeError, f"another rank has failed: ValueError: {words}")
    assert_refused(lambda: optimizer.backward(losses()), kind, told)
    assert all(parameter.grad is None for parameter in model.parameters())


def check_sequence_parallelism() -> None:
    """Replicated parameters get parts of a sum for gradients."""

    def gradients(parallel: bool) -> list[Any]:
        torch.manual_seed(3)
        model: Any = nn.ModuleDict({"norm": nn.LayerNorm(6), "a": nn.Linear(6, 8), "b": nn.Linear(8, 3)}).double()
        x, rows = torch.randn(8, 6, dtype=torch.float64), slice(None)
        if parallel:
            size = dist.get_world_size()
            rows = slice(dist.get_rank() * 8 // size, (dist.get_rank() + 1) * 8 // size)
            plan = {
                "norm": SequenceParallel(sequence_dim=0),
                "a": ColwiseParallel(input_layouts=Shard(0)),
                "b": RowwiseParallel(),
            }
            parallelize_module(model, init_device_mesh("cpu", (size,)), plan)

        def losses() -> list[Tensor]:
            return list(model["b"](model["a"](model["norm"](x[rows])).relu()).square().mean(0))

        losses()[0].backward()
        assert not parallel or model["norm"].weight.grad.placements == (Partial(),)
        model.zero_grad()
        weighting = Shuffled(own=False)
        mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), weighting).backward(losses())
        return [parameter.grad for parameter in model.parameters()]

    assert_alike(gradients(True), gradients(False))


def check_experts_that_a_loss_does_not_reach() -> None:
    """Each task's loss by itself, then both by PCGrad."""

    def gradients(parallel: bool) -> list[Any]:
        torch.manual_seed(3)
        trunk: Any = mk.nn.CGC(5, 2, (8, 4), num_specific=1, num_shared=1).double()
        if parallel:
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            for expert in trunk.level.experts:
                parallelize_module(expert, mesh, {"linears.0": ColwiseParallel(), "linears.1": RowwiseParallel()})
        x, found = torch.randn(6, 5, dtype=torch.float64), []
        for task in range(2):
            trunk.zero_grad()
            trunk(x)[task].square().mean().backward()
            found += [parameter.grad for parameter in trunk.parameters()]
        trunk.zero_grad()
        optimizer = mk.optim.GramWeighted(torch.optim.SGD(trunk.parameters()), Shuffled(own=False))
        optimizer.backward([h.square().mean() for h in trunk(x)])
        return found + [parameter.grad for parameter in trunk.parameters()]

    expected = gradients(False)
    assert any(grad is None for grad in expected)
    assert_alike(gradients(True), expected)
