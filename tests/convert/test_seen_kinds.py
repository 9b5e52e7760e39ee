"""What of a module's data C++ compares object by object, what is left to Python, and that edits of both are seen."""

from __future__ import annotations

import collections
import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor, nn

from mtlkernels import _extension
from mtlkernels._convert.calls import Seen
from mtlkernels._convert.watched import changed, watched

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")

LIMITS = {"most": 4.0}


class Plain:
    def __init__(self) -> None:
        self.temperature = 0.5


class WithDefault(Plain):
    temperature = 1.0


class OfSlots:
    __slots__ = ("temperature",)

    def __init__(self) -> None:
        self.temperature = 0.5


class Asked(Plain):
    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name)


class OfSets:
    def __init__(self) -> None:
        self.temperature = {0.5}


class Described:
    """Its class's descriptor comes before what its dictionary has."""

    def __init__(self) -> None:
        self.__dict__["temperature"] = 0.5

    @property
    def temperature(self) -> float:
        return float(self.__dict__["temperature"])

    @temperature.setter
    def temperature(self, value: float) -> None:
        self.__dict__["temperature"] = value


class Reads(nn.Module):
    """Its code reads an attribute of an object in a list, a dictionary, and a global one."""

    def __init__(self, part: Any, table: dict[Any, float]) -> None:
        super().__init__()
        self.parts = [part]
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        temperature: Any = self.parts[0].temperature
        if isinstance(temperature, set):
            temperature = sum(temperature)
        return x / temperature * sum(self.table.values()) * LIMITS["most"]


def seen_of(module: Any) -> tuple[Seen, Any, set[str]]:
    """What is seen of a module, what is watched of it, and the names that Python compares."""
    entries, seen = watched(module, "forward", []), Seen()
    for _ in range(4):
        assert seen.changed(module, entries) is None
    assert seen._kept is not None
    return seen, entries, {names[0] for _, left in seen._kept[1] for names, _ in left}


def assert_noticed(module: Any, seen: Seen, entries: Any) -> None:
    for _ in range(4):
        assert seen.changed(module, entries) == changed(module, entries) is not None


# Of each kind of object whether C++ compares it.
PARTS: dict[Callable[[], Any], bool] = {
    Plain: True,
    WithDefault: True,
    OfSlots: False,
    Asked: False,
    OfSets: False,
    Described: False,
    # Which has a way of its own of being asked before Python 3.13.
    lambda: types.SimpleNamespace(temperature=0.5): "__getattribute__" not in vars(types.SimpleNamespace),
}


@pytest.mark.parametrize("make", PARTS, ids=lambda make: make.__name__)
def test_objects_in_lists(make: Callable[[], Any]) -> None:
    module = Reads(make(), {"a": 1.0})
    seen, entries, left = seen_of(module)
    assert ("parts" not in left) == PARTS[make]
    module.parts[0].temperature = {0.75} if make is OfSets else 0.75
    assert_noticed(module, seen, entries)


@pytest.mark.parametrize("key, seen_by_cpp", [("a", True), (1, True), (("a", 1), False)])
def test_keys_of_dictionaries(key: Any, seen_by_cpp: bool) -> None:
    """Of a tuple another equal one is no other key."""
    module = Reads(Plain(), {key: 1.0})
    seen, entries, left = seen_of(module)
    assert ("table" not in left) == seen_by_cpp
    module.table[key] = 2.0
    assert_noticed(module, seen, entries)


@pytest.mark.parametrize("kind", [collections.OrderedDict, collections.Counter, list])
def test_another_container_in_the_place_of_a_dictionary(kind: Any) -> None:
    module: Any = Reads(Plain(), {"a": 1.0})
    seen, entries, _ = seen_of(module)
    module.table = kind({"a": 2.0})
    assert_noticed(module, seen, entries)


def test_an_object_of_another_class_with_the_same() -> None:
    module = Reads(Plain(), {"a": 1.0})
    seen, entries, _ = seen_of(module)
    module.parts[0] = WithDefault()
    assert_noticed(module, seen, entries)
    module.parts[0] = Plain()
    assert seen.changed(module, entries) is None


def test_an_attribute_that_is_gone() -> None:
    module = Reads(WithDefault(), {"a": 1.0})
    seen, entries, _ = seen_of(module)
    del module.parts[0].temperature
    assert_noticed(module, seen, entries)


def test_a_global_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Reads(Plain(), {"a": 1.0})
    seen, entries, _ = seen_of(module)
    monkeypatch.delitem(globals(), "LIMITS")
    assert_noticed(module, seen, entries)
