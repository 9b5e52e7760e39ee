"""What a module keeps, or what is outside it, that a trial cannot try: conversion sees it, or its own code runs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from tests.convert.test_edits import Home, register

X = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))


class Level(Home):
    """Whose shares are made in the place of its logits' softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def prepare(self) -> None:
        """What a class below keeps."""

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(self.weigh(gate(x)).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


# Outside of the module ----------------------------------------------------------------------------------------------


class Store:
    """A class that keeps what is given to it, as auxiliary losses often are."""

    losses: list[Tensor] = []  # noqa: RUF012


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


class Logger:
    """It stands for one with a file, which is not copied."""

    def __init__(self) -> None:
        self.rows: list[float] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Logger:
        return self


LAST: Any = None
ALL: list[Tensor] = []
NAMESPACE = types.SimpleNamespace(calls=0)
COUNTING = Counting()
LOCAL = threading.local()
LOCAL.rows = []
STATISTICS: Any = types.ModuleType("statistics_of_the_user")
STATISTICS.calls = 0


class InAClass(Level):
    def weigh(self, z: Tensor) -> Tensor:
        Store.losses.append(z.var())
        return z.softmax(1)


class OfNone(Level):
    def weigh(self, z: Tensor) -> Tensor:
        global LAST
        LAST = z.detach()
        return z.softmax(1)


class OfAnotherList(Level):
    def weigh(self, z: Tensor) -> Tensor:
        global ALL
        ALL = [*ALL, z.detach()]
        return z.softmax(1)


class InANamespace(Level):
    def weigh(self, z: Tensor) -> Tensor:
        NAMESPACE.calls += 1
        return z.softmax(1)


class InAModule(Level):
    def weigh(self, z: Tensor) -> Tensor:
        STATISTICS.calls += 1
        return z.softmax(1)


class OfAThread(Level):
    def weigh(self, z: Tensor) -> Tensor:
        LOCAL.rows.append(z.var())
        return z.softmax(1)


class ByAnotherModel(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return COUNTING(z.softmax(1))  # type: ignore[no-any-return]


class OnItsClass(Level):
    def weigh(self, z: Tensor) -> Tensor:
        type(self).last = z.detach()  # type: ignore[attr-defined]
        return z.softmax(1)


class Logging(Level):
    def prepare(self) -> None:
        self.logger = Logger()

    def weigh(self, z: Tensor) -> Tensor:
        self.logger.rows.append(z.mean().item())
        return z.softmax(1)


def _local() -> tuple[type, Callable[[], int]]:
    calls = 0

    class OfAFunction(Level):
        def weigh(self, z: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return z.softmax(1)

    return OfAFunction, lambda: calls


OfAFunction, calls_of_function = _local()
OUTSIDE: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "a class": (InAClass, lambda model: len(Store.losses)),
    "a name for None": (OfNone, lambda model: LAST),
    "a name for a list": (OfAnotherList, lambda model: len(ALL)),
    "a namespace": (InANamespace, lambda model: NAMESPACE.calls),
    "a module": (InAModule, lambda model: STATISTICS.calls),
    "a thread": (OfAThread, lambda model: len(LOCAL.rows)),
    "another model": (ByAnotherModel, lambda model: COUNTING.calls.item()),
    "its class": (OnItsClass, lambda model: hasattr(OnItsClass, "last")),
    "an object that is not copied": (Logging, lambda model: len(model.logger.rows)),
    "a variable of a function": (OfAFunction, lambda model: calls_of_function()),
}


@pytest.mark.parametrize("where", OUTSIDE)
def test_what_is_written_outside_keeps_a_level_as_it_is(where: str) -> None:
    kind, look = OUTSIDE[where]
    register(kind)
    model = kind()
    before = look(model)
    (line,) = mk.convert(model).lines
    assert line.action == "left alone" and "which is not its own" in line.detail
    assert look(model) == before


def test_callbacks_are_called() -> None:
    class WithCallbacks(Level):
        def prepare(self) -> None:
            self.callbacks: list[Any] = []

        def weigh(self, z: Tensor) -> Tensor:
            for callback in self.callbacks:
                callback(z)
            return z.softmax(1)

    register(WithCallbacks)
    model, seen = WithCallbacks(), []
    model.callbacks.append(lambda z: seen.append(z.shape))
    mk.convert(model)
    assert not seen
    model(X)
    assert len(seen) == 3


# Of the module ------------------------------------------------------------------------------------------------------


class Tracker:
    def __init__(self) -> None:
        self.rows: list[float] = []

    def log(self, z: Tensor) -> None:
        self.rows.append(z.mean().item())


class Meter:
    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class ByAMethod(Level):
    def prepare(self) -> None:
        self.log = Tracker().log

    def weigh(self, z: Tensor) -> Tensor:
        self.log(z)
        return z.softmax(1)


class ByAPartial(Level):
    def prepare(self) -> None:
        self.log = functools.partial(Tracker.log, Tracker())

    def weigh(self, z: Tensor) -> Tensor:
        self.log(z)
        return z.softmax(1)


class InSlots(Level):
    def prepare(self) -> None:
        self.meter = Meter()

    def weigh(self, z: Tensor) -> Tensor:
        self.meter.calls += 1
        return z.softmax(1)


class InBytes(Level):
    def prepare(self) -> None:
        self.calls = bytearray(1)

    def weigh(self, z: Tensor) -> Tensor:
        self.calls[0] += 1
        return z.softmax(1)


class OfMomentum(Level):
    """A copy of the gates that follows them, past what counts writes."""

    def prepare(self) -> None:
        self.key = copy.deepcopy(self.gates).requires_grad_(False)

    def weigh(self, z: Tensor) -> Tensor:
        for key, query in zip(self.key.parameters(), self.gates.parameters(), strict=True):
            key.data = key.data * 0.9 + query.data * 0.1 + 0.01
        return z.softmax(1)


@pytest.mark.parametrize("kind", [ByAMethod, ByAPartial, InSlots, InBytes, OfMomentum])
def test_what_it_keeps_of_a_call_keeps_it_as_it_is(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


# Settings -----------------------------------------------------------------------------------------------------------


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


def _agree(model: nn.Module, other: nn.Module) -> None:
    for y, right in zip(model(X), other(X), strict=True):
        torch.testing.assert_close(y, right)


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
    _agree(model, plain)
    assert fused_calls
    change(model)
    change(plain)
    fused_calls.clear()
    _agree(model, plain)
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


class OfTensor(Level):
    def prepare(self) -> None:
        self.temperature = torch.tensor(1.0)

    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.temperature).softmax(1)


@pytest.mark.parametrize("kind", [InEvaluation, OfTensor])
def test_settings_that_a_trial_changes(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


# Masks of dropouts --------------------------------------------------------------------------------------------------


class ByTask(Level):
    """Experts are called once a task, and so draw a mask for each."""

    def prepare(self) -> None:
        for expert in self.experts:
            expert.append(nn.Dropout(0.5))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            sum(w[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))  # type: ignore[misc]
            for w in (g(x).softmax(1) for g in self.gates)
        ]


class OverABottom(Level):
    """All experts read one mask."""

    def prepare(self) -> None:
        self.bottom = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(self.bottom(x))


class OverADropout(Level):
    def prepare(self) -> None:
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(self.drop(x))


class OfShares(Level):
    """A dropout that drops nothing yet."""

    def prepare(self) -> None:
        self.drop = nn.Dropout(0.0)

    def weigh(self, z: Tensor) -> Tensor:
        return self.drop(z.softmax(1))  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """Experts in one product, behind which one dropout draws all of their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8))
        self.drop = nn.Dropout(0.5)
        self.gates = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.drop(torch.einsum("bd,ehd->beh", x, self.weight).relu())
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def _register(kind: type, experts: Any) -> None:
    routing = mk.Routing.mmoe(4, 3)
    mk.convert.register(kind, experts=experts, gates=lambda model: model.gates, routing=lambda model: routing)


DROPOUTS: dict[str, tuple[type, Callable[[Any], Any], bool]] = {
    "a mask a task": (ByTask, lambda model: model.experts, False),
    "a mask for all experts": (OverABottom, lambda model: [[model.bottom, e] for e in model.experts], False),
    "a mask of the input": (OverADropout, lambda model: [[model.drop, e] for e in model.experts], False),
    "a rate of zero": (OfShares, lambda model: model.experts, False),
    "masks in one call": (Stacked, lambda model: [[w.t(), "relu", model.drop] for w in model.weight], True),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_as_many_masks_are_drawn(name: str) -> None:
    kind, experts, converted = DROPOUTS[name]
    _register(kind, experts)
    assert bool(mk.convert(kind()).replaced) == converted


# Dtypes, checkpoints, arguments -------------------------------------------------------------------------------------


class Router(Level):
    """In float32 under autocast, as routers often are."""

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        with torch.autocast("cpu", enabled=False):
            shares = [gate(x).softmax(1) for gate in self.gates]
        return [(w.unsqueeze(2) * hidden).sum(1) for w in shares]


class Narrow(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Wide(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return (z.float() if z.dtype is torch.bfloat16 else z).softmax(1)


class Checkpointed(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([checkpoint(expert, x, use_reentrant=False) for expert in self.experts], dim=1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.mark.parametrize("kind", [Router, Narrow, Wide, Checkpointed])
def test_what_float64_does_not_show(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


def test_a_gate_of_equal_shares_under_autocast() -> None:
    """The logits of the others have another dtype there."""
    routing = mk.Routing((0,) * 4, ((0, 1, 2, 3),) * 3 + ((0, 1),))

    class WithMean(Level):
        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed = [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]
            return [*mixed, hidden[:, :2].mean(1)]

    gates: Callable[[Any], Any] = lambda model: [*model.gates, None]  # noqa: E731
    mk.convert.register(WithMean, experts=lambda model: model.experts, gates=gates, routing=lambda model: routing)
    plain = WithMean()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    with torch.autocast("cpu", torch.bfloat16):
        for y, right in zip(model(X), plain(X), strict=True):
            torch.testing.assert_close(y, right, rtol=0.05, atol=0.05)


class OfAnything(Level):
    def forward(self, x: Any) -> list[Tensor]:
        return super().forward(torch.cat([*x.values()], 1) if isinstance(x, dict) else torch.as_tensor(x))


class OfStreams(Level):
    def forward(self, xs: Any) -> list[Tensor]:
        streams = list(xs)
        hidden = torch.stack([expert(x) for expert, x in zip(self.experts, streams, strict=True)], dim=1)
        gates = zip(self.gates, streams, strict=False)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate, x in gates]


def test_arguments_of_other_kinds() -> None:
    register(OfAnything)
    plain = OfAnything()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    for given in ({"a": X[:, :4], "b": X[:, 4:]}, X.tolist()):
        for y, right in zip(model(given), plain(given), strict=True):
            torch.testing.assert_close(y, right)


def test_streams_of_other_kinds() -> None:
    routing = mk.Routing((0, 1, 2, 3), ((0, 1, 2, 3),) * 3)
    experts: Callable[[Any], Any] = lambda model: model.experts  # noqa: E731
    mk.convert.register(OfStreams, experts=experts, gates=lambda model: model.gates, routing=lambda model: routing)
    plain = OfStreams()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    makers: list[Callable[[], Any]] = [
        lambda: [X] * 4,
        lambda: dict.fromkeys(range(4), X).values(),
        lambda: (X for _ in range(4)),
        lambda: itertools.repeat(X, 4),
    ]
    for make in makers:
        for y, right in zip(model(make()), plain(make()), strict=True):
            torch.testing.assert_close(y, right)


# What conversion leaves ---------------------------------------------------------------------------------------------


def test_a_parametrization_that_is_removed_later() -> None:
    register(Level)
    model = Level()
    parametrizations.spectral_norm(model.gates[0])
    assert mk.convert(model).replaced
    model.eval()
    parametrize.remove_parametrizations(model.gates[0], "weight")
    _agree(pickle.loads(pickle.dumps(model)), model)


def test_experts_whose_first_matrix_is_of_a_parametrization() -> None:
    register(Level)
    model = Level()
    for expert in model.experts:
        parametrizations.weight_norm(expert[0])
    assert mk.convert(model).replaced or mk.convert(model).lines[0].action == "left alone"
    assert "cannot be multiplied" not in str(mk.convert(Level()))


def test_lists_of_subclasses_stay_as_they_are() -> None:
    known: list[str] = []

    class Listed(Level):
        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            known.append(cls.__name__)

    class Own(Listed):
        pass

    register(Own)
    assert mk.convert(Own()).replaced and known == ["Own"]
