"""Modules that are one level: known by their structure, or registered by their user."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from mtlkernels._convert.chains import read_chain
from mtlkernels._convert.gates import Gate, read_gate
from mtlkernels.ops._fusing import Layer
from tests.convert import doubles
from tests.convert.agreement import assert_converts
from tests.convert.models import fill

WIDTH, TASKS = 10, 3
FLOOR = 8 * torch.finfo(torch.float32).eps


def level(kind: Any, units: tuple[int, ...] = (12, 7), **options: Any) -> Any:
    return fill(kind(WIDTH, units, **options))


MODULES: dict[str, Any] = {
    "ExtractionNet": lambda: level(doubles.ExtractionNet),
    "ExtractionNet with batch norm and dropout": lambda: level(doubles.ExtractionNet, norm="batch", rate=0.2),
    "ExtractionNet at the last level": lambda: level(
        doubles.ExtractionNet, norm="batch", last=True, specific=(1, 1, 1)
    ),
    "ExtractionNet with SiLU": lambda: level(doubles.ExtractionNet, (8,), activation=nn.SiLU, shared=3),
    "MMoE of TorchEasyRec": lambda: level(doubles.MMoE, norm="batch", rate=0.2),
    "MMoE of TorchEasyRec with gates of two layers": lambda: level(doubles.MMoE, gate=(6,), norm="batch"),
    "CGC_Layer": lambda: level(doubles.CGC_Layer),
    "CGC_Layer with batch norm and dropout": lambda: level(
        doubles.CGC_Layer, norm=True, rate=0.2, specific=1, shared=3
    ),
    "CGC_Layer with gates of one layer": lambda: level(doubles.CGC_Layer, (8,), gate=(), norm=True),
    "MMoE_Layer": lambda: level(doubles.MMoE_Layer),
    "MMoE_Layer with batch norm and dropout": lambda: level(doubles.MMoE_Layer, norm=True, rate=0.2),
    "MMoE of LibMTL with batch norm": lambda: level(doubles.LibMTLMMoE),
    "CGC of LibMTL with batch norm": lambda: level(doubles.CGC),
}


def arguments(module: Any, rows: int = 9, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    streams = [torch.randn(rows, WIDTH, generator=generator).to(dtype) for _ in range(TASKS + 1)]
    if isinstance(module, doubles.ExtractionNet):
        return streams[:-1], streams[-1]
    return (streams,) if isinstance(module, doubles.CGC_Layer) else (streams[0],)


def tensors(result: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if leaf is not None]


def error(found: Any, exact: Any) -> float:
    a, b = torch.cat(tensors(found), 1).double(), torch.cat(tensors(exact), 1)
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_serves_as_the_library(name: str, grad: bool, fused_calls: list[int]) -> None:
    model = MODULES[name]().eval()
    exact, converted = copy.deepcopy(model).double(), copy.deepcopy(model)
    assert mk.convert(converted).replaced
    with torch.set_grad_enabled(grad):
        for rows in (1, 2, 33, 300):
            fused_calls.clear()
            expected = exact(*arguments(model, rows, dtype=torch.float64))
            original, found = model(*arguments(model, rows)), converted(*arguments(model, rows))
            few = grad and rows < 128 and any(isinstance(m, nn.BatchNorm1d) for m in model.modules())
            assert len(fused_calls) == (0 if few else 1)  # see _fusing.may_fold
            assert error(found, expected) <= 3 * error(original, expected) + FLOOR
            shapes = [
                torch.utils._pytree.tree_map(lambda leaf: None if leaf is None else leaf.shape, result)
                for result in (original, found)
            ]
            assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(MODULES[name](), "gate_activation")])
def test_another_activation_of_gates(name: str, fused_calls: list[int]) -> None:
    model = MODULES[name]().eval()
    converted = copy.deepcopy(model)
    assert mk.convert(converted).replaced
    for activation in (nn.Softmax(dim=-1), nn.Softmax(dim=0), nn.Sigmoid()):
        model.gate_activation = converted.gate_activation = activation
        fused_calls.clear()
        with torch.no_grad():
            found, expected = converted(*arguments(model)), model(*arguments(model))
        assert error(found, copy.deepcopy(expected)) <= 1e-5
        assert bool(fused_calls) == (getattr(activation, "dim", 0) == -1)


@pytest.mark.parametrize("name", [name for name in MODULES if "batch norm" in name])
def test_trains_as_the_library(name: str) -> None:
    model = MODULES[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # other random numbers drop in fused experts
    assert_converts(model, lambda rows, seed, dtype: arguments(model, rows, seed, dtype), 150)


@pytest.mark.parametrize("name", MODULES)
def test_copies_pickles_and_reverts(name: str) -> None:
    model = MODULES[name]().eval()
    expected = model(*arguments(model))
    kind, attributes = type(model), set(vars(model))
    mk.convert(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) is not kind
        torch.testing.assert_close(other(*arguments(other)), expected)
    mk.revert(model)
    assert type(model) is kind
    assert set(vars(model)) == attributes
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(*arguments(model))), tensors(expected), strict=True))


def test_gate_weights_on_request_are_the_librarys(fused_calls: list[int]) -> None:
    model = level(doubles.CGC_Layer).eval()
    expected = model(*arguments(model), require_gate=True)
    mk.convert(model)
    fused_calls.clear()
    torch.testing.assert_close(model(*arguments(model), require_gate=True), expected, rtol=0, atol=0)
    assert not fused_calls


@torch.no_grad()
def test_one_task_of_libmtl_is_the_librarys(fused_calls: list[int]) -> None:
    model = level(doubles.CGC).eval()
    (x,) = arguments(model)
    expected = model(x)
    mk.convert(model)
    fused_calls.clear()
    model.prepared.clear()
    found = model(x, task_name="task1")
    assert list(found) == ["task1"]
    assert torch.equal(found["task1"], expected["task1"])
    assert not fused_calls
    torch.testing.assert_close(model(x, None), expected)
    assert fused_calls == [8]
    assert model.prepared == ["task1", "task0", "task1", "task2"]


def returns_hidden(model: Any) -> Any:
    model.expert_mlps[1].return_hidden_layer_feature = True
    return model


def own_forward(model: Any) -> Any:
    model.forward = model.forward
    return model


class Halved(doubles.MMoE):
    """A user's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> list[Tensor]:
        return [y / 2 for y in super().forward(input)]


class Inherited(doubles.MMoE):
    """A user's subclass without one."""


Renamed = type("MMoE", (Halved,), {"forward": lambda self, input: Halved.forward(self, input)})


def odd_structure(model: Any) -> Any:
    model.gate_finals = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("make_model", "reason"),
    [
        (lambda: returns_hidden(level(doubles.MMoE)), "it fails in a trial: TypeError: "),
        (lambda: own_forward(level(doubles.MMoE)), "its forward is not that of MMoE"),
        (lambda: level(Halved), "its forward is not that of MMoE"),
        (lambda: level(Renamed), "in evaluation its outputs differ from those of its experts and gates"),
        (lambda: odd_structure(level(doubles.MMoE)), "its description does not fit: TypeError: "),
    ],
)
def test_left_alone(make_model: Any, reason: str) -> None:
    model = make_model()
    kind = type(model)
    report = mk.convert(model)
    assert not report.replaced
    assert report.left_alone[0].detail.startswith(reason)
    assert type(model) is kind


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (nn.ReLU(), "ReLU before the first Linear"),
        ([], "no Linear"),
        ([nn.Linear(3, 3), nn.ReLU(), nn.BatchNorm1d(3)], "BatchNorm1d that does not follow a Linear"),
        ([nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)], "BatchNorm1d that does not follow a Linear"),
        ([nn.Linear(3, 3), nn.Dropout(), nn.ReLU()], "ReLU after another activation or a dropout"),
        ([nn.Linear(3, 3), nn.ReLU(), nn.Sequential(nn.Tanh())], "Tanh after another activation or a dropout"),
        ([nn.Linear(3, 3), (nn.Dropout(), nn.Dropout())], "two dropouts in one layer"),
        ([nn.Linear(3, 3), nn.AlphaDropout()], "AlphaDropout"),
        ([nn.Linear(3, 3), nn.Softmax(dim=1)], "Softmax"),
    ],
)
def test_chains_that_are_not_read(chain: Any, reason: str) -> None:
    assert read_chain(chain) == reason


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ([nn.Linear(3, 3), nn.Softmax(dim=0)], "Softmax"),
    ],
)
def test_gates_that_are_not_read(chain: Any, reason: str) -> None:
    assert read_gate(chain) == reason


def test_chains_that_are_read() -> None:
    linear, norm, dropout = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout()
    pair = linear.weight, linear.bias
    layers = [Layer(*pair, norm, "gelu", dropout), Layer(*pair, None, "none", None)]
    chain = [nn.Sequential(linear, norm, nn.Identity()), (nn.GELU(), dropout), linear]
    assert read_chain(chain) == layers
    gate: Any = read_gate([*chain, nn.Softmax(-1), dropout])
    assert (gate.layers, gate.dropout) == (layers, dropout)
    assert read_gate(linear) == Gate(layers[1:], [linear], None)


@torch.no_grad()
def test_arguments_by_name_and_of_other_kinds(fused_calls: list[int]) -> None:
    """Anything but what a level is called with is left to its own code."""
    model = level(doubles.MMoE).eval()
    (x,) = arguments(model)
    expected = model(x)
    mk.convert(model)
    fused_calls.clear()
    torch.testing.assert_close(model(input=x), expected)
    assert fused_calls == [4]
    with pytest.raises(TypeError, match="positional argument"):
        model(x, x)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'input'"):
        model()


def test_a_subclass_without_a_forward_is_converted() -> None:
    assert mk.convert(level(Inherited)).replaced


def test_mtlkernels_own_modules_are_not_taken_for_others() -> None:
    (line,) = mk.convert(mk.nn.MMoE(4, 2, (3,), num_experts=2)).lines
    assert (line.action, line.part, line.detail) == ("left alone", "MMoE", "fused already: mtlkernels' own")


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[type, Any]]:
    """What a test registers is forgotten afterwards."""
    known: dict[type, Any] = {}
    monkeypatch.setattr(registry, "_registered", known)
    yield known


class Pair(nn.Module):
    """A user's level: two streams by name, the shared expert first in each gate, and a dict of outputs."""

    def __init__(self, wrong_order: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3)
        )
        self.gates = nn.ModuleList(nn.Linear(4, 2) for _ in range(2))
        self.wrong_order = wrong_order

    def forward(self, *, click: Tensor, buy: Tensor) -> dict[str, Tensor]:
        shared = self.experts[2](click)
        found = {}
        for t, (name, x) in enumerate((("click", click), ("buy", buy))):
            seen = [self.experts[t](x), shared] if self.wrong_order else [shared, self.experts[t](x)]
            found[name] = doubles.mixed(self.gates[t](x).softmax(1), seen)
        return found


class Positional(Pair):
    """The same, called by position."""

    def forward(self, click: Tensor, buy: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return Pair.forward(self, click=click, buy=buy)


DESCRIPTION: dict[str, Any] = {
    "experts": lambda level: level.experts,
    "gates": lambda level: level.gates,
    "routing": lambda level: mk.Routing((0, 1, 0), ((2, 0), (2, 1))),
    "inputs": lambda level, click, buy: [click, buy],
    "arguments": lambda level, streams: tuple(streams),
    "outputs": lambda level, mixed: dict(zip(("click", "buy"), mixed, strict=True)),
}


@torch.no_grad()
def test_a_registered_class(registered: Any, fused_calls: list[int]) -> None:
    mk.convert.register(Positional, **DESCRIPTION)
    model = nn.ModuleList([fill(Positional()), nn.Linear(2, 2)]).eval()
    x = torch.randn(2, 6, 4)
    expected = model[0](*x)
    assert [line.path for line in mk.convert(model).replaced] == ["0"]
    fused_calls.clear()
    torch.testing.assert_close(model[0](*x), expected)
    torch.testing.assert_close(model[0](buy=x[1], click=x[0]), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(model[0]))(*x), expected)
    assert fused_calls == [3, 3, 3]
    registered.clear()  # as in a process that has not registered the class
    torch.testing.assert_close(model[0](*x), expected, rtol=0, atol=0)
    assert fused_calls == [3, 3, 3]


def test_a_wrong_description_is_found_out(registered: Any) -> None:
    mk.convert.register(Positional, **DESCRIPTION)
    (line,) = mk.convert(Positional(wrong_order=True)).left_alone
    assert line.detail == "in evaluation its outputs differ from those of its experts and gates"
    mk.convert.register(Positional, **{**DESCRIPTION, "outputs": lambda level, mixed: list(mixed)})
    assert mk.convert(Positional()).left_alone
    mk.convert.register(Positional, **{**DESCRIPTION, "routing": lambda level: mk.Routing.mmoe(3, 2)})
    (line,) = mk.convert(Positional()).left_alone
    assert line.detail == "gate 0 has 2 logits for 3 experts"
    mk.convert.register(Positional, **{**DESCRIPTION, "experts": lambda level: level.experts[:2]})
    (line,) = mk.convert(Positional()).left_alone
    assert line.detail.startswith("it has 2 experts and 2 gates, but its routing Routing(")
    mk.convert.register(Positional, **{**DESCRIPTION, "arguments": lambda level, streams: ()})
    (line,) = mk.convert(Positional()).left_alone
    assert line.detail.startswith("it fails in a trial: TypeError: ")


def test_a_trial_leaves_the_module_and_the_generator_as_they_were(registered: Any) -> None:
    mk.convert.register(Positional, **DESCRIPTION)
    model = Positional()
    state, draws = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert mk.convert(model).replaced
    assert torch.equal(torch.get_rng_state(), draws)
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert mk.convert(Positional().to("meta")).replaced


def test_the_example_of_the_docstring_works() -> None:
    """In a process of its own, for it registers a class."""
    doc = inspect.getdoc(mk.convert.register)
    assert doc is not None
    example = doc.partition("::\n")[2].partition("Subclasses are")[0]
    program = "import torch\nfrom torch import nn\nimport mtlkernels as mk\n" + textwrap.dedent(example)
    program = program.replace("print(mk.convert(model))", "model = MyMMoE(6, 5, 4, 3).eval()\nprint(mk.convert(model))")
    program += "\nassert [y.shape for y in model(torch.randn(7, 6))] == [(7, 5)] * 3"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 experts of 1 layer with batch norm and dropout 0.1 and 3 gates in one expert_mixture" in result.stdout


@pytest.mark.parametrize(
    ("kind", "changes", "error", "message"),
    [
        (int, {}, TypeError, "kind must be a subclass of torch.nn.Module, got int"),
        (nn.Linear(1, 1), {}, TypeError, "kind must be a subclass of torch.nn.Module, got an instance of Linear"),
        (Pair, {"gates": 3}, TypeError, "gates must be callable, got int"),
        (Pair, {"outputs": "list"}, TypeError, "outputs must be callable, got str"),
        (Pair, {"arguments": None}, ValueError, "arguments must be given beside inputs, of which it is the inverse"),
        (Pair, {"inputs": None}, ValueError, "inputs must be given beside arguments, of which it is the inverse"),
    ],
)
def test_bad_registrations(kind: Any, changes: Any, error: Any, message: str, registered: Any) -> None:
    with pytest.raises(error, match=message):
        mk.convert.register(kind, **{**DESCRIPTION, **changes})
    assert not registered
