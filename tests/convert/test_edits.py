"""What people write into a level of their own, or do to it after its conversion: seen, or left alone, never lost."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import paying


class Home(nn.Module):
    """A level with places where classes below write something of their own."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(width, 6), nn.ReLU()) for _ in range(4))
        self.gates = nn.ModuleList(nn.Linear(width, 4) for _ in range(3))

    def read(self, x: Tensor) -> Tensor:
        return x

    def shares(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.read(x)
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        return [(self.shares(gate(x)).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def register(kind: type, **options: Any) -> None:
    mk.convert.register(
        kind,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(len(model.experts), len(model.gates)),
        **options,
    )


class Plain(Home):
    """Nothing of its own."""


register(Plain)


class Prior(Home):
    def __init__(self) -> None:
        super().__init__()
        self.prior = torch.log(torch.tensor([0.7, 0.1, 0.1, 0.1]))

    def shares(self, logits: Tensor) -> Tensor:
        return logits + self.prior


class Centred(Home):
    def __init__(self) -> None:
        super().__init__()
        self.stats = {"mean": torch.full((8,), 3.0)}

    def read(self, x: Tensor) -> Tensor:
        return x - self.stats["mean"]


class Masked(Home):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 1.0, 0.0, 1.0]))

    def shares(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(self.mask == 0, float("-inf"))


class Positive(Home):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.ones(8))

    def read(self, x: Tensor) -> Tensor:
        return x + (self.bias - self.bias.abs())


class WholeTemperature(Home):
    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1

    def shares(self, logits: Tensor) -> Tensor:
        return logits / self.temperature


class ClassTemperature(Home):
    temperature = 1.0

    def shares(self, logits: Tensor) -> Tensor:
        return logits / self.temperature


class Configured(Home):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def shares(self, logits: Tensor) -> Tensor:
        config = vars(self.config) if isinstance(self.config, types.SimpleNamespace) else self.config
        return logits / config["temperature"]


class Cleaning(Home):
    def read(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x)


class Padding(Home):
    def read(self, x: Tensor) -> Tensor:
        return x + (x == 0).all(1, keepdim=True) * 1.0


CALLS = 0
USED = torch.zeros(8)
LOG: dict[str, list[int]] = {"rows": []}


class CountsCalls(Home):
    def read(self, x: Tensor) -> Tensor:
        global CALLS
        CALLS += 1
        return x


class CountsUse(Home):
    def read(self, x: Tensor) -> Tensor:
        USED.add_(1)
        return x


class Logs(Home):
    def read(self, x: Tensor) -> Tensor:
        LOG["rows"].append(len(x))
        return x


WRITTEN: dict[str, Callable[[], Home]] = {
    "a tensor that is added": Prior,
    "a tensor in a dict": Centred,
    "a mask": Masked,
    "what is zero for positive numbers": Positive,
    "a whole temperature": WholeTemperature,
    "a class's temperature": ClassTemperature,
    "a temperature in a dict": lambda: Configured({"temperature": 1.0}),
    "a temperature in a namespace": lambda: Configured(types.SimpleNamespace(temperature=1.0)),
    "numbers for what is none": Cleaning,
    "rows of zeros": Padding,
    "a global number": CountsCalls,
    "a global tensor": CountsUse,
    "a list in a global dict": Logs,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_into_a_level_is_seen(name: str) -> None:
    model = WRITTEN[name]()
    register(type(model))
    (line,) = mk.convert(model).lines
    assert line.action == "left alone", line
    assert (CALLS, float(USED.sum()), LOG["rows"]) == (0, 0, [])


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x).relu()).relu()
        return found


class Negative(Expert):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


class OfExperts(Home):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Expert() for _ in range(4))


mk.convert.register(
    OfExperts,
    experts=lambda model: [[e.first, "relu", e.second, "relu"] for e in model.experts],
    gates=lambda model: model.gates,
    routing=lambda model: mk.Routing.mmoe(4, 3),
)


def exchange(model: Any, kind: Any) -> None:
    torch.manual_seed(1)
    model.experts[0] = kind()


def become(model: Any) -> None:
    model.experts[0].__class__ = Negative


@pytest.mark.parametrize(
    "edit",
    [
        lambda model: exchange(model, Negative),
        lambda model: exchange(model, lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU())),
        become,
    ],
    ids=["another class of expert", "one that the description does not fit", "another class of the same expert"],
)
@pytest.mark.parametrize("times", [1, 8])
def test_exchanged_experts_run_by_themselves(edit: Callable[[Any], None], times: int) -> None:
    """Also where calls have been kept."""
    model, x = OfExperts().eval(), torch.randn(40, 8)
    other = copy.deepcopy(model)
    assert mk.convert(model).replaced
    with torch.no_grad():
        for _ in range(times):
            model(x)
        for each in (model, other):
            edit(each)
        for _ in range(times):
            torch.testing.assert_close(model(x), other(x))


def test_a_method_that_was_exchanged_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Plain().eval(), torch.randn(40, 8)
    mk.convert(model)
    before = model(x)
    monkeypatch.setattr(Plain, "forward", lambda self, x: [100 * y for y in Home.forward(self, x)])
    torch.testing.assert_close(model(x), [100 * y for y in before])


def test_other_models_of_a_converted_class() -> None:
    """As clones and EMA copies are made by ``type(model)(...)``: not converted, but like any other model."""
    model, x = Plain(), torch.randn(40, 8)
    mk.convert(model)
    other = type(model)()
    expected = Home.forward(other, x)
    torch.testing.assert_close(other(x), expected)
    assert mk.convert(other).replaced
    torch.testing.assert_close(other(x), expected)
    another = type(model)()
    assert mk.revert(another).reverted and type(another) is Plain


class WithArguments(Home):
    def __new__(cls, width: int) -> Any:
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.width = width

    def __getnewargs__(self) -> tuple[int]:
        return (self.width,)


def test_models_that_are_made_with_arguments() -> None:
    register(WithArguments)
    model, x = WithArguments(8), torch.randn(40, 8)
    mk.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(x), model(x))


class Final(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("a final class has no subclasses")
        return super().__new__(mcs, name, bases, namespace)


class WithoutSubclasses(Home, metaclass=Final):
    pass


def test_a_class_that_cannot_be_changed_is_left_alone_and_the_others_are_not() -> None:
    register(WithoutSubclasses)
    model = nn.ModuleList([Plain(), WithoutSubclasses(), Plain()])
    report = mk.convert(model)
    assert [line.path for line in report.replaced] == ["0", "2"]
    (line,) = (line for line in report.lines if line.path == "1")
    assert line.action == "left alone" and "final" in line.detail
    assert not [name for name in vars(model[1]) if "mtlkernels" in name]


def test_sparse_inputs_run_the_models_own_code() -> None:
    model, x = Plain(), torch.randn(40, 8)
    other = copy.deepcopy(model)
    mk.convert(model)
    sparse = (x * (x > 1)).to_sparse()
    torch.testing.assert_close(model(sparse), other(sparse))


def test_whatever_is_set_around_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        assert mk.convert(Plain()).replaced
    model = Plain()
    with torch.device("meta"):  # set_default_device would leave something that looks on, whatever it is set back to
        assert mk.convert(model).replaced
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
    assert mk.convert(Plain()).replaced


def test_threads_that_convert_at_a_time() -> None:
    for _ in range(10):
        threads = [threading.Thread(target=mk.convert, args=(Plain(),)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not paying.in_trial()


class Loader:
    """Something long that a model keeps, which a trial has no reason to go through."""

    def __init__(self) -> None:
        self.read = itertools.count()

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Any:
        next(self.read)
        return iter(range(100))


@pytest.mark.parametrize("value", [[1.0, float("nan")], [1, 2], [True, False], ["a", "b"], 3.0])
def test_arrays_that_a_model_keeps(value: Any) -> None:
    model: Any = Plain()
    model.array = numpy.array(value)
    assert mk.convert(model).replaced


GLOBALS = torch.eye(3).to_sparse(), torch.tensor([True, False]), torch.tensor([1.0, float("nan")])


class NamesTensors(Home):
    def read(self, x: Tensor) -> Tensor:
        return x if len(GLOBALS) == 3 else -x


class NamesOthers(Home):
    def read(self, x: Tensor) -> Tensor:
        return x if MASK.any() and SPARSE.shape else -x


SPARSE, MASK, _ = GLOBALS


@pytest.mark.parametrize("kind", [NamesTensors, NamesOthers])
def test_global_tensors_that_stay_as_they_are(kind: type[Home]) -> None:
    register(kind)
    assert mk.convert(kind()).replaced


def test_what_a_model_keeps_is_not_iterated() -> None:
    model: Any = Plain()
    model.loader = Loader()
    assert mk.convert(model).replaced
    assert next(model.loader.read) == 0


SEEN = 0


def note(*_: Any) -> None:
    global SEEN
    SEEN += 1


def test_hooks_may_count() -> None:
    """They are called as before; what a trial counts is taken back."""
    model, x = Plain(), torch.randn(40, 8)
    model.register_forward_hook(note)
    assert mk.convert(model).replaced
    assert SEEN == 0
    model(x)
    assert SEEN == 1
