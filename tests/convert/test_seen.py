"""What is watched of a module is compared object by object once it was found as it was: every edit is seen by that."""

from __future__ import annotations

import collections
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtlkernels import _extension
from mtlkernels._convert.calls import Seen
from mtlkernels._convert.watched import changed, watched

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")

Point = collections.namedtuple("Point", ("x", "y"))
SCALES = {"first": 1.5, "second": [2.5, 3.5]}
ROOT = Path(__file__).parents[2]


class Loop(tuple):  # type: ignore[type-arg]
    """A tuple with a way of its own of going over what is in it."""

    def __iter__(self) -> Any:
        return iter(list(tuple.__iter__(self))[::-1])


class Settings:
    def __init__(self) -> None:
        self.temperature = 0.5
        self.unread = 1.0


def doubled(x: Tensor) -> Tensor:
    return 2 * x


class Reads(nn.Module):
    """Its code reads something of each kind."""

    rate = 1.25
    choices = [1.0, 2.0]  # noqa: RUF012

    def __init__(self, outer: list[float]) -> None:
        super().__init__()
        self.flag = True
        self.mask = None
        self.name = "plain"
        self.sizes = [7, 11]
        self.table = {"a": 1.0, "b": (2.0, "c")}
        self.ordered = collections.OrderedDict(u=1.0, v=2.0)
        self.points = [Point(1.0, 2.0)]
        self.loop = Loop((1.0, 2.0))
        self.members = {1, 2}
        self.settings = Settings()
        self.function = doubled
        self.partial = functools.partial(F.leaky_relu, negative_slope=0.25)
        self.number = torch.tensor(3.0)
        self.softmax = nn.Softmax(dim=1)
        self.parts = nn.ModuleList([nn.Sequential(nn.ReLU()), nn.Linear(3, 3)])
        self.inner = lambda x: x * outer[0]

    def forward(self, x: Tensor) -> Tensor:
        scale = SCALES["first"] + SCALES["second"][0] + self.rate + self.choices[0] + self.sizes[0]
        scale = scale + self.table["a"] + sum(self.ordered.values()) + self.points[0].x + len(self.members)
        scale = scale + self.settings.temperature + self.number + len(self.name) + sum(self.loop)
        for part in self.parts:
            x = part(x)
        if self.flag and self.mask is None and not hasattr(self, "extra"):
            x = self.partial(self.inner(self.function(x)))
        return self.softmax(x * scale)


class Case:
    """A module, what is watched of it, and what is seen of that."""

    def __init__(self) -> None:
        self.outer = [1.0]
        self.module: Any = Reads(self.outer)
        self.watched = watched(self.module, "forward", [self.module.parts[1]])
        self.seen = Seen()

    def warm(self) -> Any:
        for _ in range(4):
            assert self.seen.changed(self.module, self.watched) is None
        kept = self.seen._kept
        assert kept is not None
        return kept[0]


@pytest.fixture
def case() -> Case:
    return Case()


def put(name: str, value: Any) -> Callable[[Case], None]:
    return lambda case: setattr(case.module, name, value)


def _class_attribute(case: Case) -> None:
    case.module.rate = 4.0  # of the instance, in the place of its class's


def _reordered(case: Case) -> None:
    case.module.ordered.move_to_end("u")


def _reordered_dictionary(case: Case) -> None:
    case.module.table["a"] = case.module.table.pop("a")


EDITS: dict[str, Callable[[Case], Any]] = {
    "a flag": put("flag", False),
    "something in the place of None": put("mask", torch.ones(1)),
    "a word": put("name", "other"),
    "an entry of a list": lambda case: case.module.sizes.__setitem__(1, 13),
    "a longer list": lambda case: case.module.sizes.append(13),
    "a shorter list": lambda case: case.module.sizes.pop(),
    "a set in the place of a list": put("sizes", {7, 11}),
    "an entry of a dictionary": lambda case: case.module.table.__setitem__("a", 5.0),
    "what is in an entry of a dictionary": lambda case: case.module.table.__setitem__("b", (2.0, "d")),
    "a dictionary's order": _reordered_dictionary,
    "one more key": lambda case: case.module.table.update(z=1),
    "another key": lambda case: (case.module.table.pop("b"), case.module.table.update(z=(2.0, "c"))),
    "an ordered dictionary's order": _reordered,
    "an entry of an ordered dictionary": lambda case: case.module.ordered.update(u=9.0),
    "a named tuple": lambda case: case.module.points.__setitem__(0, Point(1.0, 3.0)),
    "a tuple of its own kind": put("loop", Loop((2.0, 1.0))),
    "a set": lambda case: case.module.members.add(3),
    "an object's attribute": lambda case: setattr(case.module.settings, "temperature", 0.75),
    "another object": lambda case: setattr(case.module, "settings", Point(1.0, 2.0)),
    "a function": put("function", F.relu),
    "a partial function": put("partial", functools.partial(F.leaky_relu, negative_slope=0.5)),
    "a function's variable": lambda case: case.outer.__setitem__(0, 2.0),
    "numbers of a tensor": lambda case: case.module.number.fill_(4.0),
    "another tensor": put("number", torch.tensor(5.0)),
    "a setting of PyTorch's": lambda case: setattr(case.module.softmax, "dim", 0),
    "a part": lambda case: case.module.parts.__setitem__(0, nn.Sequential(nn.SELU())),
    "a part's part": lambda case: case.module.parts[0].__setitem__(0, nn.SELU()),
    "no part": lambda case: setattr(case.module, "softmax", None),
    "an attribute that was not there": put("extra", 1.0),
    "the instance's in the place of its class's": _class_attribute,
    "a class's list": lambda case: case.module.choices.__setitem__(0, 9.0),
    "a global dictionary": lambda case: SCALES.update(first=9.0),
    "a list in a global dictionary": lambda case: SCALES["second"].__setitem__(0, 9.0),  # type: ignore[attr-defined]
}


class Proxy:
    """It has what another object has."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __getattr__(self, name: str) -> Any:
        return getattr(self.other, name)


class Later(nn.Module):
    """Its code asks for what objects may get by their classes, or by others."""

    def __init__(self) -> None:
        super().__init__()
        self.settings, self.behind = Settings(), Proxy(Settings())
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self.settings, "scale"):
            x = x * self.settings.scale  # type: ignore[attr-defined]
        if hasattr(self.behind, "scale"):
            x = x * self.behind.scale
        return self.softmax(x * self.settings.temperature)


@pytest.mark.parametrize("where", ["its class", "another object", "a property"])
def test_what_objects_get_otherwise(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = Later(), Seen()
    entries = watched(module, "forward", [])
    for _ in range(4):
        assert seen.changed(module, entries) is None
    assert seen._kept is not None
    if where == "its class":
        monkeypatch.setattr(Settings, "scale", 2.0, raising=False)
    elif where == "another object":
        module.behind.other.scale = 2.0
    else:
        monkeypatch.setattr(Settings, "temperature", property(lambda self: 4.0), raising=False)
    for _ in range(4):
        assert seen.changed(module, entries) == changed(module, entries) is not None


class InList(nn.Module):
    """Code that reads an attribute of an object in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = [Settings()]

    def forward(self, x: Tensor) -> Tensor:
        return x / self.settings[0].temperature


def test_a_class_that_gets_another_way_of_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(self: Any, name: str) -> Any:
        return 3.0 if name == "temperature" else object.__getattribute__(self, name)

    module, seen = InList(), Seen()
    entries = watched(module, "forward", [])
    for _ in range(4):
        assert seen.changed(module, entries) is None
    assert seen._kept is not None
    monkeypatch.setattr(Settings, "__getattribute__", asked, raising=False)
    assert seen.changed(module, entries) == "settings"


class Config(dict):  # type: ignore[type-arg]
    """A dictionary of a kind of its own."""


class Asking(nn.Module):
    """Code that asks a dictionary for what it may lack."""

    def __init__(self) -> None:
        super().__init__()
        self.config: dict[str, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        try:
            return x / self.config["temperature"]
        except KeyError:
            return x


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict, Config])
def test_an_entry_that_was_absent(kind: type) -> None:
    """Another dictionary has it, of whatever kind that is."""
    module, seen = Asking(), Seen()
    entries = watched(module, "forward", [])
    for _ in range(4):
        assert seen.changed(module, entries) is None
    assert seen._kept is not None
    module.config = kind(temperature=5.0)
    for _ in range(4):
        assert seen.changed(module, entries) == changed(module, entries) is not None


def test_settings_of_parts_by_their_class(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.warm()
    monkeypatch.setattr(nn.Softmax, "dim", property(lambda self: 0, lambda self, value: None), raising=False)
    assert case.seen.changed(case.module, case.watched) == changed(case.module, case.watched) is not None


@pytest.fixture(autouse=True)
def _restored() -> Any:
    choices, scales = list(Reads.choices), {"first": 1.5, "second": [2.5, 3.5]}
    yield
    Reads.choices[:] = choices
    SCALES.clear()
    SCALES.update(scales)


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_seen(name: str, case: Case) -> None:
    case.warm()
    EDITS[name](case)
    expected = changed(case.module, case.watched)
    assert expected is not None
    for _ in range(6):
        assert case.seen.changed(case.module, case.watched) == expected


def test_a_class_that_gets_another_attribute(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.warm()
    monkeypatch.setattr(Reads, "rate", 7.0)
    assert case.seen.changed(case.module, case.watched) == changed(case.module, case.watched) == "rate"
    monkeypatch.undo()
    case.warm()
    monkeypatch.setattr(Reads, "extra", 7.0, raising=False)
    assert case.seen.changed(case.module, case.watched) == changed(case.module, case.watched) == "extra"


def test_most_is_not_compared_in_python(case: Case) -> None:
    case.warm()
    _, rest, *_ = case.seen._kept  # type: ignore[misc]
    left = {names[0] for _, entries in rest for names, _ in entries}
    assert left == {"ordered", "loop", "members", "function", "partial", "number", "inner", "settings"}


def test_what_is_equal_is_compared_again(case: Case) -> None:
    """Other objects of the same values: nothing is given up, and they are seen from then on."""
    first = case.warm()
    case.module.name = "".join(["pla", "in"])
    case.module.settings.temperature = float("0.5")
    for _ in range(8):
        assert case.seen.changed(case.module, case.watched) is None
    assert case.seen._kept is not None and not first.still(case.module)
    case.module.settings.unread = 2.0
    assert case.seen._kept[0].still(case.module)


def test_edits_that_are_taken_back(case: Case) -> None:
    case.warm()
    case.module.flag = False
    assert case.seen.changed(case.module, case.watched) == "flag"
    case.module.flag = True
    for _ in range(8):
        assert case.seen.changed(case.module, case.watched) is None
    assert case.seen._kept is not None


def test_a_part_that_is_gone(case: Case) -> None:
    case.warm()
    del case.module.parts
    assert case.seen.changed(case.module, case.watched) == changed(case.module, case.watched) is not None


def test_something_else_is_watched(case: Case) -> None:
    """As after another conversion."""
    case.warm()
    case.module.flag = False
    again = watched(case.module, "forward", [case.module.parts[1]])
    assert case.seen.changed(case.module, again) is None
    assert case.seen.changed(case.module, case.watched) == "flag"


def test_no_part_is_kept_alive(case: Case) -> None:
    import gc
    import weakref

    case.warm()
    gone = weakref.ref(case.module.parts), weakref.ref(case.module.settings), weakref.ref(case.module.number)
    case.module.parts, case.module.settings, case.module.number = nn.ModuleList(), Settings(), torch.tensor(3.0)
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]


COLLECTED = """
import collections, gc
from torch import nn
from mtlkernels._convert.calls import Seen
from mtlkernels._convert.watched import watched

class Settings:
    def __init__(self):
        self.temperature = 0.5

class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = [PART] + [1.0] * 50

    def forward(self, x):
        return x * len(self.table) + self.table[0].temperature

module, seen = Reads(), Seen()
entries = watched(module, "forward", [])
for _ in range(4):
    assert seen.changed(module, entries) is None
still = seen._kept[0].still
module.table[0] = PART  # whose dictionary nobody has asked for yet

def clear(phase, info):
    gc.disable()
    module.table.clear()

gc.collect()
gc.disable()
gc.callbacks.append(clear)
spare = [tuple([None] * size) for size in (1, 2, 3)]
del spare  # Python 3.10 takes a call's arguments out of these, and makes no tuple that it would count
kept = [[] for _ in range(50)]  # so many that the next object which is tracked makes a collection
gc.set_threshold(1)
gc.enable()
still(module)
gc.disable()
gc.callbacks.clear()
print(len(module.table))
"""


@pytest.mark.parametrize("part, left", [("collections.OrderedDict(a=1.0)", [51]), ("Settings()", [0, 51])])
def test_a_collection_while_it_is_compared(part: str, left: list[int], tmp_path: Path) -> None:
    """What listens to it may empty the list that is gone over; an object's dictionary may be made then, and no more."""
    script = tmp_path / "collected.py"
    script.write_text(COLLECTED.replace("PART", part))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) in left
