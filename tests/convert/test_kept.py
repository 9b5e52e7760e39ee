"""Calls of converted models that keep what was read of their modules: what the class itself gives, at every call."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._convert.calls import CALLS
from mtlkernels.ops.level.kept import KeptCalls
from tests.convert.changes import (
    CHANGES,
    Level,
    assert_as_own_code,
    assert_copies_keep_nothing,
    assert_noticed,
    first,
    register,
    replace_layer,
    serve,
)

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register(Level)


def kept() -> Any:
    """A level that has served until its calls are kept."""
    model = Level().eval()
    assert mk.convert(model).replaced
    for _ in range(4):
        serve(model, torch.ones(3, 20))
    assert is_kept(model)
    return model


def is_kept(model: nn.Module) -> bool:
    calls = model.__dict__.get(CALLS)
    return calls is not None and calls.of(0)._kept is not None


@pytest.mark.parametrize("isa", _extension.instruction_sets() or [""])
def test_as_the_class_does_at_any_number_of_rows(isa: str) -> None:
    with _extension.instruction_set(isa):
        model = kept()
        for rows in (0, 1, 2, 5, 8, 9, 16, 40, 100):
            assert_as_own_code(model, torch.randn(rows, 20))
            assert_as_own_code(model, torch.randn(20, rows).t())
            assert is_kept(model)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    assert_noticed(kept(), change)


def test_a_module_that_experts_share() -> None:
    model, x = Level().eval(), torch.randn(6, 20)
    shared = nn.LeakyReLU()
    for expert in model.experts:
        expert[2] = shared  # type: ignore[operator]
    assert mk.convert(model).replaced
    for _ in range(5):
        assert_as_own_code(model, x)
    assert is_kept(model)
    first(model)[2] = copy.deepcopy(shared)
    shared.negative_slope = 0.7
    for _ in range(5):
        assert_as_own_code(model, x)


def test_training_goes_on_and_off() -> None:
    model, x = kept(), torch.randn(6, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        for _ in range(4):
            assert_as_own_code(model, x)
        model.train()
        sum(y.sum() for y in model(torch.randn(64, 20))).backward()
        optimizer.step()
        model.eval()
    assert_as_own_code(model, x)


def test_dropout_alone_in_training() -> None:
    model, x = kept(), torch.randn(64, 20)
    first(model)[3].train()
    assert not torch.equal(serve(model, x)[0], serve(model, x)[0])
    first(model)[3].eval()
    assert_as_own_code(model, x)


def test_nothing_is_kept_alive_and_copies_keep_nothing() -> None:
    model = kept()
    assert_copies_keep_nothing(model, is_kept)
    weight, module = weakref.ref(first(model)[0].weight), weakref.ref(first(model)[0])
    replace_layer(model)
    gc.collect()
    assert weight() is None and module() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_nothing_is_left_of_it_when_reverted() -> None:
    model = kept()
    mk.revert(model)
    assert type(model) is Level and CALLS not in vars(model)


class Across(nn.Module):
    """Experts of bare matrices, gates in one tensor, and a stream for each gate or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ParameterList(nn.Parameter(torch.randn(24, 20)) for _ in range(2))
        self.gates = nn.Parameter(torch.randn(2, 2, 20))

    def forward(self, streams: Any) -> list[Tensor]:
        own = [streams, streams] if isinstance(streams, Tensor) else streams
        hidden = torch.stack([F.relu(x @ w.t()) for x, w in zip(own, self.first, strict=True)], dim=1)
        shares = [F.linear(x, w).softmax(1) for x, w in zip(own, self.gates, strict=True)]
        return [(share.unsqueeze(2) * hidden).sum(1) for share in shares]


def test_streams_and_tensors_without_modules() -> None:
    mk.convert.register(
        Across,
        experts=lambda level: [[weight.t(), "relu"] for weight in level.first],
        gates=lambda level: [weight.t() for weight in level.gates],
        routing=lambda level: mk.Routing((0, 1), ((0, 1), (0, 1))),
    )
    model: Any = Across().eval()
    assert mk.convert(model).replaced
    calls = []
    serve_kept = KeptCalls.serve

    def served(self: KeptCalls, roots: Any, inputs: Any) -> Any:
        outputs = serve_kept(self, roots, inputs)
        calls.append(outputs is not None)
        return outputs

    with mock.patch.object(KeptCalls, "serve", served):
        for number in range(40):
            if number == 20:
                model.gates.data = torch.randn(2, 2, 20)
            if number == 30:
                model.first[1] = nn.Parameter(torch.randn(24, 20))
            one, two = torch.randn(3, 20), torch.randn(3, 20)
            streams: Any = [[one, two], [one, one], [one, two]][number % 3]
            with torch.no_grad():
                found, expected = model(streams), Across.forward(model, streams)
            for y, true in zip(found, expected, strict=True):
                torch.testing.assert_close(y, true)
    assert any(calls)
