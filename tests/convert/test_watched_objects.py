"""Converted modules see edits of objects, and of classes, that their own code reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.convert.test_edits import Home, register


class Getting(Home):
    def shares(self, logits: Tensor) -> Tensor:
        return logits / getattr(self, "temperature", 1.0)


class Config:
    def __init__(self) -> None:
        self.temperature = 1.0


def cooled(config: Any, logits: Tensor) -> Tensor:
    return logits / config.temperature


class Handing(Home):
    def __init__(self) -> None:
        super().__init__()
        self.config = Config()

    def shares(self, logits: Tensor) -> Tensor:
        return cooled(self.config, logits)


class Scale:
    def __init__(self) -> None:
        self.factor = 1.0

    def of(self, logits: Tensor) -> Tensor:
        return logits * self.factor


class Doubled(Scale):
    def of(self, logits: Tensor) -> Tensor:
        return logits * self.factor * 2


class Steps(Home):
    def __init__(self) -> None:
        super().__init__()
        self.steps = [Scale()]

    def shares(self, logits: Tensor) -> Tensor:
        for step in self.steps:
            logits = step.of(logits) if step.factor else logits
        return logits


class EqualWhileFrozen(Home):
    def shares(self, logits: Tensor) -> Tensor:
        return logits if self.gates[0].weight.requires_grad else torch.zeros_like(logits)  # type: ignore[union-attr]


def converted(kind: type[Home]) -> Any:
    register(kind)
    model = kind().eval()
    assert mk.convert(model).replaced
    return model


def assert_own_numbers(model: Any) -> None:
    x = torch.randn(40, 8)
    torch.testing.assert_close(model(x), Home.forward(model, x))


def test_a_number_that_a_class_gets_later(monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(Getting)
    monkeypatch.setattr(Getting, "temperature", 2.0, raising=False)
    assert_own_numbers(model)


def test_an_object_that_goes_to_a_function() -> None:
    model = converted(Handing)
    model.config.temperature = 2.0
    assert_own_numbers(model)


def test_an_object_of_another_class_in_a_list() -> None:
    model = converted(Steps)
    model.steps[0] = Doubled()
    assert_own_numbers(model)


@pytest.mark.parametrize("frozen", [False, True])
def test_parameters_that_are_frozen_and_thawed(frozen: bool) -> None:
    """Of code that asks; what it does while they are frozen may be what no fused way does."""
    register(EqualWhileFrozen)
    model: Any = EqualWhileFrozen().eval()
    assert mk.convert(model).replaced
    for flag in (False, True, False):
        model.gates.requires_grad_(flag)
        assert_own_numbers(model)
    model.gates.requires_grad_(True)
    model.experts.requires_grad_(not frozen)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for flag in (True, False):
        model.gates.requires_grad_(flag)
        x = torch.randn(40, 8)
        torch.testing.assert_close(compiled(x), Home.forward(model, x))
