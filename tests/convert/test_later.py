"""Settings that become others after a conversion: its own code runs, or it was left alone."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.paying import FORCE
from tests.convert.models import by_name, features, rechub_mmoe
from tests.convert.test_edits import register
from tests.convert.weighing import Level, agree


@dataclasses.dataclass
class Config:
    temperature: float = 1.0


class InEvaluation(Level):
    temperature = 1.0

    def weigh(self, z: Tensor) -> Tensor:
        return (z if self.training else z / self.temperature).softmax(1)


class Validated(Level):
    def prepare(self) -> None:
        self.temperature = 1.0

    def weigh(self, z: Tensor) -> Tensor:
        if not 0 < self.temperature <= 1:
            raise ValueError("temperature must be in (0, 1]")
        return (z / self.temperature).softmax(1)


class Configured(Level):
    def prepare(self) -> None:
        self.config = Config()

    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.config.temperature).softmax(1) if self.config.temperature < 1 else z.softmax(1)


class Clipped(Level):
    def prepare(self) -> None:
        self.most = float("inf")

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if self.most > 0.2 else z.clamp(-self.most, self.most).softmax(1)


class Scheduled(Level):
    def prepare(self) -> None:
        self.epoch, self.weights = 0, [1.0, 1.0]

    @property
    def temperature(self) -> float:
        return max(0.1, 1 - 0.1 * self.epoch)

    def weigh(self, z: Tensor) -> Tensor:
        return (
            (z / self.temperature * self.weights[0]).softmax(1) if self.epoch or self.weights[0] < 1 else z.softmax(1)
        )


class Masked(Level):
    def prepare(self) -> None:
        self.mask: Tensor | None = None
        self.uniform = False

    def weigh(self, z: Tensor) -> Tensor:
        if self.uniform:
            return torch.full_like(z, 0.25)
        return (z if self.mask is None else z.masked_fill(self.mask, -1e9)).softmax(1)


class WithActivation(Level):
    def prepare(self) -> None:
        self.activation: nn.Module = nn.Softmax(dim=1)

    def weigh(self, z: Tensor) -> Tensor:
        return self.activation(z)  # type: ignore[no-any-return]


LATER: dict[str, tuple[type, Callable[[Any], object]]] = {
    "a number that is looked at": (Validated, lambda model: setattr(model, "temperature", 0.2)),
    "a number in an object": (Configured, lambda model: setattr(model.config, "temperature", 0.2)),
    "another object": (Configured, lambda model: setattr(model, "config", Config(0.2))),
    "an infinite number": (Clipped, lambda model: setattr(model, "most", 0.1)),
    "a whole number": (Scheduled, lambda model: setattr(model, "epoch", 8)),
    "a number in a list": (Scheduled, lambda model: model.weights.__setitem__(0, 0.5)),
    "a flag": (Masked, lambda model: setattr(model, "uniform", True)),
    "a mask": (Masked, lambda model: setattr(model, "mask", torch.tensor([True, False, False, False]))),
    "a part that nobody reads": (WithActivation, lambda model: setattr(model, "activation", nn.Sigmoid())),
    "a method": (Level, lambda model: setattr(model, "weigh", torch.sigmoid)),
}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: model, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("name", LATER)
def test_another_setting_brings_its_own_code_back(name: str, copied: Any, fused_calls: list[int]) -> None:
    kind, change = LATER[name]
    register(kind)
    plain = kind().eval()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    model = copied(model)
    fused_calls.clear()
    agree(model, plain)
    assert fused_calls
    change(model)
    change(plain)
    fused_calls.clear()
    agree(model, plain)
    assert not fused_calls


def test_a_level_with_another_setting_is_tried_again() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model)
    assert "already converted" in str(mk.convert(model))
    model.mask = torch.tensor([True, False, False, False])
    assert mk.convert(model).left_alone and type(model) is Masked
    model.mask = None
    assert mk.convert(model).replaced


def test_a_level_that_is_tried_again_stays_forced() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model, force=True)
    model.uniform = 0  # type: ignore[assignment]
    assert mk.convert(model).replaced and FORCE in vars(model)
    mk.revert(model)
    assert mk.convert(model).replaced and FORCE not in vars(model)


def test_a_class_that_was_made_of_a_converted_one_stays() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model)
    wrapped = type("Wrapped", (type(model),), {})
    model.__class__ = wrapped
    model.uniform = True
    assert "already converted" in str(mk.convert(model)) and type(model) is wrapped


class OfTensor(Level):
    def prepare(self) -> None:
        self.temperature = torch.tensor(1.0)

    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.temperature).softmax(1)


@pytest.mark.parametrize("kind", [InEvaluation, OfTensor])
def test_settings_that_a_trial_changes(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


def test_a_class_that_is_gone_is_gone() -> None:
    """As of a function that defines a class for each trial of a search."""

    def converted() -> tuple[Any, ...]:
        held = torch.zeros(3)

        class Own(type(rechub_mmoe())):  # type: ignore[misc]
            def extra(self) -> Tensor:
                return held

        model = rechub_mmoe()
        model.__class__ = Own
        assert mk.convert(model).replaced
        model(by_name(features(5).float()))
        return weakref.ref(Own), weakref.ref(held)

    trials = [converted() for _ in range(4)]
    gc.collect()
    assert all(ref() is None for refs in trials[:-1] for ref in refs)  # Python itself may hold the last
