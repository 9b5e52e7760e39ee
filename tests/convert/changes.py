"""A level, and what may be done to its modules after calls of it were kept; each is seen at the next call."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import mtlkernels as mk


class Level(nn.Module):
    """Experts with batch norm and dropout, gates with a softmax; its own code is what every call is held against."""

    hidden = False  # a layer in each gate

    def __init__(self) -> None:
        super().__init__()
        self.settings = types.SimpleNamespace(function=F.relu)  # where a class may keep what it is made of
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.LeakyReLU(), nn.Dropout(0.2), nn.Linear(24, 12))
            for _ in range(3)
        )
        inner = [nn.ReLU(), nn.Linear(3, 3)] if self.hidden else []
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(20, 3), *copy.deepcopy(inner), nn.Softmax(dim=1)) for _ in range(2)
        )
        for norm in (module for module in self.modules() if isinstance(module, nn.BatchNorm1d)):
            norm.running_mean, norm.running_var = torch.rand(24), torch.rand(24) + 0.5

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([self.settings.function(expert(x)) for expert in self.experts], dim=1)
        return [(gate(x).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def register(kind: type[Level]) -> None:
    """Registers a level, or one with hidden layers in its gates."""
    mk.convert.register(
        kind,
        experts=lambda level: [[expert, level.settings.function] for expert in level.experts],
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(3, 2),
    )


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


def assert_noticed(model: Any, change: Callable[[Any], None]) -> None:
    """At the next call, and at all that follow, of which some are kept again where they can be."""
    x = torch.randn(6, 20)
    before = assert_as_own_code(model, x)
    change(model)
    after = [assert_as_own_code(model, x) for _ in range(10)]
    assert not all(torch.equal(a, b) for a, b in zip(after[0], before, strict=True)), "the change changed nothing"


def assert_copies_keep_nothing(model: Any, is_kept: Callable[[Any], Any]) -> None:
    """Until they have served, too."""
    x = torch.randn(6, 20)
    expected = serve(model, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not is_kept(other)
        for _ in range(4):
            assert all(torch.equal(a, b) for a, b in zip(serve(other, x), expected, strict=True))
        assert is_kept(other)


def first(level: Any) -> Any:
    return level.experts[0]


def _settings(level: Any) -> None:
    level.settings.function = F.silu


def _weight(level: Any) -> None:
    first(level)[0].weight = nn.Parameter(torch.randn(24, 20))


def _in_place(level: Any) -> None:
    first(level)[4].weight.detach().mul_(3)


def _data(level: Any) -> None:
    level.gates[1][0].weight.data = torch.randn(3, 20)


def _bias(level: Any) -> None:
    for expert in level.experts:
        expert[0].bias = None


def _slope(level: Any) -> None:
    for expert in level.experts:
        expert[2].negative_slope = 0.5


def _one_slope(level: Any) -> None:
    first(level)[2].negative_slope = 0.5


def _eps(level: Any) -> None:
    first(level)[1].eps = 3.0


def _statistics(level: Any) -> None:
    first(level)[1].running_var.mul_(4)


def _swapped(level: Any) -> None:
    modules = level.experts._modules
    modules["0"], modules["2"] = modules["2"], modules["0"]
    level.gates[0][0].weight.detach().mul_(2)


def replace_layer(level: Any) -> None:
    first(level)[0] = nn.Linear(20, 24)


def _activation(level: Any) -> None:
    first(level)[2] = nn.ReLU()


def _class(level: Any) -> None:
    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    first(level)[0].__class__ = Shifted


def _parametrization(level: Any) -> None:
    parametrize.register_parametrization(first(level)[0], "weight", nn.Tanh())


def _weight_norm(level: Any) -> None:
    layer = nn.utils.parametrizations.weight_norm(first(level)[0])
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)


def _hook_on_an_expert(level: Any) -> None:
    first(level).register_forward_hook(_twice)


def _twice(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    return 2 * y


def _hook_on_a_gate(level: Any) -> None:
    level.gates[0].register_forward_hook(_twice)


def _pre_hook(level: Any) -> None:
    first(level)[0].register_forward_pre_hook(_halved)


def _halved(module: nn.Module, args: Any) -> Any:
    return (args[0] / 2,)


def _gate(level: Any) -> None:
    level.gates[0] = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(dim=1))


def _no_softmax_dim(level: Any) -> None:
    level.gates[0][-1].dim = 0


def _sigmoid_gate(level: Any) -> None:
    level.gates[0][-1] = nn.Sigmoid()


def _no_softmax(level: Any) -> None:
    del level.gates[0][-1]


def _two_softmaxes(level: Any) -> None:
    level.gates[0].append(nn.Softmax(dim=1))


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
    replace_layer,
    _activation,
    _class,
    _parametrization,
    _weight_norm,
    _hook_on_an_expert,
    _hook_on_a_gate,
    _pre_hook,
    _gate,
    _no_softmax_dim,
    _sigmoid_gate,
    _no_softmax,
    _two_softmaxes,
]
