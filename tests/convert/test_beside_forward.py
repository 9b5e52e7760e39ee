"""What a model holds beside its forward pass, such as metrics: no trial takes it for what the forward pass does."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from mtlkernels._convert.copies import same
from tests.convert.weighing import Level, X

LOOKS = 0


class Settings(dict[str, int]):
    """Those of a library for pictures, of which some are made when somebody looks at them."""

    def __iter__(self) -> Iterator[str]:
        global LOOKS
        LOOKS += 1
        return super().__iter__()

    def items(self) -> Any:
        return [(name, self[name]) for name in self]


SETTINGS = Settings(width=8)


class Metric(nn.Module):
    """Wraps its method for each instance, and for each copy anew, as torchmetrics' do."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.update = self.wrapped(self.update)  # type: ignore[method-assign]

    def wrapped(self, update: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(update)
        def counted(*args: Any) -> None:
            self.count += 1
            update(*args)

        return counted

    def update(self, y: Tensor) -> None:
        global LOOKS
        LOOKS += 1

    def plot(self) -> list[Any]:
        return [LOOKS, *SETTINGS.items()]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "update"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.update = self.wrapped(self.update)  # type: ignore[method-assign]


class WithAMetric(Level):
    def prepare(self) -> None:
        self.metric: Any = Metric()
        self.metrics = nn.ModuleDict({"of a task": Metric()})

    def training_step(self, x: Tensor) -> None:
        self.metric.update(self(x)[0])


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})


def convert(kind: type[Level]) -> tuple[Any, mk.ConversionReport]:
    mk.convert.register(
        kind,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
    )
    model = kind()
    return model, mk.convert(model)


def test_a_metric_that_a_training_step_alone_uses(fused_calls: list[int]) -> None:
    looks = LOOKS
    model, report = convert(WithAMetric)
    assert report.replaced, str(report)
    assert looks == LOOKS
    model.training_step(X)
    assert fused_calls and model.metric.count == 1


class Shown(Level):
    """Which has itself a method that its forward pass has no use for."""

    def show(self) -> list[Any]:
        return [LOOKS, *SETTINGS.items()]


def test_a_method_that_no_forward_calls() -> None:
    looks = LOOKS
    _, report = convert(Shown)
    assert report.replaced, str(report)
    assert looks == LOOKS


class Hidden(nn.Module):
    """A part that counts its calls, outside of itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.counted(x)

    def counted(self, x: Tensor) -> Tensor:
        global LOOKS
        LOOKS += 1
        return x


class Finding(Level):
    """Whose parts below are found and called each in another way."""

    def prepare(self) -> None:
        self.part: Any = Hidden()
        self.listed = nn.ModuleList([Hidden()])


class Named(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.part(z))


class ItsMethod(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.part.counted(z))


class InAList(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(next(iter(self.listed))(z))


class BySomeName(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(getattr(self, "pa" + "rt".lower())(z))


class AmongChildren(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(list(self.children())[2](z))


def of_part(model: Any, z: Tensor) -> Tensor:
    y: Tensor = model.part(z)
    return y


class ByAFunction(Finding):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(of_part(self, z))


class Runner:
    """Not a module."""

    def run(self, model: Any, z: Tensor) -> Tensor:
        return of_part(model, z)


class ByAnObject(Finding):
    def prepare(self) -> None:
        super().prepare()
        self.runner = Runner()

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.runner.run(self, z))


class ByABoundMethod(Finding):
    def prepare(self) -> None:
        super().prepare()
        self.bound = self.part.counted

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.bound(z))


class ByAPartial(Finding):
    def prepare(self) -> None:
        super().prepare()
        self.bound = functools.partial(Runner().run, self)

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.bound(z))


class ByAProperty(Finding):
    @property
    def found(self) -> Any:
        return self.part

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.found(z))


class Descriptor:
    """Of a function, and no function itself."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function

    def __get__(self, owner: Any, kind: Any = None) -> Any:
        return functools.partial(self.function, owner)


class ByADescriptor(Finding):
    weigh: Any = Descriptor(lambda self, z: self.part(z).softmax(1))


FOUND = [
    Named, ItsMethod, InAList, BySomeName, AmongChildren, ByAFunction, ByAnObject, ByABoundMethod, ByAPartial,
    ByAProperty, ByADescriptor,
]  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_what_a_part_writes_outside_is_found(kind: type[Level]) -> None:
    looks = LOOKS
    _, report = convert(kind)
    assert [line.detail for line in report.left_alone] == ["its forward changes LOOKS, which is not its own"]
    assert looks == LOOKS


class Rewrapping(Metric):
    """Which the forward pass names."""


class Reading(Level):
    def prepare(self) -> None:
        self.metric = Rewrapping()

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(z * (1.0 if callable(self.metric.update) else 2.0))


class Rewriting(Reading):
    """Whose forward pass puts another function there."""

    def weigh(self, z: Tensor) -> Tensor:
        self.metric.update = lambda y: None  # type: ignore[method-assign]
        return super().weigh(z)


class Closing(Reading):
    """Or one that keeps something of the call."""

    def prepare(self) -> None:
        super().prepare()
        self.keep(torch.zeros(1))

    def keep(self, z: Tensor) -> None:
        self.metric.update = lambda y: z.sum()  # type: ignore[method-assign, assignment, return-value]

    def weigh(self, z: Tensor) -> Tensor:
        self.keep(z.detach())
        return super().weigh(z)


@pytest.mark.parametrize("kind", [Rewriting, Closing])
def test_a_function_that_forward_sets_is_found(kind: type[Level]) -> None:
    _, report = convert(kind)
    assert [line.detail for line in report.left_alone] == ["its forward sets metric.update"]


def test_functions_of_copies_are_the_same() -> None:
    _, report = convert(Reading)
    assert report.replaced, str(report)


class Holder(nn.Module):
    """Nothing but what is kept there."""


class Keeping(Level):
    """Whose forward pass keeps a function anew at each call, of the same code."""

    def prepare(self) -> None:
        self.holder: Any = Holder()
        self.keep(0.0)

    def keep(self, z: float) -> None:
        self.holder.function = lambda: z

    def weigh(self, z: Tensor) -> Tensor:
        self.keep(float(z.detach().sum()))
        return super().weigh(z)


class Defaulting(Keeping):
    def keep(self, z: float) -> None:
        self.holder.function = lambda kept=z: kept


class DefaultingByName(Keeping):
    def keep(self, z: float) -> None:
        self.holder.function = lambda *, kept=z: kept


class Marking(Keeping):
    def keep(self, z: float) -> None:
        def function() -> None: ...

        function.kept = z  # type: ignore[attr-defined]
        self.holder.function = function


class OfOtherCode(Keeping):
    def keep(self, z: float) -> None:
        self.holder.function = (lambda: 2.0) if z else (lambda: 3.0)


@pytest.mark.parametrize("kind", [Keeping, Defaulting, DefaultingByName, Marking, OfOtherCode])
def test_a_function_that_is_kept_anew_is_found(kind: type[Level]) -> None:
    _, report = convert(kind)
    assert [line.detail for line in report.left_alone] == ["its forward sets holder.function"]


class Waiting(Keeping):
    """Whose function closes over what is not there yet."""

    def keep(self, z: float) -> None:
        self.holder.function = lambda: later
        if z is None:
            later = 1


def test_a_function_of_a_variable_that_is_not_there_yet() -> None:
    _, report = convert(Waiting)
    assert report.replaced, str(report)


def functions(number: int, last: float) -> dict[str, Callable[[float], float]]:
    """Many that are the same at each call, and one that is not."""
    factor = 1.0
    found: dict[str, Callable[[float], float]] = {f"task {i}": lambda y: y * factor for i in range(number)}
    return {**found, "last": lambda y: y * last}


def states(number: int, last: float) -> list[complex]:
    """The same of objects of which pickle alone knows what they keep."""
    return [*map(complex, range(number)), complex(last)]


@pytest.mark.parametrize("make", [functions, states])
def test_the_last_of_many_is_compared_too(make: Any) -> None:
    """What is made to compare one does not stand for another that is made at its address."""
    assert same(make(9, 1.0), make(9, 1.0), 1e-6, {})
    assert not any(same(make(number, 1.0), make(number, 2.0), 1e-6, {}) for number in range(12))
