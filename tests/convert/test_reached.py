"""Parts that a forward pass reaches in other ways than by their names: what they write outside is found, too."""

from __future__ import annotations

import functools
import logging
import operator
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn

from mtlkernels._convert import reached, registry
from tests.convert import test_beside_forward as beside
from tests.convert.test_beside_forward import Finding, Hidden, Runner, WithAMetric, convert, of_part
from tests.convert.weighing import X


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})


class Carrier:
    """An object that holds a part, and calls it."""

    def __init__(self, held: Any) -> None:
        self.held = held

    def run(self, z: Tensor) -> Any:
        return self.held(z)


class Slotted:
    """The same without a dictionary."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held


class Caller:
    """Whose method is named by the class below it."""

    def run(self, model: Any, z: Tensor) -> Any:
        return model.part(z)


class Heir(Caller):
    """Which has nothing of its own."""


class Counting(Hidden):
    """Whose method calls another one."""

    def direct(self, x: Tensor) -> Tensor:
        return self.counted(x)


class Sized(nn.Module):
    """Whose method Python calls, which alone names a part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Hidden()

    def __len__(self) -> int:
        self.inner(X)
        return 1


class Chain(nn.Sequential):
    """The user's."""


def of_both(function: Any, model: Any, z: Tensor) -> Any:
    return function(model, z)


def calling(part: Any) -> Callable[[Tensor], Any]:
    return lambda z: part(z)


def wrapped(function: Any) -> Any:
    """By a library's wrapper, which does not say what it wraps."""

    def inner(*args: Any) -> Any:
        return function(*args)

    inner.__module__ = "torch"
    return inner


def marked(part: Any) -> Any:
    def function() -> None: ...

    function.held = part  # type: ignore[attr-defined]
    return function


ROUTES = {"a": of_part}
RUNNER = Runner()
LOGGER = logging.getLogger(__name__)
# What a model keeps as ``kept`` of its part, and how its forward pass uses that.
KEPT: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Tensor], Any]]] = {
    "in a list": (lambda part: [part], lambda self, z: self.kept[0](z)),
    "in a tuple": (lambda part: (part,), lambda self, z: self.kept[0](z)),
    "in a dict": (lambda part: {"a": part}, lambda self, z: self.kept["a"](z)),
    "in a dict of lists": (lambda part: {"a": [part]}, lambda self, z: self.kept["a"][0](z)),
    "in a set": (lambda part: {part}, lambda self, z: next(iter(self.kept))(z)),
    "in an iterator": (lambda part: iter([part] * 1000), lambda self, z: next(self.kept)(z)),
    "in an object": (Carrier, lambda self, z: self.kept.run(z)),
    "in a slot": (Slotted, lambda self, z: self.kept.held(z)),
    "in a namespace": (lambda part: types.SimpleNamespace(inner=part), lambda self, z: self.kept.inner(z)),
    "in a partial": (functools.partial, lambda self, z: self.kept(z)),
    "in a function": (calling, lambda self, z: self.kept(z)),
    "in a sequence": (lambda part: Chain(Hidden()), lambda self, z: self.kept(z)),
    "a method in a list": (lambda part: [part.direct], lambda self, z: self.kept[0](z)),
    "a method in a dict": (lambda part: {"a": part.direct}, lambda self, z: self.kept["a"](z)),
    "a forward pass": (lambda part: part.forward, lambda self, z: self.kept(z)),
    "an object in a list": (lambda part: [Runner()], lambda self, z: self.kept[0].run(self, z)),
    "an inherited method": (lambda part: Heir(), lambda self, z: self.kept.run(self, z)),
    "a function in a list": (lambda part: [of_part], lambda self, z: self.kept[0](self, z)),
    "a function in a partial": (lambda part: functools.partial(of_both, of_part), lambda self, z: self.kept(self, z)),
    "a named one in a partial": (
        lambda part: functools.partial(of_both, function=of_part),
        lambda self, z: self.kept(model=self, z=z),
    ),
    "in a function's attribute": (marked, lambda self, z: self.kept.held(z)),
    "a library's wrapper": (lambda part: wrapped(of_part), lambda self, z: self.kept(self, z)),
    "a class": (lambda part: None, lambda self, z: Runner().run(self, z)),
    "a global object": (lambda part: None, lambda self, z: RUNNER.run(self, z)),
    "a global dict": (lambda part: None, lambda self, z: ROUTES["a"](self, z)),
    "__getattr__": (lambda part: None, lambda self, z: self.__getattr__(f"pa{'RT'.lower()}")(z)),
    "by Python": (lambda part: Sized(), lambda self, z: z * len(self.kept)),
}


class Keeping(Finding):
    """Which keeps what it is told to keep, beside its parts where that is none."""

    def prepare(self) -> None:
        self.part: Any = Counting()


@pytest.mark.parametrize("case", KEPT)
def test_a_part_that_is_kept_elsewhere(case: str) -> None:
    keep, use = KEPT[case]

    class Kind(Keeping):
        def prepare(self) -> None:
            super().prepare()
            self.kept = keep(self.part)

        def weigh(self, z: Tensor) -> Tensor:
            return super().weigh(use(self, z))

    assert_found(Kind)


def assert_found(kind: Any) -> None:
    """That a kind is left alone, with the true reason, and that no trial's writes stay."""
    looks = beside.LOOKS
    _, report = convert(kind)
    assert [line.detail for line in report.left_alone] == ["its forward changes LOOKS, which is not its own"]
    assert looks == beside.LOOKS


class BesideItsParts(Keeping):
    def prepare(self) -> None:
        object.__setattr__(self, "hidden", Counting())

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.hidden.direct(z))


class BySomeNameBeside(BesideItsParts):
    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(getattr(self.hidden, "dir" + "ECT".lower())(z))


class ByAMadeName(Finding):
    def prepare(self) -> None:
        for i in range(2):
            self.add_module(f"part {i}", Hidden())

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(getattr(self, f"part {1}")(z))


class ByANestedClass(Finding):
    class Inner:
        @staticmethod
        def run(model: Any, z: Tensor) -> Any:
            return model.part(z)

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.Inner.run(self, z))


class ByAWeakReference(Finding):
    def prepare(self) -> None:
        super().prepare()
        self.reference = weakref.ref(Runner)

    def weigh(self, z: Tensor) -> Tensor:
        runner: Any = self.reference()
        return super().weigh(runner().run(self, z))


class ByAPropertyWithoutCode(Finding):
    """By a name that stands in no code of the model's."""

    found = property(operator.attrgetter("part"))

    def prepare(self) -> None:
        self.part = Hidden()

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.found(z))


FOUND = [BesideItsParts, BySomeNameBeside, ByAMadeName, ByANestedClass, ByAWeakReference, ByAPropertyWithoutCode]


@pytest.mark.parametrize("kind", FOUND)
def test_a_part_that_is_found_in_another_way(kind: Any) -> None:
    assert_found(kind)


class OfALibrary(Counting):
    """A part whose code is an installed library's."""

    __module__ = "library"

    def forward(self, x: Tensor) -> Tensor:
        return self.direct(x)

    forward.__module__ = "library"


class BesideOfALibrary(Finding):
    def prepare(self) -> None:
        object.__setattr__(self, "hidden", OfALibrary())

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.hidden(z))


def test_a_librarys_part_that_is_kept_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code is read, as that of the model's other parts is."""
    library = types.ModuleType("library")
    library.__file__ = "/site-packages/library.py"
    monkeypatch.setitem(sys.modules, "library", library)
    assert_found(BesideOfALibrary)


PATHS_TAKEN = 0


class ByAClassesTable(Finding):
    def path(self, z: Tensor) -> Tensor:
        global PATHS_TAKEN
        PATHS_TAKEN += 1
        return z

    PATHS: ClassVar[dict[str, Any]] = {"a": path}

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.PATHS["a"](self, z))


class ByAnObjectsMethod(Finding):
    class Inner:
        def run(self, z: Tensor) -> Tensor:
            global PATHS_TAKEN
            PATHS_TAKEN += 1
            return z

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(self.Inner().run(z))


class Paths(nn.Module):
    """A part that no forward pass reaches, though it calls one by its class."""

    @staticmethod
    def taken(z: Tensor) -> Tensor:
        global PATHS_TAKEN
        PATHS_TAKEN += 1
        return z


class ByAPartsClass(Finding):
    def prepare(self) -> None:
        self.paths = Paths()

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(Paths.taken(z))


@pytest.mark.parametrize("kind", [ByAClassesTable, ByAnObjectsMethod, ByAPartsClass])
def test_what_a_function_that_is_found_so_writes_itself(kind: Any) -> None:
    _, report = convert(kind)
    assert [line.detail for line in report.left_alone] == ["its forward changes PATHS_TAKEN, which is not its own"]
    assert not PATHS_TAKEN


def test_of_too_many_objects_all_is_taken_to_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reached, "_MOST_OBJECTS", 3)
    model = WithAMetric()
    assert len(reached.Reached(model, "forward").parts) == len(list(model.modules()))


def test_a_hook_may_call_any_part() -> None:
    model = WithAMetric()
    assert model.metric not in reached.Reached(model, "forward").parts
    model.experts.register_forward_hook(lambda *args: None)
    assert model.metric in reached.Reached(model, "forward").parts


class Mixin:
    """No module, so that it has Python's own descriptors."""


class Mixed(Mixin, WithAMetric):
    """What hides nothing."""


class Nesting(WithAMetric):
    """Whose nested class hides nothing either."""

    class Config:
        power = 1.0

    def weigh(self, z: Tensor) -> Tensor:
        return super().weigh(z * self.Config.power)


class Listing(WithAMetric):
    """Whose forward pass has no use for a list."""

    def prepare(self) -> None:
        super().prepare()
        self.shown = [self.metric]


class Logging(WithAMetric):
    """Whose logger leads to whatever it writes to."""

    def weigh(self, z: Tensor) -> Tensor:
        LOGGER.debug("in a forward pass")
        return super().weigh(z)


@pytest.mark.parametrize("kind", [Mixed, Nesting, Listing])
def test_what_no_forward_reaches_is_left_out(kind: Any) -> None:
    _, report = convert(kind)
    assert report.replaced, str(report)


def test_a_logger_leads_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    model, handler = Logging(), logging.Handler()
    vars(handler)["metric"] = model.metric
    monkeypatch.setattr(LOGGER, "handlers", [handler])
    assert model.metric not in reached.Reached(model, "forward").parts
