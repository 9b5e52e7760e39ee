"""Experts of another trunk in the place of a trunk's own: each has the activation with which it was made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.seeding import seed

PAIRS = [("relu", "tanh"), ("prelu", "dice"), ("relu", "prelu"), ("prelu", "relu")]


def trunk(activation: str, batch_norm: bool) -> Any:
    return mk.nn.MMoE(6, 2, (5, 4), num_experts=3, activation=activation, batch_norm=batch_norm)


def mixed(model: Any, x: Tensor) -> list[Tensor]:
    """By the experts' modules."""
    outputs = torch.stack([expert(x) for expert in model.level.experts], 1)
    return [(gate.softmax(1).unsqueeze(2) * outputs).sum(1) for gate in model.level.gates(x).split(3, 1)]


def check(model: Any, x: Tensor) -> None:
    """In training, in evaluation, and in calls that may be kept."""
    torch.testing.assert_close(list(model(x)), mixed(model, x))
    with torch.no_grad():
        expected = mixed(model.eval(), x)
        for _ in range(6):
            torch.testing.assert_close(list(model(x)), expected)
    model.train()


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_of_a_level(own: str, other: str, which: tuple[int, ...], batch_norm: bool) -> None:
    seed(0)
    model, donor, x = trunk(own, batch_norm), trunk(other, batch_norm), torch.randn(64, 6)
    check(model, x)
    for e in which:
        model.level.experts[e] = donor.level.experts[e]
    check(model, x)


def test_another_activation_beside_the_same_parameters() -> None:
    seed(0)
    model, donor, x = trunk("relu", False), trunk("tanh", False), torch.randn(64, 6)
    check(model, x)
    for expert, other in zip(model.level.experts, donor.level.experts, strict=True):
        other.linears = expert.linears
    model.level.experts = donor.level.experts
    check(model, x)


@pytest.mark.parametrize(("own", "other"), PAIRS)
def test_of_sub_networks(own: str, other: str) -> None:
    seed(0)
    model, donor = (mk.nn.SNR(6, 2, (5, 4), (3,), activation=name).eval() for name in (own, other))
    level: Any = model.levels[0]
    level.experts[1] = donor.levels[0].experts[1]  # type: ignore[index, union-attr]
    x = torch.randn(64, 6)
    with torch.no_grad():
        expected = [expert(x) for expert in level.experts]
        torch.testing.assert_close(list(level(x)), expected)
        torch.testing.assert_close(model.compact()(x), model(x))


def test_nothing_is_called_where_all_were_exchanged() -> None:
    seed(0)
    model, donor, x = trunk("relu", False), trunk("silu", False), torch.randn(64, 6)
    model.level.experts = donor.level.experts
    called: list[nn.Module] = []
    donor.level.experts[0].linears[0].register_forward_pre_hook(lambda module, _: called.append(module))
    with torch.no_grad():
        model(x)
    assert not called


def test_a_slope_a_channel_of_an_expert_that_is_called_alone() -> None:
    """Channels are the last dimension, whatever is before it."""
    expert = mk.nn.MMoE(6, 2, (4,), 2, activation="prelu").level.experts[0]
    expert.slopes[0] = nn.Parameter(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    x = torch.randn(5, 4, 6)
    torch.testing.assert_close(expert(x), expert(x.reshape(20, 6)).view(5, 4, 4))
    torch.testing.assert_close(expert(x[0, 0]), expert(x[0])[0])
