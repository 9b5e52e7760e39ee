"""What a module writes to that is not its own, or that a trial cannot compare by itself, keeps it as it is."""

from __future__ import annotations

import argparse
import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X


class Store:
    """A class that keeps what is given to it, as auxiliary losses often are."""

    losses: list[Tensor] = []  # noqa: RUF012


class Held(Store):
    """One that modules hold, or hold an object of."""

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
ARGUMENTS = argparse.Namespace(calls=0)
ROWS: list[int] = []
COUNTS = numpy.zeros(3)
ENTRIES = {"a": 1}
SHRUNK = set(range(100))
SHRUNK -= SHRUNK - {1, 64}  # its copies have these in another order
CALLED = 0


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


class InArguments(Level):
    def weigh(self, z: Tensor) -> Tensor:
        ARGUMENTS.calls += 1
        return z.softmax(1)


class ByAProperty(Level):
    @property
    def sharpness(self) -> float:
        ROWS.append(1)
        return 1.0

    def weigh(self, z: Tensor) -> Tensor:
        return (self.sharpness * z).softmax(1)


class InAFunctionWithin(Level):
    def weigh(self, z: Tensor) -> Tensor:
        def noted(shares: Tensor) -> Tensor:
            ROWS.append(len(shares))
            return shares

        return noted(z.softmax(1))


class InAnArray(Level):
    def weigh(self, z: Tensor) -> Tensor:
        COUNTS[0] += 1
        return z.softmax(1)


class OfKeys(Level):
    def weigh(self, z: Tensor) -> Tensor:
        key, value = ENTRIES.popitem()
        ENTRIES[f"{key}a"] = value
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
    "arguments": (InArguments, lambda model: ARGUMENTS.calls),
    "a list, by a property": (ByAProperty, lambda model: len(ROWS)),
    "a list, by a function within": (InAFunctionWithin, lambda model: len(ROWS)),
    "an array": (InAnArray, lambda model: COUNTS.any()),
    "the keys of a dictionary": (OfKeys, lambda model: list(ENTRIES)),
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


class Storing(Level):
    """In what somebody gives it, which its code does not name."""

    store: Any

    def losses(self) -> list[Tensor]:
        return self.store.losses  # type: ignore[no-any-return]

    def weigh(self, z: Tensor) -> Tensor:
        self.losses().append(z.var())
        return z.softmax(1)


class StoringInAList(Storing):
    def losses(self) -> list[Tensor]:
        return self.store["auxiliary"][0].losses  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "hold"), [(Storing, lambda: Held), (Storing, Held), (StoringInAList, lambda: {"auxiliary": [Held]})]
)
def test_what_is_written_to_a_class_that_it_holds(kind: Any, hold: Callable[[], Any]) -> None:
    """By itself, as the class of an object, or in containers."""
    register(kind)
    model = kind()
    model.store = hold()
    (line,) = mk.convert(model).lines
    assert line.action == "left alone" and line.detail.endswith("which is not its own")
    assert not Held.losses


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


class OfASet(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if len(SHRUNK) == 2 else z


def test_a_set_in_another_order_is_the_same() -> None:
    register(OfASet)
    assert mk.convert(OfASet()).replaced


class OfATuple(Level):
    """Of which PyTorch's backward hooks make nothing else."""

    def forward(self, x: Tensor) -> Any:
        return tuple(super().forward(x))


def called(*_: Any) -> None:
    global CALLED
    CALLED += 1


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_backward_hooks_may_count(kind: str) -> None:
    mk.convert.register(
        OfATuple,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        outputs=lambda model, mixed: tuple(mixed),
    )
    model = OfATuple()
    getattr(model, f"register_full_backward_{kind}")(called)
    assert mk.convert(model).replaced
    assert CALLED == 0


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


class OneSlot:
    __slots__ = "calls"

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
        self.meter: Any = Meter()

    def weigh(self, z: Tensor) -> Tensor:
        self.meter.calls += 1
        return z.softmax(1)


class InASlot(InSlots):
    def prepare(self) -> None:
        self.meter: Any = OneSlot()


class InASet(Level):
    def prepare(self) -> None:
        self.seen: set[int] = set()

    def weigh(self, z: Tensor) -> Tensor:
        self.seen.add(len(z))
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


@pytest.mark.parametrize("kind", [ByAMethod, ByAPartial, InSlots, InASlot, InASet, InBytes, OfMomentum])
def test_what_it_keeps_of_a_call_keeps_it_as_it_is(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone
