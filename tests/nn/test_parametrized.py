"""Parametrized weights of experts: each is computed once a call, as by modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import mtlkernels as mk


class Counts(nn.Module):
    """As ``spectral_norm`` in training, which goes on by a step at each access."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight * 1


class Other(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


def _nothing(experts: Any) -> None:
    pass


def _another_class(experts: Any) -> None:
    experts[2].linears[1] = Other(16, 8)


def _hook(experts: Any) -> None:
    experts[2].linears[1].register_forward_hook(lambda *given: None)


def _forward(experts: Any) -> None:
    experts[2].forward = experts[2].forward


def _no_bias(experts: Any) -> None:
    experts[2].linears[1].bias = None


@pytest.mark.parametrize("edit", [_nothing, _another_class, _hook, _forward, _no_bias])
@pytest.mark.parametrize("record", [False, True])
def test_each_weight_is_computed_once_a_call(edit: Callable[[Any], None], record: bool) -> None:
    torch.manual_seed(0)
    model = mk.nn.MMoE(12, 2, (16, 8), num_experts=3)
    experts: Any = model.level.experts
    counts = [Counts() for _ in range(2)]
    for expert, count in zip(experts, counts, strict=False):
        parametrize.register_parametrization(expert.linears[0], "weight", count)
    edit(experts)
    for count in counts:
        count.calls = 0  # registering it calls it
    with torch.set_grad_enabled(record):
        model(torch.randn(5, 12))
    assert [count.calls for count in counts] == [1, 1]


def test_behind_a_pruned_norm_it_is_computed_once() -> None:
    model = mk.nn.MMoE(12, 2, (16, 8), num_experts=3, batch_norm=True)
    experts: Any = model.level.experts
    count = Counts()
    parametrize.register_parametrization(experts[0].linears[0], "weight", count)
    prune.l1_unstructured(experts[1].norms[0], "weight", amount=0.5)
    count.calls = 0
    model(torch.randn(5, 12))
    assert count.calls == 1


def test_behind_statistics_that_would_be_folded_it_is_computed_once() -> None:
    """A few rows in evaluation with gradients are the modules' where nothing is computed."""
    model = mk.nn.MMoE(32, 2, (64, 48), num_experts=3, batch_norm=True).eval()
    assert not any("ExpertMixture" in str(y.grad_fn) for y in model(torch.randn(2, 32)))
    count = Counts()
    experts: Any = model.level.experts
    parametrize.register_parametrization(experts[0].linears[0], "weight", count)
    count.calls = 0
    model(torch.randn(2, 32))
    assert count.calls == 1


@pytest.mark.parametrize("style", [{}, {"batch_norm": True}, {"dropout": 0.5}], ids=str)
def test_in_sub_networks_it_is_computed_once(style: dict[str, Any]) -> None:
    model = mk.nn.SNR(12, 2, (16, 8), (3, 2), **style)
    count = Counts()
    experts: Any = model.levels[0].experts
    parametrize.register_parametrization(experts[0].linears[0], "weight", count)
    count.calls = 0
    model(torch.randn(5, 12))
    assert count.calls == 1
