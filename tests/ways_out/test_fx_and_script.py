"""``torch.fx.symbolic_trace`` and ``torch.jit.script``: as the original, or an error that says what to do instead."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert import models
from tests.ways_out.kinds import (
    CONVERTED,
    MIXTURES,
    ROUTES,
    SNRS,
    TRUNKS,
    Kind,
    Listed,
    assert_same,
    changed,
    names_of,
    rows,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    # Of torch.nn's own annotations.
    pytest.mark.filterwarnings("ignore:The TorchScript type system doesn't support:UserWarning"),
]


class Scripts(nn.Module):
    """An MMoE in the part of Python that torch.jit.script compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.1)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(7, 3) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden: list[Tensor] = []
        for expert in self.experts:
            hidden.append(expert(x))
        mixed: list[Tensor] = []
        for gate in self.gates:
            mixed.append((F.softmax(gate(x), 1).unsqueeze(2) * torch.stack(hidden, 1)).sum(1))
        return mixed


class Model(nn.Module):
    """It, within a model with towers."""

    def __init__(self) -> None:
        super().__init__()
        self.level = Scripts()
        self.towers = nn.ModuleList(nn.Linear(5, 1) for _ in range(2))

    # A graph of torch.fx whose arguments have names of types for annotations cannot be scripted.
    def forward(self, x):
        mixed = self.level(x)
        return torch.cat([self.towers[0](mixed[0]), self.towers[1](mixed[1])], 1)


@pytest.fixture
def registered() -> None:
    mk.convert.register(
        Scripts,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
    )


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [Model, Scripts])
def test_scripts_as_the_original_does(kind: Any, training: bool) -> None:
    model = kind().train(training)
    original = torch.jit.script(model)
    assert mk.convert(model).replaced
    module = torch.jit.script(model)
    (x,) = rows(40)
    for other in (module, original):
        torch.manual_seed(0)
        found = other(x)
        torch.manual_seed(0)
        assert_same(found, module(x))
    assert [n.kind() for n in module.inlined_graph.nodes()] == [n.kind() for n in original.inlined_graph.nodes()]
    level = model if kind is Scripts else model.level
    assert type(level).__name__ == "FusedScripts"  # scripting leaves it converted
    assert inspect.signature(level.forward) == inspect.signature(Scripts().forward)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*TRUNKS, *SNRS])
def test_trunks_say_what_to_do_instead_of_scripting(name: str, training: bool) -> None:
    model = {**TRUNKS, **SNRS}[name].model(training)
    for module in (model, nn.Sequential(model)):
        with pytest.raises(RuntimeError, match=r"must be traced, not scripted: call torch.jit.trace"):
            torch.jit.script(module)


# torch.fx.symbolic_trace --------------------------------------------------------------------------------------------

# The others' own code does not trace, converted or not: in front of the experts it looks at what it is given.
FX: dict[str, Kind] = {name: CONVERTED[name] for name in ("TorchEasyRec MMoE", "FuxiCTR CGC_Layer", "LibMTL CGC")}
FX["rechub CGC"] = Kind(lambda: Listed(models.rechub_ple().cgc_layers[0], 4), lambda n, s: (torch.randn(n, 19),), True)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", [*FX, *TRUNKS, *MIXTURES])
def test_symbolic_trace(name: str, training: bool) -> None:
    kind = {**FX, **TRUNKS, **MIXTURES}[name]
    model, twin = kind.model(training), kind.model(training)
    graph = torch.fx.symbolic_trace(model)
    assert not [target for target in names_of(graph.graph) if "mtlkernels" in target]
    for count in (2, 17):
        x = kind.inputs(count, count)
        torch.manual_seed(0)
        found = graph(*x)
        torch.manual_seed(0)
        assert_same(found, twin(*x))
    state = changed(twin)
    graph.load_state_dict({key: state[key] for key in graph.state_dict()}, strict=False)
    twin.load_state_dict(state)
    torch.manual_seed(0)
    found = graph.train(training)(*x)
    torch.manual_seed(0)
    assert_same(found, twin(*x))


@pytest.mark.parametrize("name", FX)
def test_gives_the_original_modules(name: str) -> None:
    found, original = (torch.fx.symbolic_trace(m).graph for m in (FX[name].model(), FX[name].original()))
    assert [(n.op, str(n.target)) for n in found.nodes] == [(n.op, str(n.target)) for n in original.nodes]


@pytest.mark.usefixtures("registered")
def test_traced_and_then_scripted() -> None:
    """How TorchEasyRec exports."""
    model = Model().eval()
    mk.convert(model)
    module = torch.jit.script(torch.fx.symbolic_trace(model))
    (x,) = rows(9)
    assert_same(module(x), model(x))


@pytest.mark.parametrize("name", [*SNRS, *ROUTES])
def test_routes_say_what_to_do_instead(name: str) -> None:
    with pytest.raises(TypeError, match=r"got a proxy of torch.fx.symbolic_trace.*use torch.export.export or"):
        torch.fx.symbolic_trace({**SNRS, **ROUTES}[name].model())


def test_pcgrad_of_proxies() -> None:
    class Update(nn.Module):
        def forward(self, grads: Tensor) -> Any:
            return mk.pcgrad(grads)

    with pytest.raises(TypeError, match="grads must be called with tensors, got a proxy"):
        torch.fx.symbolic_trace(Update())
