"""Calls of converted models that keep what was read of their modules: what the class itself gives, at every call."""

from __future__ import annotations

import copy
import gc
import pickle
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._convert.evaluation import CALLS
from mtlkernels.ops.level.kept import KeptCalls

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


class Level(nn.Module):
    """Experts with batch norm and dropout, gates with a softmax; its own code is what every call is held against."""

    def __init__(self) -> None:
        super().__init__()
        self.settings = types.SimpleNamespace(function=F.relu)  # where a class may keep what it is made of
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(24, 12))
            for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(20, 3), nn.Softmax(dim=1)) for _ in range(2))
        for norm in (module for module in self.modules() if isinstance(module, nn.BatchNorm1d)):
            norm.running_mean, norm.running_var = torch.rand(24), torch.rand(24) + 0.5

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([self.settings.function(expert(x)) for expert in self.experts], dim=1)
        return [(gate(x).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    mk.convert.register(
        Level,
        experts=lambda level: [[expert, level.settings.function] for expert in level.experts],
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(3, 2),
    )
    yield


def kept() -> Any:
    """A level that has served until its calls are kept."""
    model = Level().eval()
    assert mk.convert(model).replaced
    for _ in range(4):
        serve(model, torch.ones(3, 20))
    assert is_kept(model)
    return model


def is_kept(model: nn.Module) -> bool:
    calls = model.__dict__.get(CALLS)
    return calls is not None and calls.of(0)._kept is not None


def serve(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return list(model(*inputs))


def assert_as_own_code(model: Any, x: Tensor) -> list[Tensor]:
    found = serve(model, x)
    with torch.no_grad():
        exact = Level.forward(copy.deepcopy(model).double(), x.double())
    for y, true in zip(found, exact, strict=True):
        torch.testing.assert_close(y.double(), true, rtol=1e-4, atol=1e-5)
    return found


@pytest.mark.parametrize("isa", _extension.instruction_sets() or [""])
def test_as_the_class_does_at_any_number_of_rows(isa: str) -> None:
    with _extension.instruction_set(isa):
        model = kept()
        for rows in (0, 1, 2, 5, 8, 9, 16, 40, 100):
            assert_as_own_code(model, torch.randn(rows, 20))
            assert_as_own_code(model, torch.randn(20, rows).t())
            assert is_kept(model)


def _first(level: Any) -> Any:
    return level.experts[0]


def _settings(level: Any) -> None:
    level.settings.function = F.silu


def _weight(level: Any) -> None:
    _first(level)[0].weight = nn.Parameter(torch.randn(24, 20))


def _in_place(level: Any) -> None:
    _first(level)[4].weight.detach().mul_(3)


def _data(level: Any) -> None:
    level.gates[1][0].weight.data = torch.randn(3, 20)


def _bias(level: Any) -> None:
    for expert in level.experts:
        expert[0].bias = None


def _slope(level: Any) -> None:
    for expert in level.experts:
        expert[2].negative_slope = 0.5


def _one_slope(level: Any) -> None:
    _first(level)[2].negative_slope = 0.5


def _eps(level: Any) -> None:
    _first(level)[1].eps = 3.0


def _statistics(level: Any) -> None:
    _first(level)[1].running_var.mul_(4)


def _swapped(level: Any) -> None:
    modules = level.experts._modules
    modules["0"], modules["2"] = modules["2"], modules["0"]
    level.gates[0][0].weight.detach().mul_(2)


def _layer(level: Any) -> None:
    _first(level)[0] = nn.Linear(20, 24)


def _activation(level: Any) -> None:
    _first(level)[2] = nn.ReLU()


def _class(level: Any) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    _first(level)[0].__class__ = Shifted


def _parametrization(level: Any) -> None:
    parametrize.register_parametrization(_first(level)[0], "weight", nn.Tanh())


def _weight_norm(level: Any) -> None:
    layer = nn.utils.parametrizations.weight_norm(_first(level)[0])
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def _hook_on_an_expert(level: Any) -> None:
    _first(level).register_forward_hook(_twice)


def _twice(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def _hook_on_a_gate(level: Any) -> None:
    level.gates[0].register_forward_hook(_twice)


def _pre_hook(level: Any) -> None:
    _first(level)[0].register_forward_pre_hook(_halved)


def _halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def _gate(level: Any) -> None:
    level.gates[0] = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(dim=1))


def _no_softmax_dim(level: Any) -> None:
    level.gates[0][1].dim = 0


CHANGES = [
    _settings,
    _weight,
    _in_place,
    _data,
    _bias,
    _slope,
    _one_slope,
    _eps,
    _statistics,
    _swapped,
    _layer,
    _activation,
    _class,
    _parametrization,
    _weight_norm,
    _hook_on_an_expert,
    _hook_on_a_gate,
    _pre_hook,
    _gate,
    _no_softmax_dim,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    """At the next call, and at all that follow, of which some are kept again where they can be."""
    model, x = kept(), torch.randn(6, 20)
    before = assert_as_own_code(model, x)
    change(model)
    after = [assert_as_own_code(model, x) for _ in range(10)]
    assert not all(torch.equal(a, b) for a, b in zip(after[0], before, strict=True)), "the change changed nothing"


def test_a_module_that_experts_share() -> None:
    model, x = Level().eval(), torch.randn(6, 20)
    shared = nn.LeakyReLU()
    for expert in model.experts:
        expert[2] = shared  # type: ignore[operator]
    assert mk.convert(model).replaced
    for _ in range(5):
        assert_as_own_code(model, x)
    assert is_kept(model)
    _first(model)[2] = copy.deepcopy(shared)
    shared.negative_slope = 0.7
    for _ in range(5):
        assert_as_own_code(model, x)


def test_training_goes_on_and_off() -> None:
    model, x = kept(), torch.randn(6, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        for _ in range(4):
            assert_as_own_code(model, x)
        model.train()
        sum(y.sum() for y in model(torch.randn(64, 20))).backward()
        optimizer.step()
        model.eval()
    assert_as_own_code(model, x)


def test_dropout_alone_in_training() -> None:
    model, x = kept(), torch.randn(64, 20)
    _first(model)[3].train()
    assert not torch.equal(serve(model, x)[0], serve(model, x)[0])
    _first(model)[3].eval()
    assert_as_own_code(model, x)


def test_nothing_is_kept_alive_and_copies_keep_nothing() -> None:
    model, x = kept(), torch.randn(6, 20)
    expected = serve(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_kept(other)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(serve(other, x), expected, strict=True))
        assert is_kept(other)
    weight, module = weakref.ref(_first(model)[0].weight), weakref.ref(_first(model)[0])
    _layer(model)
    gc.collect()
    assert weight() is None and module() is None
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_nothing_is_left_of_it_when_reverted() -> None:
    model = kept()
    mk.revert(model)
    assert type(model) is Level and CALLS not in vars(model)


class Across(nn.Module):
    """Experts of bare matrices, gates in one tensor, and a stream for each gate or one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ParameterList(nn.Parameter(torch.randn(24, 20)) for _ in range(2))
        self.gates = nn.Parameter(torch.randn(2, 2, 20))

    def forward(self, streams: Any) -> list[Tensor]:
        own = [streams, streams] if isinstance(streams, Tensor) else streams
        hidden = torch.stack([F.relu(x @ w.t()) for x, w in zip(own, self.first, strict=True)], dim=1)
        shares = [F.linear(x, w).softmax(1) for x, w in zip(own, self.gates, strict=True)]
        return [(share.unsqueeze(2) * hidden).sum(1) for share in shares]


def test_streams_and_tensors_without_modules() -> None:
    mk.convert.register(
        Across,
        experts=lambda level: [[weight.t(), "relu"] for weight in level.first],
        gates=lambda level: [weight.t() for weight in level.gates],
        routing=lambda level: mk.Routing((0, 1), ((0, 1), (0, 1))),
    )
    model: Any = Across().eval()
    assert mk.convert(model).replaced
    calls = []
    serve_kept = KeptCalls.serve

    def served(self: KeptCalls, roots: Any, inputs: Any) -> Any:
        outputs = serve_kept(self, roots, inputs)
        calls.append(outputs is not None)
        return outputs

    with mock.patch.object(KeptCalls, "serve", served):
        for number in range(40):
            if number == 20:
                model.gates.data = torch.randn(2, 2, 20)
            if number == 30:
                model.first[1] = nn.Parameter(torch.randn(24, 20))
            one, two = torch.randn(3, 20), torch.randn(3, 20)
            streams: Any = [[one, two], [one, one], [one, two]][number % 3]
            with torch.no_grad():
                found, expected = model(streams), Across.forward(model, streams)
            for y, true in zip(found, expected, strict=True):
                torch.testing.assert_close(y, true)
    assert any(calls)
