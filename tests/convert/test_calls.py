"""Calls of other shapes than usual, and of modules to which something comes, or from which it goes, later."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.edits import WIDTH, Edited
from tests.convert.test_edits import Plain, register
from tests.convert.weighing import Level, X, agree

PARTS: dict[str, Any] = {
    "experts": lambda model: model.experts,
    "gates": lambda model: model.gates,
    "routing": lambda model: mk.Routing.mmoe(4, 3),
}


def converted(model: Any) -> tuple[Any, Any]:
    """A model that is converted, and one that is not."""
    own = copy.deepcopy(model)
    assert mk.convert(model).replaced
    return model, own


def assert_alike(model: Any, own: Any, *inputs: Any) -> None:
    for y, right in zip(model(*inputs), own(*inputs), strict=True):
        torch.testing.assert_close(y, right)


class OfAnyShape(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=-2)
        return [(gate(x).softmax(-1).unsqueeze(-1) * hidden).sum(-2) for gate in self.gates]


@pytest.mark.parametrize("shape", [(5, 3, 8), (8,)])
def test_inputs_that_are_no_matrices(shape: tuple[int, ...]) -> None:
    register(OfAnyShape)
    assert_alike(*converted(OfAnyShape()), torch.randn(shape))


class AfterANumber(Level):
    def forward(self, progress: Tensor, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        return super().forward(x)


def test_a_number_comes_before_the_input() -> None:
    """It has no rows, which tell how many there are."""
    progress = torch.tensor(0.5)
    mk.convert.register(
        AfterANumber,
        **PARTS,
        inputs=lambda model, progress, x: x,
        arguments=lambda model, streams: (progress, streams[0]),
    )
    assert_alike(*converted(AfterANumber()), progress, X)


class WithFront(Level):
    def prepare(self) -> None:
        self.front = nn.Embedding(50, 8)
        for expert in self.experts:
            expert.insert(1, nn.LayerNorm(6))  # type: ignore[operator]

    def forward(self, codes: Tensor) -> list[Tensor]:
        return super().forward(self.front(codes))


def test_what_is_in_front_is_called_once_a_call() -> None:
    """Also by calls that are kept, or whose rows are too few."""
    mk.convert.register(
        WithFront,
        **PARTS,
        inputs=lambda model, codes: model.front(codes),
        example=lambda model, rows: (torch.randint(50, (rows,)),),
    )
    model, own = converted(WithFront().eval())
    calls: list[Any] = []
    model.front.register_forward_hook(lambda *args: calls.append(args))
    with torch.no_grad():
        for number in range(1, 6):
            assert_alike(model, own, torch.arange(5))
            assert len(calls) == number


def test_gates_that_come_later() -> None:
    model, own = converted(Plain())
    gate = nn.Linear(8, 4)
    for each in (model, own):
        each.gates.append(gate)
    agree(model, own)
    assert len(model(X)) == 4


class Deep(nn.Module):
    """Levels of one gate, one behind another."""

    def __init__(self) -> None:
        super().__init__()
        experts = [[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)] for _ in range(2)]
        self.experts = nn.ModuleList(map(nn.ModuleList, experts))
        self.gates = nn.ModuleList(nn.Linear(8, 3) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        for experts, gate in zip(self.experts, self.gates, strict=True):
            hidden = torch.stack([expert(x) for expert in experts], dim=1)  # type: ignore[arg-type]
            x = (gate(x).softmax(1).unsqueeze(2) * hidden).sum(1)
        return [x]


def test_levels_that_go_later() -> None:
    mk.convert.register(
        Deep,
        levels=lambda model: range(len(model.experts)),
        experts=lambda model, level: model.experts[level],
        gates=lambda model, level: [model.gates[level]],
        routing=lambda model, level: mk.Routing.mmoe(3, 1),
    )
    model, own = converted(Deep())
    for each in (model, own):
        del each.experts[1], each.gates[1]
    agree(model, own)


class OfStreams(Level):
    """Experts read two streams, and the third gate one of its own."""

    def forward(self, streams: Any) -> list[Tensor]:
        hidden = torch.stack([expert(streams[i // 2]) for i, expert in enumerate(self.experts)], dim=1)
        gates = zip(self.gates, streams, strict=True)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate, x in gates]


@pytest.mark.parametrize("grad", [False, True])
def test_a_stream_that_gates_alone_read(grad: bool) -> None:
    routing = mk.Routing((0, 0, 1, 1), ((0, 1, 2, 3),) * 3)
    mk.convert.register(OfStreams, **{**PARTS, "routing": lambda model: routing})
    model, own = converted(OfStreams().eval())
    with torch.set_grad_enabled(grad):
        for _ in range(5):
            assert_alike(model, own, list(torch.randn(3, 40, 8)))


def test_gates_of_which_some_have_biases() -> None:
    """Where their logits are made by themselves, on many rows."""
    register(Level)
    model = Level()
    model.gates[1] = nn.Linear(8, 4, bias=False)
    model, own = converted(model)
    for each in (model, own):
        each.experts[0][1] = nn.Tanh()
    assert_alike(model, own, torch.randn(1200, 8))


def test_a_norm_without_weights_in_another_dtype() -> None:
    mk.convert.register(Edited, **PARTS)
    model = Edited(norm=True)
    for expert in model.experts:
        expert[1] = nn.BatchNorm1d(5, affine=False)
    model, own = converted(model.bfloat16())
    for each in (model, own):
        for expert in each.experts:
            expert[1].float()
    x = torch.randn(200, WIDTH, dtype=torch.bfloat16)
    assert_alike(model, own, x)
    (line,) = mk.convert(own).left_alone
    assert line.detail == "its parameters are of several dtypes"


# Hooks --------------------------------------------------------------------------------------------------------------

HOOKS: dict[str, Callable[[nn.Parameter, Any], Any]] = {
    "gradients": lambda parameter, hook: parameter.register_hook(hook),
    "accumulation": lambda parameter, hook: parameter.register_post_accumulate_grad_hook(hook),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_on_parameters(kind: str) -> None:
    """One that no loss reaches is not called; a level that has one already is left alone."""
    seen: list[Any] = []
    model = Plain()
    assert mk.convert(model).replaced
    HOOKS[kind](model.gates[2].weight, seen.append)  # type: ignore[arg-type]
    model(X)[0].sum().backward()
    assert not seen
    mk.revert(model)
    (line,) = mk.convert(model).left_alone
    assert line.detail.startswith("a parameter of gates.2 has a hook")


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_a_backward_hook_on_an_expert_is_called(kind: str) -> None:
    model, seen = Plain(), []
    assert mk.convert(model).replaced
    getattr(model.experts[0], f"register_full_backward_{kind}")(lambda *args: seen.append(args))
    sum(y.sum() for y in model(X.clone().requires_grad_())).backward()
    assert len(seen) == 1
