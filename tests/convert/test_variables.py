"""Variables around a class, and what the class itself has, that its code reads: watched as what an instance has is."""

from __future__ import annotations

import copy
import enum
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.reading import Scope, is_own
from mtlkernels._convert.watched import changed
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree, assert_compiled_sees

TEMPERATURE = 1.0
MASK: Any = None
CONFIG: dict[str, Any] = {"temperature": 1.0, "step": 0, "scales": [1.0]}
NAMESPACE = types.SimpleNamespace(temperature=1.0, step=0)
TENSORS = [torch.ones(4)]
OWN: Any = types.ModuleType("settings_of_the_user")
OWN.temperature = 1.0


class Settings:
    """A class in the place of a namespace."""

    temperature = 1.0
    step = 0


class Mode(enum.Enum):
    SOFT = 1


def sharpened(z: Tensor) -> Tensor:
    return z * helped()


def helped() -> float:
    return float(OWN.scale())


def _scale() -> float:
    return float(CONFIG["scales"][0])


OWN.scale = _scale


class Reading(Level):
    scales: dict[str, float] = {"ctr": 1.0}  # noqa: RUF012
    factors = [1.0]  # noqa: RUF012

    def prepare(self) -> None:
        self.mode, self.settings = Mode.SOFT, Settings

    def weigh(self, z: Tensor) -> Tensor:
        if MASK is not None or self.mode is not Mode.SOFT:
            z = z.masked_fill(MASK, -1e9)
        z = z * TENSORS[0].to(z.dtype) * self.scales["ctr"] * Reading.factors[0]
        for temperature in (TEMPERATURE, CONFIG["temperature"], NAMESPACE.temperature, OWN.temperature):
            z = z / temperature
        return (sharpened(z) / self.settings.temperature).softmax(1)


HERE = globals()
EDITS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a number": lambda patch: patch.setitem(HERE, "TEMPERATURE", 0.1),
    "None": lambda patch: patch.setitem(HERE, "MASK", torch.tensor([True, False, False, False])),
    "an entry of a dictionary": lambda patch: patch.setitem(CONFIG, "temperature", 0.1),
    "another dictionary": lambda patch: patch.setitem(HERE, "CONFIG", {**CONFIG, "temperature": 0.1}),
    "a list in it, by functions": lambda patch: patch.setitem(CONFIG, "scales", [9.0]),
    "a namespace": lambda patch: patch.setattr(NAMESPACE, "temperature", 0.1),
    "a module of the user's": lambda patch: patch.setattr(OWN, "temperature", 0.1),
    "a class": lambda patch: patch.setattr(Settings, "temperature", 0.1),
    "a tensor": lambda patch: patch.setitem(HERE, "TENSORS", [torch.full((4,), 9.0)]),
    "a dictionary of its class": lambda patch: patch.setitem(Reading.scales, "ctr", 9.0),
    "a list of its class": lambda patch: patch.setattr(Reading, "factors", [9.0]),
}


@pytest.fixture(scope="module", name="reading")
def _reading() -> Reading:
    register(Reading)
    model = Reading()
    assert mk.convert(model).replaced
    return model


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_bring_its_own_code_back(reading: Any, edit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [reading, copy.deepcopy(reading), pickle.loads(pickle.dumps(reading))]
    assert [changed(model, vars(model)[WATCHED]) for model in models] == [None] * 3
    edit(monkeypatch)
    own = copy.deepcopy(reading)
    mk.revert(own)
    for model in models:
        agree(model, own)
        assert changed(model, vars(model)[WATCHED]) is not None


def test_what_is_not_read_changes_nothing(
    reading: Any, monkeypatch: pytest.MonkeyPatch, fused_calls: list[int]
) -> None:
    monkeypatch.setitem(CONFIG, "step", 1)
    monkeypatch.setattr(NAMESPACE, "step", 1)
    monkeypatch.setattr(Settings, "step", 1)
    monkeypatch.setitem(HERE, "TENSORS", [torch.ones(4)])
    reading(X)
    assert fused_calls == [4]


def test_functions_classes_and_constants_are_not_watched(reading: Any) -> None:
    (names,) = ({names[0] for names, _ in entries} for owner, entries in vars(reading)[WATCHED] if owner != ())
    assert names == {"TEMPERATURE", "MASK", "CONFIG", "NAMESPACE", "OWN", "TENSORS", "Reading"}
    assert is_own(Reading) and is_own(sharpened) and is_own(OWN)
    assert not any(map(is_own, (torch, torch.nn.Linear, pytest, mk, mk.convert.register, copy)))


def _around() -> tuple[Any, Callable[[], None]]:
    temperature, later = 1.0, [1.0]

    class InAFunction(Level):
        def weigh(self, z: Tensor) -> Tensor:
            return (z / temperature * later[0]).softmax(1)

    def change() -> None:
        nonlocal temperature
        temperature = 0.1

    return InAFunction, change


def test_a_variable_of_an_enclosing_function() -> None:
    kind, change = _around()
    register(kind)
    model = kind()
    assert mk.convert(model).replaced
    own = copy.deepcopy(model)
    mk.revert(own)
    agree(model, own)
    change()
    agree(model, own)
    assert changed(model, vars(model)[WATCHED]) == "temperature"


def test_variables_of_a_program_that_is_no_module() -> None:
    """As of what ``exec`` runs: copies share them, and where a pickle is loaded there are none."""
    scope = Scope({"__name__": "gone", "temperature": 1.0})
    assert copy.deepcopy(scope).get("temperature") == 1 and scope.get("temperature", compiling=True) != 1
    assert isinstance(pickle.loads(pickle.dumps(scope)).get("temperature"), type)
    here = pickle.loads(pickle.dumps(Scope(HERE)))
    assert here.get("TEMPERATURE") == here.get("TEMPERATURE", compiling=True) == 1


class Global(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return (z / TEMPERATURE / NAMESPACE.temperature).softmax(1)


def test_compiles_in_one_graph_that_sees_edits(
    monkeypatch: pytest.MonkeyPatch, fresh_compiler: None, fused_calls: list[int]
) -> None:
    register(Global)
    assert_compiled_sees(Global, lambda _: monkeypatch.setitem(HERE, "TEMPERATURE", 0.1), fused_calls, True)


FURTHER = [1.0]


class Helping:
    def factor(self) -> float:
        return FURTHER[0]


HELPER = Helping()


class ByAHelper(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) * HELPER.factor()


def test_a_variable_that_the_method_of_another_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found where the first one is looked at, after the variables that the class's code names."""
    register(ByAHelper)
    model = ByAHelper()
    assert mk.convert(model).replaced
    assert changed(model, vars(model)[WATCHED]) is None
    monkeypatch.setitem(globals(), "FURTHER", [9.0])
    assert changed(model, vars(model)[WATCHED]) == "FURTHER"
    own = copy.deepcopy(model)
    mk.revert(own)
    agree(model, own)
