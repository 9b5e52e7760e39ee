"""What a converted module watches: what its code reads, and nothing else, in copies and pickles too."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.reading import codes, paths_after
from mtlkernels._convert.watched import changed
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree


def _converted(kind: type) -> Any:
    register(kind)
    model = kind()
    assert mk.convert(model).replaced
    return model


def _changed(model: Any) -> str | None:
    return changed(model, vars(model)[WATCHED])


def _order(model: Any) -> int:
    return int(model.order)


def twice(z: Tensor) -> Tensor:
    return 2 * z


def same(z: Tensor) -> Tensor:
    return z


class Locked(Level):
    """What is no number is made anew where it is loaded."""

    def prepare(self) -> None:
        self.lock = threading.Lock()

    def weigh(self, z: Tensor) -> Tensor:
        with self.lock:
            return z.softmax(1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.lock = threading.Lock()


class Logging(Level):
    def prepare(self) -> None:
        self.logger = logging.getLogger("a user's model")

    def weigh(self, z: Tensor) -> Tensor:
        if z.shape[1] != 4:
            self.logger.warning("another number of experts")
        return z.softmax(1)


class Configured(Level):
    def prepare(self) -> None:
        self.args = types.SimpleNamespace(num_tasks=3, epoch=0, rate=0.1, inner={"uniform": False, "seen": 0})
        self.device, self.fill, self.step = torch.device("cpu"), float("nan"), 0

    def weigh(self, z: Tensor) -> Tensor:
        if self.fill == 0 or self.args.inner["uniform"]:
            return torch.zeros_like(z, device=self.device)
        return z.softmax(1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x.to(self.device))[: self.args.num_tasks]


class Words(dict[str, int]):
    def get(self, word: str) -> int:  # type: ignore[override]
        return super().get(word, 0)


class OfWords(Level):
    def prepare(self) -> None:
        self.numbers = Words(one=1)

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if self.numbers["one"] == 1 else z.sigmoid()


class ByAFunction(Level):
    def prepare(self) -> None:
        self.order, self.change = 1, torch.clone

    def weigh(self, z: Tensor) -> Tensor:
        return self.change(z).softmax(1) if _order(self) == 1 else z.sigmoid()


class ByAFunctionOfTheUser(ByAFunction):
    def prepare(self) -> None:
        self.order, self.change = 1, same


class ByAProperty(Level):
    def prepare(self) -> None:
        self.epoch = 0

    @property
    def warm(self) -> bool:
        return self.epoch < 5

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if self.warm else z.sigmoid()


class NotThereYet(Level):
    def weigh(self, z: Tensor) -> Tensor:
        mask = getattr(self, "mask", None)
        if hasattr(self, "bias"):
            z = z + self.bias
        return (z if mask is None else z.masked_fill(mask, -1e9)).softmax(1)


def _set(*path: Any) -> Callable[[Any], None]:
    """Sets what the last but one of these names says to the last one."""

    def change(model: Any) -> None:
        *inner, name, value = path
        for each in inner:
            model = model[each] if isinstance(model, dict) else getattr(model, each)
        if isinstance(model, dict):
            model[name] = value
        else:
            setattr(model, name, value)

    return change


# What is done to a module, and whether its own code has to run then.
CHANGES: dict[str, tuple[type, Callable[[Any], object], bool]] = {
    "a number that is read": (Configured, _set("args", "num_tasks", 2), True),
    "a flag in a dictionary in it": (Configured, _set("args", "inner", "uniform", True), True),
    "a number that replaces NaN": (Configured, _set("fill", 0.0), True),
    "a namespace that says the same": (
        Configured,
        lambda model: setattr(model, "args", copy.deepcopy(model.args)),
        False,
    ),
    "a number beside it": (Configured, _set("args", "epoch", 1), False),
    "a number beside the flag": (Configured, _set("args", "inner", "seen", 1), False),
    "a number of the trainer's": (Configured, _set("step", 1), False),
    "a number that nobody has named": (Configured, _set("global_step", 1), False),
    "the same device": (Configured, lambda model: setattr(model, "device", torch.device("cpu")), False),
    "its own forward": (Configured, lambda model: setattr(model, "forward", model.forward), False),
    "the level of a logger": (Logging, lambda model: model.logger.setLevel("INFO"), False),
    "an entry of a dictionary of one's own": (OfWords, lambda model: model.numbers.update(one=2), True),
    "what a function reads of it": (ByAFunction, _set("order", 2), True),
    "a function": (ByAFunction, _set("change", twice), True),
    "what was not there": (NotThereYet, _set("mask", torch.tensor([True, False, False, False])), True),
    "a number that was not there": (NotThereYet, _set("bias", 1.0), True),
    "what a property reads": (ByAProperty, _set("epoch", 7), True),
}


@pytest.mark.parametrize("copied", [None, copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_read_counts(name: str, copied: Any) -> None:
    kind, change, counts = CHANGES[name]
    model = _converted(kind)
    given = model if copied is None else copied(model)
    assert _changed(given) is None
    change(given)
    assert (_changed(given) is not None) == counts
    model(X)
    given(X)


def test_a_lock_is_no_reason() -> None:
    model = _converted(Locked)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _changed(other) is None
        torch.testing.assert_close(other(X), model(X))


@pytest.mark.parametrize("kind", [Logging, Configured, ByAFunction, ByAFunctionOfTheUser])
def test_compiles_in_one_graph(kind: type, fresh_compiler: None, fused_calls: list[int]) -> None:
    model = _converted(kind)
    right = model(X)
    fused_calls.clear()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), right)
    assert fused_calls == [4]


def test_nothing_is_kept_alive() -> None:
    class Caching(Level):
        def prepare(self) -> None:
            self.cache: Tensor | None = torch.zeros(100, 100)

        def weigh(self, z: Tensor) -> Tensor:
            return z.softmax(1) if self.cache is not None else z.softmax(-1)

    model = _converted(Caching)
    cache = weakref.ref(model.cache)
    model.cache = None
    gc.collect()
    assert cache() is None and _changed(model) == "cache"


class SharingSettings(nn.Module):
    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.settings = settings
        self.linear = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y.relu() if self.settings["model"]["activation"] == "relu" else y.tanh()


def test_settings_that_parts_share_are_read_by_their_names() -> None:
    """Each part watches the entry that it reads, not the thousand others: each call compares them."""
    settings = {"model": {"activation": "relu"}, "features": {f"f{i}": {"size": 1, "kind": "int"} for i in range(50)}}

    class Sharing(Level):
        def prepare(self) -> None:
            self.experts = nn.ModuleList(SharingSettings(settings) for _ in range(4))

    mk.convert.register(
        Sharing,
        experts=lambda model: [[expert.linear, "relu"] for expert in model.experts],
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
    )
    model = Sharing()
    assert mk.convert(model).replaced
    entries = [entry for path, own in vars(model)[WATCHED] if path for entry in own]
    assert entries == [(("settings", "model", "activation"), "relu")] * 4
    settings["model"]["activation"] = "tanh"
    assert _changed(model) == "settings.model.activation"


class Base:
    def weigh(self, x: Any) -> Any:
        return x


class Reads(Base):
    """Methods of which each reads something else of itself, in another way."""

    def _function(self, x: Any) -> Any:
        return x / self.config.temperature + self.scales["ctr"] * self.rate  # type: ignore[attr-defined]

    def _comprehension(self, x: Any) -> Any:
        return [gate(x) * self.factor for gate in self.gates]  # type: ignore[attr-defined]

    def _loop(self, x: Any) -> Any:
        y = x
        for part in (x,):
            y = self.first(part, self.mode)  # type: ignore[attr-defined]
        return y if self.flag else [z(self.inner.number) for z in x]  # type: ignore[attr-defined]

    def _sequence(self, x: Any) -> Any:
        return self.weights[0] * x + x[self.place]  # type: ignore[attr-defined]

    def _lambda(self, x: Any) -> Any:
        self.last = x
        return lambda z: z * self.weight  # type: ignore[attr-defined]

    def _generator(self, x: Any) -> Any:
        return sum(x * self.number for _ in range(3))  # type: ignore[attr-defined]

    def _nested(self, x: Any) -> Any:
        def times(y: Any) -> Any:
            return y * self.number  # type: ignore[attr-defined]

        return times(x)

    def _super(self, x: Any) -> Any:
        return super().weigh(self.rate * x)  # type: ignore[attr-defined]

    def _as_a_whole(self, x: Any) -> Any:
        return x(self)

    def _by_its_name(self, x: Any) -> Any:
        return getattr(self, "flag") * x  # type: ignore[attr-defined]  # noqa: B009


READS = {
    "_function": {("config", "temperature"), ("scales", "ctr"), ("rate",)},
    "_comprehension": {("factor",), ("gates",)},
    "_loop": {("first",), ("mode",), ("flag",), ("inner", "number")},
    "_sequence": {("weights", 0), ("place",)},
    "_lambda": {("weight",)},
    "_generator": {("number",)},
    "_nested": {("number",)},
    "_super": {("rate",)},
    "_as_a_whole": set(),
    "_by_its_name": set(),
}


@pytest.mark.parametrize("name", READS)
def test_what_a_code_reads(name: str) -> None:
    """In the instructions of this version of Python."""
    loaded = {path for code in codes(vars(Reads)[name].__code__) for path in paths_after(code)}
    found = {path[1:] for path in loaded if path[0] == "self"}
    escapes = () in found
    found -= {()}
    assert found >= READS[name] and all(path[:1] in {(p[0],) for p in READS[name]} for path in found)
    assert escapes or name not in ("_as_a_whole", "_by_its_name")
    assert not escapes or name in ("_as_a_whole", "_by_its_name")


class MayBe(Level):
    """It looks for what is not there, or None so far."""

    def prepare(self) -> None:
        self.register_buffer("mask", None)
        self.register_parameter("scale", None)

    def weigh(self, z: Tensor) -> Tensor:
        for name in ("mask", "scale"):
            if getattr(self, name) is not None:
                z = z * getattr(self, name)
        if self.mask is not None or self.scale is not None or hasattr(self, "extra"):
            z = z * 3
        return z.softmax(1)


COMES = {
    "a buffer": lambda model: setattr(model, "mask", torch.ones(1)),
    "a parameter": lambda model: setattr(model, "scale", nn.Parameter(torch.ones(1))),
    "another parameter": lambda model: setattr(model, "extra", nn.Parameter(torch.ones(1))),
    "another buffer": lambda model: model.register_buffer("extra", torch.ones(1)),
    "another part": lambda model: setattr(model, "extra", nn.Identity()),
}


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("name", COMES)
def test_what_comes_later(name: str, warm: bool) -> None:
    register(MayBe)
    model, own = MayBe().eval(), MayBe().eval()
    own.load_state_dict(model.state_dict())
    assert mk.convert(model).replaced
    for _ in range(5 * warm):
        agree(model, own)
    assert _changed(model) is None
    for each in (model, own):
        COMES[name](each)
    assert _changed(model) is not None
    for _ in range(3):
        agree(model, own)
