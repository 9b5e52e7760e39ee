"""The optimizers beside DTensors, on a mesh of one rank: what ranks agree on, placements, pickles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import mtlkernels as mk
from tests import requires

pytestmark = requires.gloo


def plain_trunk(mesh: DeviceMesh) -> tuple[nn.Module, nn.ModuleList, Callable[[], list[Tensor]]]:
    """A trunk whose parameters are plain, tensor-parallel towers on it, and their losses."""
    torch.manual_seed(0)
    trunk = nn.Linear(5, 4)
    towers = nn.ModuleList(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)) for _ in range(2))
    for tower in towers:
        parallelize_module(tower, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    x = torch.randn(6, 5)
    return trunk, towers, lambda: [tower(trunk(x)).square().mean() for tower in towers]


def equal_norms(gram: Tensor) -> Tensor:
    return gram.diagonal().rsqrt()


def with_equal_norms(optimizer: torch.optim.Optimizer, **options: Any) -> mk.optim.GramWeighted:
    return mk.optim.GramWeighted(optimizer, equal_norms, **options)


@pytest.mark.parametrize("wrap", [mk.optim.PCGrad, with_equal_norms])
def test_ranks_of_other_parameters_agree_on_weights(wrap: Callable[..., Any], mesh: DeviceMesh) -> None:
    """The weights of the mesh's first rank, here ones that nobody else could have, although the trunk is on no mesh."""
    trunk, towers, losses = plain_trunk(mesh)
    optimizer = wrap(torch.optim.SGD([*trunk.parameters(), *towers.parameters()]), shared=trunk.parameters())
    expected = torch.autograd.grad(7 * losses()[0] - 2 * losses()[1], list(trunk.parameters()))

    def broadcast(weights: Tensor, *args: Any, **options: Any) -> None:
        weights.copy_(torch.tensor([7.0, -2.0]))

    with mock.patch.object(dist, "broadcast", broadcast):
        optimizer.backward(losses())
    for parameter, want in zip(trunk.parameters(), expected, strict=True):
        assert parameter.grad is not None and torch.allclose(parameter.grad, want, rtol=1e-5, atol=1e-6)


def test_another_rank_of_other_parameters_fails(mesh: DeviceMesh) -> None:
    trunk, towers, losses = plain_trunk(mesh)
    parameters = [*trunk.parameters(), *towers.parameters()]
    optimizer = with_equal_norms(torch.optim.SGD(parameters), shared=trunk.parameters())

    def gather(items: list[Any], mine: Any, **options: Any) -> None:
        items[0] = "ValueError: no weights"

    with (
        mock.patch.object(dist, "all_gather_object", gather),
        pytest.raises(RuntimeError, match="another rank has failed: ValueError: no weights"),
    ):
        optimizer.backward(losses())
    assert all(parameter.grad is None for parameter in parameters)


def test_no_gradient_reaches_the_trunk(mesh: DeviceMesh) -> None:
    """Ranks agree then, too, so that none of them waits for another."""
    trunk, towers, _ = plain_trunk(mesh)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([*trunk.parameters(), *towers.parameters()]), shared=trunk.parameters())
    with mock.patch.object(dist, "broadcast") as broadcast:
        gram = optimizer.pc_backward([tower(torch.ones(2, 4)).sum() for tower in towers])
    assert not gram.any() and broadcast.called and trunk.weight.grad is None


@pytest.mark.parametrize("is_shared", [True, False])
def test_sums_that_no_rank_has_taken(is_shared: bool, mesh: DeviceMesh) -> None:
    """Sequence parallelism leaves a replicated parameter's gradients as parts of a sum."""
    x = torch.randn(5, 6)

    def build(parallel: bool) -> tuple[nn.ModuleDict, list[Tensor]]:
        torch.manual_seed(0)
        model = nn.ModuleDict({"norm": nn.LayerNorm(6), "a": nn.Linear(6, 8), "b": nn.Linear(8, 2)})
        if parallel:
            sequence = SequenceParallel(sequence_dim=0)
            plan = {"norm": sequence, "a": ColwiseParallel(input_layouts=Shard(0)), "b": RowwiseParallel()}
            parallelize_module(model, mesh, plan)
        return model, list(model["b"](model["a"](model["norm"](x)).relu()).square().mean(0))

    def gradients(parallel: bool) -> list[Any]:
        model, losses = build(parallel)
        shared = None if is_shared else model["b"].parameters()
        mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=shared).pc_backward(losses)
        return [parameter.grad for parameter in model.parameters()]

    model, losses = build(parallel=True)
    losses[0].backward()
    assert isinstance(model["norm"].weight.grad, DTensor) and model["norm"].weight.grad.placements == (Partial(),)
    for parameter, found, want in zip(model.parameters(), gradients(True), gradients(False), strict=True):
        assert isinstance(parameter, DTensor) and found.placements == parameter.placements
        assert torch.allclose(found.full_tensor(), want, rtol=1e-5, atol=1e-6)


def test_tasks_whose_gradients_are_placed_otherwise(mesh: DeviceMesh) -> None:
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    part = DTensor.from_local(torch.arange(4.0), mesh, [Partial()])
    losses = [(weight * part).sum(), (weight * weight).sum()]
    mk.optim.PCGrad(torch.optim.SGD([weight]), reduction="sum").pc_backward(losses)
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == (Replicate(),)
    assert weight.grad.full_tensor().tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("placement", [Shard(0), Replicate(), Partial()])
def test_gradients_accumulate_in_one_call(placement: Any, mesh: DeviceMesh) -> None:
    """In place, of DTensors and of others beside them, so that no signal comes in between; if placed alike."""
    weight = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Shard(0)]))
    scale = nn.Parameter(torch.ones(()))
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight, scale]), reduction="sum")
    before = weight.grad = DTensor.from_local(torch.ones(4), mesh, [placement])
    kept = scale.grad = torch.ones(())
    with mock.patch.object(torch, "_foreach_add_", wraps=torch._foreach_add_) as add:
        optimizer.pc_backward([(2 * weight).full_tensor().sum() * scale])  # type: ignore[attr-defined]
    assert add.call_count == 1 and scale.grad is kept and kept.item() == 9.0
    assert isinstance(weight.grad, DTensor) and weight.grad.placements == weight.placements
    assert weight.grad.full_tensor().tolist() == [3.0] * 4 and (weight.grad is before) == (placement == Shard(0))


def test_a_wrapper_with_a_group_is_not_pickled(mesh: DeviceMesh) -> None:
    weight = torch.ones(2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]), group=mesh.get_group())
    with pytest.raises(TypeError, match="group must be None where a wrapper is pickled, got a ProcessGroup"):
        pickle.dumps(optimizer)
    copied = copy.copy(optimizer)
    assert copied.group is optimizer.group and copied.optimizer is optimizer.optimizer
    optimizer.group = None
    assert pickle.loads(pickle.dumps(optimizer)).group is None
