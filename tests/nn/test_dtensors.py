"""Modules whose parameters are DTensors, on a mesh of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import mtlkernels as mk
from mtlkernels.nn.level import Expert
from tests import requires

pytestmark = requires.gloo


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize("gate_units", [(), (3,)])
def test_the_loss_of_one_task_of_tensor_parallel_experts(gate_units: tuple[int, ...], mesh: DeviceMesh) -> None:
    """Experts that it does not reach keep no gradient, as in plain modules."""
    found = []
    for parallel in (True, False):
        torch.manual_seed(0)
        trunk = mk.nn.PLE(6, 2, expert_units=(5, 4), num_specific=1, num_shared=1, num_levels=2, gate_units=gate_units)
        for expert in trunk.modules() if parallel else ():
            if type(expert) is Expert and len(expert.linears) == 2:  # gates have one hidden layer
                parallelize_module(expert, mesh, {"linears.0": ColwiseParallel(), "linears.1": RowwiseParallel()})
        trunk(torch.linspace(-1, 1, 18).view(3, 6))[0].square().mean().backward()
        found.append([whole(parameter.grad) for parameter in trunk.parameters()])
    assert any(want is None for want in found[1])
    for grad, want in zip(*found, strict=True):
        assert (grad is None) == (want is None)
        assert want is None or torch.allclose(grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["trans", "aver"])
def test_routes_of_a_sharded_snr(mode: str, mesh: DeviceMesh) -> None:
    torch.manual_seed(0)
    model: Any = mk.nn.SNR(5, 2, (4, 3), num_subnets=(3, 2), mode=mode)
    for joint in model.joints:
        nn.init.normal_(joint.log_alpha, -2.2, 2.0)
    expected = model.routes()
    fully_shard(model, mesh=mesh)
    assert model.routes() == expected
    with pytest.raises(TypeError, match=r"must be plain tensors to be compacted, got a DTensor for levels\.0\."):
        model.compact()


@pytest.mark.parametrize("penalty_first", [False, True])
def test_the_penalty_of_a_sharded_snr(penalty_first: bool, mesh: DeviceMesh) -> None:
    """A part of a model gives its parameters back after its forward pass; its penalty goes into a plain loss."""
    found = []
    for sharded in (True, False):
        torch.manual_seed(0)
        trunk: Any = mk.nn.SNR(5, 2, (4, 3), num_subnets=(3, 2)).eval()
        model: Any = nn.Sequential(nn.Linear(6, 5), trunk)
        for part in (trunk, model) if sharded else ():
            fully_shard(part, mesh=mesh)
        first = trunk.l0_penalty() if penalty_first else None
        loss = sum(y.square().mean() for y in model(torch.linspace(-1, 1, 18).view(3, 6)))
        penalty = trunk.l0_penalty() if first is None else first
        assert type(penalty) is torch.Tensor
        (loss + 0.1 * penalty).backward()
        found.append([whole(parameter.grad) for parameter in model.parameters()])
    for grad, want in zip(*found, strict=True):
        torch.testing.assert_close(grad, want)
