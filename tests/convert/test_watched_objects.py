"""Converted modules see edits of objects, and of classes, that their own code reads."""

from __future__ import annotations

import collections
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.watched import changed
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


class Switched(Home):
    """Whose forward asks for something before it goes on."""

    def prepare(self) -> None:
        """Sets what it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def asks(self) -> Any:
        return False

    def shares(self, logits: Tensor) -> Tensor:
        return logits * 9 if self.asks() else logits


class OfAPart(Switched):
    def prepare(self) -> None:
        for gate in self.gates:
            gate.on = False

    def asks(self) -> Any:
        return self.gates[0].on


class ByNamesInATuple(Switched):
    first = second = False

    def asks(self) -> Any:
        return any([getattr(self, name) for name in ("first", "second")])


class ByNamesInASet(Switched):
    first = second = False

    def asks(self) -> Any:
        return any([getattr(self, name) for name in {"first", "second"}])


class ByPutTogetherNames(Switched):
    def prepare(self) -> None:
        self.use_0 = self.use_1 = self.of_ctr = False

    def asks(self) -> Any:
        return any(getattr(self, f"use_{task}") for task in range(2))


class ByNamesThatEndAlike(Switched):
    def prepare(self) -> None:
        self.ctr_on = self.cvr_on = self.ctr_seen = False

    def asks(self) -> Any:
        return any(getattr(self, f"{task}_on") for task in ("ctr", "cvr"))


class ByPutTogetherNamesOfItsClass(Switched):
    use_0 = use_1 = False

    def asks(self) -> Any:
        return any(getattr(self, f"use_{task}") for task in range(2))


class OfTheDictionary(Switched):
    def prepare(self) -> None:
        self.on = False

    def asks(self) -> Any:
        return self.__dict__["on"]


class Rates(list[float]):
    pass


class OfItsOwnList(Switched):
    def prepare(self) -> None:
        self.rates = Rates()

    def asks(self) -> Any:
        return len(self.rates) > 0


class Whole(int):
    pass


class OfItsOwnNumber(Switched):
    def prepare(self) -> None:
        self.count = Whole(0)

    def asks(self) -> Any:
        return self.count > 0


class Pair(collections.namedtuple("Pair", "on rate")):
    pass


class OfItsOwnTuple(Switched):
    def prepare(self) -> None:
        self.pair = Pair(False, 1.0)

    def asks(self) -> Any:
        return self.pair.on


SHARED = Config()


@functools.lru_cache
def cached() -> bool:
    return SHARED.temperature > 1


class OfACachedFunction(Switched):
    def asks(self) -> Any:
        return cached()


def turn_up(model: Any) -> None:
    SHARED.temperature = 2.0
    cached.cache_clear()


class ByAPartialMethod(Switched):
    def prepare(self) -> None:
        self.on = False

    def further(self, really: bool) -> bool:
        return self.on and really

    asks = functools.partialmethod(further, True)


class ByTheKind(Switched):
    def prepare(self) -> None:
        self.on = False

    @functools.singledispatchmethod
    def of_kind(self, value: Any) -> bool:
        return self.on

    def asks(self) -> Any:
        return self.of_kind(1)


CHANGES: dict[type[Switched], Callable[[Any], object]] = {
    OfAPart: lambda model: setattr(model.gates[0], "on", True),
    ByNamesInATuple: lambda model: setattr(model, "second", True),
    ByNamesInASet: lambda model: setattr(model, "second", True),
    ByPutTogetherNames: lambda model: setattr(model, "use_1", True),
    ByNamesThatEndAlike: lambda model: setattr(model, "cvr_on", True),
    ByPutTogetherNamesOfItsClass: lambda model: setattr(model, "use_1", True),
    OfTheDictionary: lambda model: setattr(model, "on", True),
    OfItsOwnList: lambda model: model.rates.append(1.0),
    OfItsOwnNumber: lambda model: setattr(model, "count", Whole(1)),
    OfItsOwnTuple: lambda model: setattr(model, "pair", Pair(True, 1.0)),
    OfACachedFunction: turn_up,
    ByAPartialMethod: lambda model: setattr(model, "on", True),
    ByTheKind: lambda model: setattr(model, "on", True),
}


class Checking(Home):
    @torch.no_grad()
    def check(self, x: Tensor) -> Tensor:
        return x

    def read(self, x: Tensor) -> Tensor:
        return self.check(x)


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


class _Asking(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x if self.weight.requires_grad else x


def _torch_guards_that() -> bool:
    """Whether PyTorch compiles a module again whose code asks for frozen parameters, once they are: 2.10 does not."""
    model, x = _Asking(2, 2), torch.ones(1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    first = compiled(x)
    model.requires_grad_(False)
    return bool(first == 2) and bool(compiled(x) == 1)


class Slots:
    __slots__ = ("scale",)


class Slotted(Home):
    def __init__(self) -> None:
        super().__init__()
        self.config = Slots()

    def forward(self, x: Tensor) -> Any:
        factor = self.config.scale if hasattr(self.config, "scale") else 1.0
        return [factor * y for y in super().forward(x)]


def test_a_slot_that_is_filled_later() -> None:
    register(Slotted)
    model: Any = Slotted().eval()
    assert mk.convert(model).replaced
    assert changed(model, vars(model)[WATCHED]) is None
    model.config.scale = 2.0
    x = torch.randn(40, 8)
    torch.testing.assert_close(model(x), Slotted.forward(model, x))


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
    if not _torch_guards_that():
        pytest.skip("this version of PyTorch compiles code for frozen parameters and runs it for others")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for flag in (True, False):
        model.gates.requires_grad_(flag)
        x = torch.randn(40, 8)
        torch.testing.assert_close(compiled(x), Home.forward(model, x))


@pytest.mark.parametrize("kind", CHANGES)
def test_whichever_way_code_asks(kind: type[Switched]) -> None:
    model = converted(kind)
    assert changed(model, vars(model)[WATCHED]) is None
    CHANGES[kind](model)
    assert changed(model, vars(model)[WATCHED]) is not None
    assert_own_numbers(model)
    SHARED.temperature = 1.0


def test_a_method_without_gradients_is_compiled_fused(fused_calls: list[int], fresh_compiler: None) -> None:
    """What PyTorch puts around it has variables of its own, which no module nor pickle has."""
    model = converted(Checking)
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(40, 8))
    assert fused_calls
    loaded = pickle.loads(pickle.dumps(model))
    assert changed(loaded, vars(loaded)[WATCHED]) is None
