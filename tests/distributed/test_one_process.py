"""What one process can test of PCGrad over a process group."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

import mtlkernels as mk
from mtlkernels.testing import random_task_gradients
from tests import requires

pytestmark = requires.gloo


@pytest.fixture
def alone() -> Iterator[dist.ProcessGroup]:
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("seed", range(20))
def test_a_group_of_one_changes_nothing(seed: int, alone: dist.ProcessGroup) -> None:
    case = random_task_gradients(seed)
    for found, expected in zip(
        mk.pcgrad(case.grads, order=case.order, group=alone), mk.pcgrad(case.grads, order=case.order), strict=True
    ):
        assert (found is None and expected is None) or torch.equal(found, expected)
    assert torch.equal(mk.gram(case.grads, group=alone), mk.gram(case.grads))


def test_a_group_of_one_trains(alone: dist.ProcessGroup) -> None:
    weight, head = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight, head]), shared=[weight], group=alone)
    optimizer.pc_backward([(weight * head).sum(), (2 * weight).sum()])
    assert weight.grad is not None and weight.grad.tolist() == [1.5, 1.5]
    assert head.grad is not None and head.grad.tolist() == [0.5, 0.5]


def test_a_copy_has_the_same_group(alone: dist.ProcessGroup) -> None:
    weight = torch.ones(2, requires_grad=True)
    copied = copy.deepcopy(mk.optim.PCGrad(torch.optim.SGD([weight]), group=alone))
    assert copied.group is alone and copied.param_groups[0]["params"][0] is not weight


@pytest.mark.parametrize("group", ["world", 0, torch.ones(1)])
def test_wrong_group(group: object) -> None:
    message = f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}"
    grads, weight = [[torch.ones(2)]], torch.ones(2, requires_grad=True)
    for call in (
        lambda: mk.gram(grads, group=group),  # type: ignore[arg-type]
        lambda: mk.pcgrad(grads, group=group),  # type: ignore[arg-type]
        lambda: mk.optim.PCGrad(torch.optim.SGD([weight]), group=group),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=message):
            call()
