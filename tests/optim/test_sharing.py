"""Which levels several losses share on a CPU, by their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from mtlkernels.ops.level import sharing
from mtlkernels.optim import _task_gradients

ROWS, WEIGHTS = sharing.SHARED_ROWS, sharing.SHARED_WEIGHTS


@pytest.fixture(autouse=True)
def _as_it_is(_no_level_is_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "SHARED_ROWS", ROWS)
    monkeypatch.setattr(sharing, "SHARED_WEIGHTS", WEIGHTS)


def losses(trunk: Any, x: Any) -> list[Tensor]:
    return [y.square().mean() for y in trunk(x)]


def test_rows_and_weights_for_each_pass_that_is_saved_them() -> None:
    width = 256
    trunk = mk.nn.MMoE(width, 2, (WEIGHTS // width // 2,), num_experts=1)  # with its gates a little more than half
    for passes, rows, expected in ((2, 4 * ROWS, False), (3, ROWS - 1, False), (3, ROWS, True)):
        assert sharing.pays(losses(trunk, torch.randn(rows, width)), passes) is expected


def test_the_level_that_is_met_first_tells() -> None:
    """Behind a cast and a tower, whichever loss leads to one."""
    trunk = mk.nn.PLE(8, num_tasks=2, expert_units=(1024, 512), num_specific=1, num_levels=2)
    x, free = torch.randn(ROWS, 8), torch.ones((), requires_grad=True)
    found = losses(nn.Sequential(trunk), x)
    assert sharing.pays([free * 2, *found], 2)
    assert not sharing.pays([free * 2, free], 2)
    assert not sharing.pays([x.sum(), free.detach()], 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert sharing.pays(losses(trunk, x), 2)


def test_weights_of_all_layers_count() -> None:
    trunk = mk.nn.MMoE(8, 2, (1024, WEIGHTS // 1024), num_experts=1)
    assert sharing.pays(losses(trunk, torch.randn(ROWS, 8)), 2)


def test_frozen_experts_do_not_count() -> None:
    trunk: Any = mk.nn.MMoE(256, 2, (WEIGHTS // 256,), num_experts=2)
    x = torch.randn(ROWS, 256)
    for expert, expected in zip(trunk.level.experts, (True, False), strict=True):
        expert.requires_grad_(False)
        assert sharing.pays(losses(trunk, x), 2) is expected


def test_what_branches_often_is_walked_once() -> None:
    loss = torch.ones((), requires_grad=True)
    for _ in range(64):
        loss = loss + loss.sin()
    assert not sharing.pays([loss, loss], 2)


def test_as_many_outputs_as_rows() -> None:
    trunk = mk.nn.MMoE(1024, 2, (256,), num_experts=3)
    assert all(sharing.pays(losses(trunk, torch.randn(rows, 1024)), 2) for rows in (255, 256, 257))


def test_inputs_are_no_weights() -> None:
    trunk = mk.nn.MMoE(8, 2, (4,), num_experts=2)
    x = torch.randn(1 << 17, 8, requires_grad=True)
    assert not sharing.pays(losses(trunk, x), 2)


def test_what_a_checkpoint_computes_again_is_shared() -> None:
    trunk = mk.nn.MMoE(8, 2, (4,), num_experts=2)
    assert sharing.pays(losses(lambda x: checkpoint(trunk, x, use_reentrant=False), torch.randn(5, 8)), 2)


def test_what_a_checkpoint_computes_again_behind_a_cast_is_shared() -> None:
    """As float16 is, where norms are computed in float32."""
    norms = [[nn.BatchNorm1d(4).eval() for _ in range(2)]]

    def level(x: Tensor) -> tuple[Tensor, ...]:
        return mk.expert_mixture(x, [[x[:4], x[1:]]], None, x[:, :2], mk.Routing.mmoe(2, 1), norms=norms)

    with torch.autocast("cpu", torch.float16):
        outputs = checkpoint(level, torch.randn(5, 8, requires_grad=True), use_reentrant=False)
    assert outputs[0].dtype == torch.float16
    assert sharing.pays([outputs[0].sum()], 2)


def test_what_is_left_in_grad_is_the_same() -> None:
    """Of a large level, by default and without sharing."""
    found = []
    for batched in (None, False):
        torch.manual_seed(0)
        trunk = mk.nn.MMoE(64, 3, (512,), num_experts=12).double()
        optimizer = mk.optim.PCGrad(torch.optim.SGD(trunk.parameters()), batched=batched)
        own = losses(trunk, torch.randn(ROWS, 64, dtype=torch.float64))
        assert sharing.pays(own, 3)
        optimizer.pc_backward(own)
        found.append([p.grad for p in trunk.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(("width", "cuts"), [(8, []), (WEIGHTS // 512, [5]), (WEIGHTS // 256, [5, 2])])
def test_kept_weights_of_tasks_are_two_passes(width: int, cuts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many losses there are; a level that is too small for these is not looked at further."""
    trunk: Any = mk.nn.MMoE(256, 5, (width,), num_experts=1)
    gates = {id(p) for p in trunk.level.gates.parameters()}
    shared = [p for p in trunk.parameters() if id(p) not in gates]
    sgd, cut = torch.optim.SGD(trunk.parameters()), _task_gradients.cut
    found: list[int] = []
    monkeypatch.setattr(_task_gradients, "cut", lambda *args: found.append(args[1]) or cut(*args))
    optimizer = mk.optim.GramWeighted(sgd, lambda gram: gram.new_ones(5), shared=shared, gram_every=2)
    for _ in range(2):
        optimizer.backward(losses(trunk, torch.randn(ROWS, 256)))
    assert found == cuts
