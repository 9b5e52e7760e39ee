"""What a converted module's code calls that is no part of it: functions, methods and objects, with what they have."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.values import Instructions
from mtlkernels._convert.watched import changed
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree, assert_compiled_sees

TEMPERATURE = 1.0


class Temperature:
    rate = 1.0

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, z: Tensor) -> Tensor:
        return (z / self.t / self.rate).softmax(-1)

    def shares(self, z: Tensor) -> Tensor:
        return self(z)


class Inverse(Temperature):
    """Of the same attributes."""

    def __call__(self, z: Tensor) -> Tensor:
        return (z * 3 * self.t).softmax(-1)


class Plain:
    def __call__(self, z: Tensor) -> Tensor:
        return z.softmax(-1)


class Sharp:
    def __call__(self, z: Tensor) -> Tensor:
        return (3 * z).softmax(-1)


class Slotted:
    __slots__ = ("t",)

    def __init__(self, t: float) -> None:
        self.t = t

    def __call__(self, z: Tensor) -> Tensor:
        return (z / self.t).softmax(-1)


class Factor:
    def __init__(self, t: float) -> None:
        self.t = t

    def __rtruediv__(self, z: Tensor) -> Tensor:
        return z / self.t


class Mode:
    def __init__(self, word: str) -> None:
        self.word = word

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mode) and self.word == other.word

    __hash__ = None  # type: ignore[assignment]


class OwnSoftmax(nn.Softmax):
    """Whose forward is PyTorch's."""


class Shares(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode

    def forward(self, z: Tensor) -> Tensor:
        return (z if self.mode == "soft" else 3 * z).softmax(-1)

    def shares(self, z: Tensor) -> Tensor:
        return self.forward(z)


def annealed(t: Any) -> Callable[[Tensor], Tensor]:
    def share(z: Tensor) -> Tensor:
        return (z / (t.t if isinstance(t, types.SimpleNamespace) else t)).softmax(-1)

    return share


def of_default(t: float) -> Callable[..., Tensor]:
    def share(z: Tensor, t: float = t) -> Tensor:
        return (z / t).softmax(-1)

    return share


def of_named_default(t: float) -> Callable[..., Tensor]:
    def share(z: Tensor, *, t: float = t) -> Tensor:
        return (z / t).softmax(-1)

    return share


def class_of(t: float) -> Any:
    class Share:
        def __call__(self, z: Tensor) -> Tensor:
            return (z / t).softmax(-1)

    return Share()


def soft(z: Tensor, t: float = 1.0) -> Tensor:
    return (z / t).softmax(-1)


def divided(z: Tensor) -> Tensor:
    return z / TEMPERATURE


def soft_of_global(z: Tensor) -> Tensor:
    return divided(z).softmax(-1)


def soft_of_itself(z: Tensor) -> Tensor:
    return (z / soft_of_itself.t).softmax(-1)  # type: ignore[attr-defined]


def again(z: Tensor, times: int = 0) -> Tensor:
    return again(z, times - 1) if times else z.softmax(-1)


LAMBDAS: list[Callable[[Tensor], Tensor]] = [lambda z: z.softmax(-1), lambda z: (z / 2).softmax(-1)]


class Calling(Level):
    share: Any

    def weigh(self, z: Tensor) -> Tensor:
        return self.share(z)  # type: ignore[no-any-return]


class ByName(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return self.share.shares(z)  # type: ignore[no-any-return]


class First(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return self.share[0](z)  # type: ignore[no-any-return]


class FirstByName(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return self.share[0].shares(z)  # type: ignore[no-any-return]


class Keyed(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return self.share["ctr"](z)  # type: ignore[no-any-return]


class ByOperator(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.share).softmax(-1)


class Compared(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(-1) if self.share == Mode("soft") else z.sigmoid()


class Optional(Calling):
    """A part that is not there yet."""

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(-1) if self.share is None else self.share(z)  # type: ignore[no-any-return]


class Around(Calling):
    """A function around which is the module that it was made by."""

    def prepare(self) -> None:
        self.t = 1.0
        self.share = lambda z: (z / self.t).softmax(-1)


class OfVariable(Calling):
    def weigh(self, z: Tensor) -> Tensor:
        return VARIABLE(z)  # type: ignore[no-any-return]


VARIABLE: Any = None


def _put(share: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, "share", share)


def _set(inner: Callable[[Any], Any], name: str, value: Any) -> Callable[[Any], None]:
    """Sets an attribute of something in what is called."""
    return lambda model: setattr(inner(model.share), name, value)


def _itself(share: Any) -> Any:
    return share


_first = operator.itemgetter(0)
# Of each: the class, what it calls, and an edit; whether the compiler sees enough of it to fuse the level.
EDITS: dict[str, tuple[type[Calling], Callable[[], Any], Callable[[Any], object], bool]] = {
    "an object's number": (Calling, lambda: Temperature(1.0), _set(_itself, "t", 2.0), True),
    "a number of its class": (Calling, lambda: Temperature(1.0), _set(_itself, "rate", 2.0), True),
    "a number in a slot": (Calling, lambda: Slotted(1.0), _set(_itself, "t", 2.0), True),
    "an object of another class": (Calling, Plain, _put(Sharp()), True),
    "one of the same numbers": (Calling, lambda: Temperature(1.0), _put(Inverse(1.0)), True),
    "one of a class of the same name": (Calling, lambda: class_of(1.0), _put(class_of(2.0)), False),
    "by a method's name": (ByName, lambda: Temperature(1.0), _set(_itself, "t", 2.0), True),
    "by a method's name, of another class": (ByName, lambda: Temperature(1.0), _put(Inverse(1.0)), True),
    "an operator": (ByOperator, lambda: Factor(1.0), _set(_itself, "t", 2.0), True),
    "a comparison": (Compared, lambda: Mode("soft"), _set(_itself, "word", "other"), True),
    "in a list": (First, lambda: [Temperature(1.0)], _set(_first, "t", 2.0), True),
    "in a list, by a method's name": (FirstByName, lambda: [Temperature(1.0)], _set(_first, "t", 2.0), True),
    "in a dictionary": (Keyed, lambda: {"ctr": Plain()}, _put({"ctr": Sharp()}), True),
    "a function": (Calling, lambda: soft, _put(soft_of_global), True),
    "a function of itself": (Calling, lambda: again, _put(soft_of_itself), True),
    "a variable around it": (Calling, lambda: annealed(1.0), _put(annealed(2.0)), False),
    "the same, in a list": (First, lambda: [annealed(1.0)], _put([annealed(2.0)]), False),
    "an object around it": (
        Calling,
        lambda: annealed(types.SimpleNamespace(t=1.0)),
        _set(lambda share: share.__closure__[0].cell_contents, "t", 2.0),
        False,
    ),
    "a function of the same line": (Calling, lambda: LAMBDAS[0], _put(LAMBDAS[1]), True),
    "another default": (Calling, lambda: of_default(1.0), _put(of_default(2.0)), True),
    "another default by name": (Calling, lambda: of_named_default(1.0), _put(of_named_default(2.0)), True),
    "a method's object": (Calling, lambda: Temperature(1.0).shares, _put(Temperature(2.0).shares), True),
    "a number of it": (Calling, lambda: Temperature(1.0).shares, _set(lambda f: f.__self__, "t", 2.0), True),
    "a partial function": (Calling, lambda: functools.partial(soft, t=1.0), _put(functools.partial(soft, t=2.0)), True),
    "a partial object": (
        Calling,
        lambda: functools.partial(Temperature(1.0)),
        _set(operator.attrgetter("func"), "t", 2.0),
        True,
    ),
    "a setting of PyTorch's": (Calling, lambda: nn.Softmax(-1), _set(_itself, "dim", 0), True),
    "another one of PyTorch's": (Calling, lambda: nn.Softmax(-1), _put(nn.Softmax(0)), True),
    "a setting of a class of its": (Calling, lambda: OwnSoftmax(-1), _set(_itself, "dim", 0), True),
    "in a sequence of PyTorch's": (Calling, lambda: nn.Sequential(nn.Softmax(-1)), _set(_first, "dim", 0), True),
    "in a list of PyTorch's": (First, lambda: nn.ModuleList([nn.Softmax(-1)]), _set(_first, "dim", 0), True),
    "in a list of Python's": (First, lambda: [nn.Softmax(-1)], _set(_first, "dim", 0), True),
    "a part of the user's, hidden": (First, lambda: [Shares("soft")], _set(_first, "mode", "sharp"), True),
    "a part, by a method's name": (ByName, lambda: Shares("soft"), _set(_itself, "mode", "sharp"), True),
}


def _made(kind: type[Calling], share: Any) -> Any:
    register(kind)
    model = kind().eval()
    model.share = share
    return model


@pytest.mark.parametrize("name", EDITS)
def test_edits_bring_its_own_code_back(name: str, fused_calls: list[int]) -> None:
    kind, make, edit, _ = EDITS[name]
    plain = _made(kind, make())
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    models = [model, copy.deepcopy(model)]
    for each in models:
        agree(each, plain)
    assert len(fused_calls) == 2
    fused_calls.clear()
    for each in (plain, *models):
        edit(each)
    with torch.no_grad():
        for each in models:
            agree(each, plain)
        agree(torch.export.export(model, (X,), strict=False).module(), plain)
    assert not fused_calls


@pytest.mark.parametrize("name", [name for name in EDITS if name != "an operator"])  # which torch.compile cannot call
def test_the_compiler_sees_edits(name: str, fresh_compiler: None, fused_calls: list[int]) -> None:
    kind, make, edit, fused = EDITS[name]

    def made() -> Any:
        return _made(kind, make())

    assert_compiled_sees(made, edit, fused_calls, fused)  # type: ignore[arg-type]


PICKLED: dict[str, tuple[Any, Any]] = {
    "an object": (Temperature(1.0), Inverse(1.0)),
    "a method": (Temperature(1.0).shares, Inverse(1.0).shares),
    "a function": (soft, soft_of_global),
    "a module": (nn.Softmax(-1), nn.Sigmoid()),
    "a name of a method": (operator.methodcaller("softmax", -1), operator.methodcaller("softmax", 0)),
    "a partial function": (functools.partial(torch.softmax, dim=-1), functools.partial(torch.sigmoid)),
}


@pytest.mark.parametrize("name", PICKLED)
def test_pickles(name: str) -> None:
    share, other = PICKLED[name]
    model = _made(Calling, share)
    assert mk.convert(model).replaced
    loaded = pickle.loads(pickle.dumps(model))
    assert changed(loaded, vars(loaded)[WATCHED]) is None
    loaded.share = other
    assert "share" in str(changed(loaded, vars(loaded)[WATCHED]))


def test_another_version_of_python() -> None:
    """Whose code cannot be read: as if the function were another."""
    rebuild, (version, code) = Instructions(soft.__code__).__reduce__()
    assert rebuild(version, code).are_of(soft) and not rebuild(b"", code).are_of(soft)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of a kind that depends on PyTorch
def test_a_scripted_part_is_left_alone() -> None:
    model = _made(First, [torch.jit.script(nn.Softmax(-1))])
    assert "scripted" in str(mk.convert(model)) and type(model) is First


def test_a_part_that_was_not_there() -> None:
    register(Optional)
    plain = Optional()
    plain.register_module("share", None)
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    for each in (model, plain):
        each.share = nn.Sigmoid()
    agree(model, plain)


def test_the_module_around_a_function(fused_calls: list[int]) -> None:
    register(Around)
    model = Around()
    assert mk.convert(model).replaced
    model(X)
    assert fused_calls
    own = copy.deepcopy(model)
    mk.revert(own)
    model.t = 2.0
    agree(model, own)


@pytest.mark.parametrize(
    ("share", "edit"),
    [
        (Temperature(1.0), lambda: setattr(VARIABLE, "t", 2.0)),
        (Plain(), lambda: globals().update(VARIABLE=Sharp())),
        (annealed(1.0), lambda: globals().update(VARIABLE=annealed(2.0))),
        (functools.partial(soft), lambda: globals().update(VARIABLE=functools.partial(soft, t=2.0))),
        (Temperature(1.0).shares, lambda: setattr(VARIABLE.__self__, "t", 2.0)),
        (soft_of_itself, lambda: setattr(soft_of_itself, "t", 2.0)),
    ],
)
def test_variables(share: Any, edit: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "VARIABLE", share)
    model = _made(OfVariable, None)
    assert mk.convert(model).replaced
    own = copy.deepcopy(model)
    mk.revert(own)
    edit()
    agree(model, own)
    soft_of_itself.t = 1.0  # type: ignore[attr-defined]


def test_a_function_names_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _made(Calling, soft_of_global)
    assert mk.convert(model).replaced
    assert changed(model, vars(model)[WATCHED]) is None
    monkeypatch.setitem(globals(), "TEMPERATURE", 2.0)
    assert changed(model, vars(model)[WATCHED]) == "TEMPERATURE"


soft_of_itself.t = 1.0  # type: ignore[attr-defined]
