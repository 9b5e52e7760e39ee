"""Containers, arrays and tensors that an instance holds, and what becomes of them after its conversion."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import values
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.keeping import MOST_ENTRIES, Keeper
from mtlkernels._convert.shared_state import MOST_NUMBERS
from mtlkernels._convert.watched import changed
from tests.convert.test_edits import register
from tests.convert.weighing import Level, agree, assert_compiled_sees


class Task:
    def __init__(self) -> None:
        self.weight, self.seen = 1.0, 0


class Slotted:
    __slots__ = ("weight",)

    def __init__(self) -> None:
        self.weight = 1.0


class Schedule:
    """An object whose methods read it."""

    least = 1.0

    def __init__(self) -> None:
        self.epoch = 0

    def factor(self) -> float:
        return self.least if self.epoch == 0 else 0.1


class Holding(Level):
    """What it holds changes nothing yet."""

    def prepare(self) -> None:
        self.long, self.nested, self.optional = [1.0] * 40, [[1.0, 2.0]], [None, None]
        self.later: list[int] = []
        self.kinds, self.pair = ["softmax"], (1.0, (1.0, "a"))
        self.by_task, self.by_name = {0: [1.0]}, {"ctr": {"weight": 1.0}}
        self.filled: dict[int, float] = {}
        self.off: set[int] = set()
        self.queue = collections.deque([1.0])
        self.tensors, self.masks = [torch.ones(2)], {0: torch.ones(2)}
        self.mask, self.table, self.flags = torch.ones(100), torch.ones(2000), torch.tensor([True])
        self.array, self.number = numpy.ones(4), numpy.float32(1)
        self.words = numpy.array(["softmax"], dtype=object)
        self.scale = functools.partial(float.__mul__, 1.0)
        self.tasks, self.slotted, self.schedule = [Task()], Slotted(), Schedule()
        self.span = range(1)
        self.history: list[int] = []

    def factors(self, k: int) -> list[Any]:
        return [
            *(self.long[k], self.nested[k][k], self.by_task[k][k], self.by_name["ctr"]["weight"], self.queue[k]),
            *(self.filled.get(k, 1.0), self.pair[1][0], self.scale(1.0), float(self.array[k]), float(self.number)),
            *(self.tensors[k][k], self.masks[k][k], self.mask[k], self.table[k], self.flags[k]),
            *(self.tasks[k].weight, self.slotted.weight, self.schedule.factor(), len(self.span)),
        ]

    def weigh(self, z: Tensor) -> Tensor:
        k = z.dim() - 2
        if self.later or k in self.off or self.optional[k] is not None or self.words[k] != "softmax":
            return torch.zeros_like(z)
        for factor in self.factors(k):
            z = z * float(factor)
        return z.softmax(1) if self.kinds[k] == "softmax" else z


@pytest.fixture(scope="module", name="holding")
def _holding() -> Holding:
    register(Holding)
    model = Holding()
    assert mk.convert(model).replaced
    return model


def _first(name: str, value: Any = 9.0) -> Callable[[Any], object]:
    """Another value in the first place of a container."""
    return lambda model: getattr(model, name).__setitem__(0, value)


EDITS: dict[str, Callable[[Any], object]] = {
    "a long list": _first("long"),
    "a list in a list": lambda model: model.nested[0].__setitem__(0, 9.0),
    "None in a list": _first("optional"),
    "an empty list": lambda model: model.later.append(1),
    "a word in a list": _first("kinds", "none"),
    "a tuple in a tuple": lambda model: setattr(model, "pair", (1.0, (9.0, "a"))),
    "a list in a dictionary": lambda model: model.by_task[0].__setitem__(0, 9.0),
    "a number in a dictionary in one": lambda model: model.by_name["ctr"].update(weight=9.0),
    "an empty dictionary": _first("filled"),
    "an empty set": lambda model: model.off.add(0),
    "a deque": _first("queue"),
    "a tensor in a list": lambda model: model.tensors[0].mul_(9),
    "another tensor in a list": _first("tensors", torch.full((2,), 9.0)),
    "a tensor in a dictionary": lambda model: model.masks[0].mul_(9),
    "a tensor, uncounted": lambda model: model.mask.data.mul_(9),
    "a tensor of many numbers": lambda model: model.table.mul_(9),
    "a mask in place": lambda model: model.flags.logical_not_(),
    "an array": _first("array"),
    "a number of NumPy's": lambda model: setattr(model, "number", numpy.float32(9)),
    "an array of objects": _first("words", "none"),
    "a partial": lambda model: setattr(model, "scale", functools.partial(float.__mul__, 9.0)),
    "an object in a list": lambda model: setattr(model.tasks[0], "weight", 9.0),
    "an object with slots": lambda model: setattr(model.slotted, "weight", 9.0),
    "what an object's method reads": lambda model: setattr(model.schedule, "epoch", 1),
    "what an object has of its class": lambda model: setattr(model.schedule, "least", 9.0),
    "a range": lambda model: setattr(model, "span", range(3)),
}


def _copies(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_bring_its_own_code_back(holding: Any, edit: Callable[[Any], object]) -> None:
    for model in _copies(holding):
        assert changed(model, vars(model)[WATCHED]) is None
        edit(model)
        own = copy.deepcopy(model)
        mk.revert(own)
        agree(model, own)
        assert changed(model, vars(model)[WATCHED]) is not None


def test_what_says_the_same_or_is_not_read_changes_nothing(holding: Any, fused_calls: list[int]) -> None:
    model = copy.deepcopy(holding)
    model.nested, model.tasks, model.tensors = [[1.0, 2.0]], [Task()], [torch.ones(2)]
    model.tasks[0].seen, model.table = 7, torch.ones(2000)
    model.history.append(1)
    assert changed(model, vars(model)[WATCHED]) is None
    agree(model, holding)
    assert fused_calls == [4, 4]


def test_many_numbers_are_compared_once_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    are_equal = values._are_equal
    monkeypatch.setattr(values, "_are_equal", lambda *args: compared.append(1) or are_equal(*args))
    table = torch.ones(2000)
    kept = values.Numbers(table)
    assert kept.are(table) and kept.are(table) and len(compared) == 1
    table.mul_(2)
    assert not kept.are(table) and not kept.are(table) and len(compared) == 2
    assert kept.are(torch.ones(2000)) and not kept.are(torch.ones(2000, dtype=torch.float64))
    assert not kept.are(torch.ones(2, 1000)) and not kept.are(None)
    one, other = torch.full((2000,), 1.0), torch.full((2000,), 9.0)
    assert one._version == other._version and kept.are(one) and not kept.are(other) and kept.are(one)
    with torch.inference_mode():
        assert kept.are(torch.ones(2000))


@pytest.mark.parametrize(
    ("kept", "now", "same"),
    [
        ([1, 2], (1, 2), True),
        ([1, 2], [1], False),
        ([1], [True], False),
        ((1, 2), (1, 2, 3), False),
        ([float("nan")], [float("nan")], True),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}, False),
        ({"a": 1}, {"b": 1}, False),
        ({1, (2, "a")}, {(2, "a"), 1}, True),
        ({1}, {2}, False),
        (functools.partial(int, base=2), functools.partial(int, base=8), False),
        ({Task}, {Task, 1}, False),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.ones(2).to_sparse(), torch.zeros(2).to_sparse(), True),
        (numpy.ones(2), numpy.ones(2, dtype="float32"), False),
        (range(2), range(3), False),
    ],
)
def test_what_is_the_same(kept: Any, now: Any, same: bool) -> None:
    keeper = Keeper(lambda value: (), lambda tensor: False)
    assert values.is_same(now, keeper.keep(kept)) == same


class Long(Level):
    def prepare(self) -> None:
        self.weights = [1.0] * (MOST_ENTRIES + 1)
        self.unread = list(self.weights)

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if self.weights[0] == 1 else z


def test_more_than_a_call_should_compare() -> None:
    register(Long)
    model = Long()
    (line,) = mk.convert(model).left_alone
    assert line.detail == "its code reads weights, which may become another, and is more than 10000 entries"
    model.weights.pop()
    assert mk.convert(model).replaced


def _within_itself() -> list[Any]:
    parts: list[Any] = []
    parts.append(parts)
    return parts


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.empty(MOST_NUMBERS + 1), "a tensor of more than 1048576 numbers, which is not registered"),
        (numpy.empty(MOST_NUMBERS + 1), "more than 1048576 numbers of NumPy's"),
        ([[0] * 100] * 100, "more than 10000 entries"),
        (_within_itself(), "containers within containers"),
    ],
    ids=["tensor", "array", "entries", "depth"],
)
def test_too_much(value: Any, message: str) -> None:
    with pytest.raises(values.TooMuch, match=message):
        Keeper(lambda value: (), lambda tensor: False).keep(value)


class Nested:
    """An object that reads another one of its kind, and so on."""

    def __init__(self, depth: int) -> None:
        self.inner = Nested(depth - 1) if depth else None

    def factor(self) -> float:
        return 1.0 if self.inner is None else self.inner.factor()


class Dynamic:
    """A configuration that finds its entries by itself, as those of libraries do."""

    def __init__(self, **entries: float) -> None:
        self.__dict__["_entries"] = entries

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_entries"][name]
        except KeyError:
            raise AttributeError(name) from None


class Configured(Level):
    def prepare(self) -> None:
        self.nested, self.dynamic = Nested(3), Dynamic(temperature=1.0)

    def weigh(self, z: Tensor) -> Tensor:
        return (z * self.nested.factor() / self.dynamic.temperature).softmax(1)


def test_objects_of_objects() -> None:
    register(Configured)
    model = Configured()
    assert mk.convert(model).replaced
    own = copy.deepcopy(model)
    mk.revert(own)
    for each in (model, own):
        each.dynamic._entries["temperature"] = 0.1
    agree(model, own)
    assert changed(model, vars(model)[WATCHED]) == "dynamic.temperature"
    model = Configured()
    model.nested = Nested(20)
    (line,) = mk.convert(model).left_alone
    assert "objects within objects" in line.detail


class OfTensors(nn.Module):
    """Experts of tensors in lists, which every call reads, and which training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = [torch.randn(6, 8) for _ in range(3)]
        self.gates = nn.ParameterList(torch.randn(3, 8) for _ in range(2))
        self.all = list(self.gates)

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([(x @ weight.t()).relu() for weight in self.weights], dim=1)
        return [((x @ gate.t()).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.all]


def test_tensors_that_each_call_reads_may_change(fused_calls: list[int]) -> None:
    mk.convert.register(
        OfTensors,
        experts=lambda model: [[weight.t(), "relu"] for weight in model.weights],
        gates=lambda model: [gate.t() for gate in model.gates],
        routing=lambda model: mk.Routing.mmoe(3, 2),
    )
    model = OfTensors()
    assert mk.convert(model).replaced
    with torch.no_grad():
        model.weights[0].mul_(2)
        model.gates[0].mul_(2)
        found, expected = model(torch.ones(200, 8)), OfTensors.forward(model, torch.ones(200, 8))
    assert fused_calls == [3]
    torch.testing.assert_close(found, expected)


class Masked(Level):
    def prepare(self) -> None:
        self.masks = [torch.ones(4)]

    def weigh(self, z: Tensor) -> Tensor:
        for k in range(1):
            z = z * self.masks[k].to(z.dtype)
        return z.softmax(1)


class Listed(Level):
    def prepare(self) -> None:
        self.weights: list[Any] = [1.0, [1, None]]
        self.config = types.SimpleNamespace(weights={0: 1.0})

    def weigh(self, z: Tensor) -> Tensor:
        for k in range(1):
            if self.weights[k] != 1 or self.config.weights[k] != 1:
                return torch.zeros_like(z)
        return z.softmax(1)


def _tenth(model: Any) -> None:
    model.masks[0].mul_(10)


def _second(model: Any) -> None:
    model.config.weights[0] = 2.0


@pytest.mark.parametrize(("kind", "edit", "fused"), [(Masked, _tenth, False), (Listed, _second, True)])
def test_compiles_in_one_graph_that_sees_edits(
    kind: Any, edit: Callable[[Any], None], fused: bool, fresh_compiler: None, fused_calls: list[int]
) -> None:
    """The compiler sees lists; a tensor's numbers it cannot, and compiles the own code of what reads them."""
    register(kind)
    assert_compiled_sees(kind, edit, fused_calls, fused)
