"""Classes of their users' own: several levels, weights without modules, functions, what stands before and behind."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from mtlkernels._convert.chains import flatten, read_chain
from mtlkernels._convert.gates import EQUAL, read_gate
from mtlkernels._convert.paying import BARE_MIXING_ROWS
from mtlkernels.ops._fusing import FOLD_ROWS, TURN_ROWS
from tests.convert import homegrown
from tests.convert.agreement import assert_converts

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    mk.convert.register(homegrown.MMoE, **homegrown.DESCRIPTION)
    yield


def build(seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    return homegrown.MMoE({**homegrown.sample(seed), **options})


@pytest.mark.parametrize("seed", range(12))
def test_home_grown_models_train_and_serve_as_before(seed: int) -> None:
    model = build(seed)
    report = assert_converts(model, homegrown.inputs(model), 40 if seed % 2 else 150, serve=(1, 130))
    assert len(report.replaced) == model.levels


STACKED = {"stacked": True, "levels": 1, "tasks": 2, "experts": 3, "gate": "stacked", "norm": False}


@pytest.mark.parametrize("linear_layout", [False, True])
def test_bare_weights_are_fused_where_that_pays(
    linear_layout: bool, fused_calls: list[int], mixings: list[int]
) -> None:
    """Kernels copy weights that lie across at each call, and autograd records how slices were made of a stack.

    On a few rows both take longer than these do, and experts one by one take longer than own code, a product for all.
    """
    model = build(**STACKED, linear_layout=linear_layout, embedding=False)
    mk.convert(model)
    for wants, many in ((True, TURN_ROWS), (False, FOLD_ROWS)):
        for rows in (1, many - 1, many):
            fused_calls.clear()
            (x,) = homegrown.inputs(model)(rows, 0, torch.float32)
            with torch.set_grad_enabled(wants):
                model(x)
            assert bool(fused_calls) == ((linear_layout and not wants) or rows >= many)
            assert not mixings


def test_bare_weights_with_an_activation_of_their_own(mixings: list[int]) -> None:
    model = build(**STACKED, embedding=False)
    model.experts[0].function = lambda x: x * x.sigmoid()
    assert mk.convert(model).mixing_fused
    for rows, expected in ((BARE_MIXING_ROWS - 1, []), (BARE_MIXING_ROWS, [3])):
        mixings.clear()
        model(*homegrown.inputs(model)(rows, 0, torch.float32))
        assert mixings == expected


@pytest.mark.parametrize("stacked", [False, True])
def test_copies_pickles_and_reverts(stacked: bool) -> None:
    model = build(3, stacked=stacked, embedding=True).eval()
    x = homegrown.inputs(model)(140, 0, torch.float32)
    expected, keys = model(*x), list(model.state_dict())
    mk.convert(model)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) is not homegrown.MMoE
        torch.testing.assert_close(other(*x), expected)
    mk.revert(model)
    assert type(model) is homegrown.MMoE


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("stacked", [False, True])
def test_compiles_in_one_graph(stacked: bool) -> None:
    model = build(3, stacked=stacked, embedding=True, levels=2)
    converted = copy.deepcopy(model)
    mk.convert(converted)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    x = homegrown.inputs(model)(9, 0, torch.float32)
    torch.testing.assert_close(compiled(*x), model(*x))


class Whole(nn.Module):
    """Embedding, batch norm and noise in front, the level in a method, towers behind, and names that could clash."""

    def __init__(self, vocabulary: int = 50) -> None:
        super().__init__()
        self.planner = self.method = nn.Identity()
        self.embedding = nn.EmbeddingBag(vocabulary, 6, sparse=True)
        self.norm = nn.BatchNorm1d(6)
        self.noise = nn.Dropout(0.3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 5), nn.Tanh()) for _ in range(3))
        self.gates = nn.ParameterDict({name: nn.Parameter(torch.randn(6, 3)) for name in ("click", "buy")})
        self.towers = nn.ModuleDict({name: nn.Linear(5, 1) for name in self.gates})

    def front(self, codes: Tensor) -> Tensor:
        x: Tensor = self.planner(self.method(self.noise(self.norm(self.embedding(codes)))))
        return x

    def extract(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        shares = {name: (x @ gate).softmax(1).unsqueeze(1) for name, gate in self.gates.items()}
        return {name: (share @ hidden).squeeze(1) for name, share in shares.items()}

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        return {name: self.towers[name](y) for name, y in self.extract(self.front(codes)).items()}


PARTS: dict[str, Any] = {
    "experts": lambda model: model.experts,
    "gates": lambda model: model.gates.values(),
    "routing": lambda model: mk.Routing.mmoe(3, 2),
}
FORWARD = {
    **PARTS,
    "inputs": lambda model, codes: model.front(codes),
    "outputs": lambda model, mixed: {name: model.towers[name](y) for name, y in zip(model.gates, mixed, strict=True)},
    "example": lambda model, rows: (torch.randint(50, (rows, 4)),),
}
METHOD = {
    **PARTS,
    "method": "extract",
    "outputs": lambda model, mixed: dict(zip(model.gates, mixed, strict=True)),
}


@pytest.mark.parametrize("description", [FORWARD, METHOD], ids=["forward", "method"])
@pytest.mark.parametrize("rows", [2, 40, 200])
def test_a_whole_model(description: dict[str, Any], rows: int, fused_calls: list[int]) -> None:
    """What is in front is called once: statistics and random numbers are as before, fused or not."""
    mk.convert.register(Whole, **description)
    model = Whole()
    converted = copy.deepcopy(model)
    assert mk.convert(converted).replaced
    codes = torch.randint(50, (rows, 4))
    found = []
    fused_calls.clear()
    for one in (model, converted):
        torch.manual_seed(0)
        found.append(one(codes))
        found[-1]["draws"] = torch.rand(3)
    assert fused_calls == [3]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(converted.norm.state_dict(), model.norm.state_dict())
    other = pickle.loads(pickle.dumps(converted))
    assert type(other) is type(converted)
    torch.testing.assert_close(other.eval()(codes), model.eval()(codes))
    mk.revert(converted)
    assert type(converted) is Whole


def _weighted(model: Any, codes: Tensor, weights: Tensor) -> Tensor:
    x: Tensor = model.embedding(codes, per_sample_weights=weights)
    return x


class Weighted(Whole):
    """Whose codes have weights, as only a sum takes them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(50, 6, mode="sum", sparse=True)

    def forward(self, codes: Tensor, weights: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {name: self.towers[name](y) for name, y in self.extract(_weighted(self, codes, weights)).items()}


def test_a_table_that_sums_by_weights() -> None:
    example = lambda model, rows: (torch.randint(50, (rows, 4)), torch.rand(rows, 4))  # noqa: E731
    mk.convert.register(Weighted, **{**FORWARD, "inputs": _weighted, "example": example})
    assert mk.convert(Weighted()).replaced


def test_registered_again_with_another_method() -> None:
    """The method that was replaced is its own again, beneath the other one."""
    mk.convert.register(Whole, **METHOD)
    model = Whole().eval()
    codes = torch.randint(50, (200, 4))
    expected = model(codes)
    assert mk.convert(model).replaced
    mk.convert.register(Whole, **FORWARD)
    torch.testing.assert_close(model(codes), expected)


def test_a_large_table_is_not_copied_for_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    mk.convert.register(Whole, **FORWARD)
    model = Whole(2**22)
    allocated: list[int] = []
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *args, **kwargs: allocated.append(1) or zeros(*args, **kwargs))
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        assert mk.convert(model).replaced
    most = max(event.self_cpu_memory_usage for event in profile.events())
    assert most < model.embedding.weight.nbytes / 2
    assert allocated


def test_streams_of_another_shape_are_an_error_behind_an_embedding() -> None:
    mk.convert.register(Whole, **{**FORWARD, "inputs": lambda model, codes: model.front(codes).unsqueeze(1)})
    (line,) = mk.convert(Whole()).left_alone
    assert "it fails in a trial" in line.detail
    mk.convert.register(
        Whole,
        **{**FORWARD, "inputs": lambda model, codes: model.front(codes)[None if len(codes) == 7 else slice(None)]},
    )
    model = Whole()
    assert mk.convert(model).replaced
    with pytest.raises(ValueError, match=r"must give streams \[B, D\], got stream 0 of shape \[1, 7, 6\]"):
        model(torch.randint(50, (7, 4)))


class Square(nn.Module):
    """As many features as experts, so that no shape tells how a gate lies."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(4, 5) for _ in range(4))
        self.gates = nn.Parameter(torch.randn(2, 4, 4))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([F.relu(expert(x)) for expert in self.experts], dim=1)
        return [(F.linear(x, gate).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


SQUARE: dict[str, Any] = {
    "experts": lambda model: [[expert, "relu"] for expert in model.experts],
    "gates": lambda model: [gate.t() for gate in model.gates],
    "routing": lambda model: mk.Routing.mmoe(4, 2),
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"gates": lambda model: model.gates}, "its outputs differ"),
        ({"gates": lambda model: [None, None]}, "its outputs differ"),
        ({"experts": lambda model: model.experts}, "its outputs differ"),
        ({"experts": lambda model: [[e, "tanh"] for e in model.experts]}, "its outputs differ"),
        ({"experts": lambda model: [[e, "ReLU"] for e in model.experts]}, "an activation must be one of relu, "),
        ({"experts": lambda model: [[e, 3] for e in model.experts]}, "must be a module, a tensor, a function or"),
        ({"gates": lambda model: [[g.t(), torch.softmax] for g in model.gates]}, "a function softmax, which"),
        ({"gates": lambda model: model.gates[:, :3]}, "it fails in a trial"),
        ({"gates": lambda model: model.gates[:, :, :3]}, "gate 0 has 3 logits for 4 experts"),
        ({"gates": lambda model: model.gates[0]}, "must be a matrix [D, H], got shape [4]"),
        ({"gate_inputs": lambda model: [0]}, "its gate_inputs have 1 entries for 2 gates"),
        ({"levels": lambda model: []}, "it has no levels"),
        ({"experts": lambda model: None}, "experts must return a sequence, got NoneType"),
        ({"routing": lambda model: None}, "routing must be a mtlkernels.Routing, got NoneType"),
    ],
)
def test_wrong_descriptions_are_found_out(changes: dict[str, Any], reason: str | None) -> None:
    if "levels" in changes:
        changes = {**changes, **{name: lambda model, level: None for name in SQUARE}}
    mk.convert.register(Square, **{**SQUARE, **changes})
    report = mk.convert(Square())
    assert bool(report.replaced) == (reason is None)
    assert reason is None or reason in report.left_alone[0].detail


def test_steps_of_chains() -> None:
    weight, bias, linear = torch.randn(3, 4), torch.randn(1, 4), nn.Linear(3, 3)
    steps = flatten([weight, bias, "relu", None, nn.ParameterList([weight.t().contiguous()]), (linear, F.silu)])
    x = torch.randn(2, 3)
    found = x
    for step in steps:
        found = step(found)
    torch.testing.assert_close(found, F.silu(linear(F.relu(x @ weight + bias) @ weight.t())))
    layers: Any = read_chain(steps)
    assert [layer.activation for layer in layers] == ["relu", "none", "silu"]
    assert read_chain([linear, lambda x: x]) == "<lambda>"
    assert read_gate(None) is EQUAL


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"levels": 3}, TypeError, "levels must be callable, got int"),
        ({"level_outputs": lambda *_: ()}, ValueError, "levels must be given beside level_outputs"),
        ({"inputs": lambda *_: ()}, ValueError, "or example, got None"),
        ({"arguments": len, "inputs": len, "example": len}, ValueError, "arguments and example are both given"),
        ({"method": "run"}, ValueError, "method must be the name of a method of Square, got 'run'"),
    ],
)
def test_bad_registrations(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.convert.register(Square, **{**SQUARE, **changes})


def _run(program: str) -> str:
    heads = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\nimport mtlkernels as mk\n"
    command = [sys.executable, "-W", "error", "-c", heads + program]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_second_example_of_the_docstring_works() -> None:
    doc = inspect.getdoc(mk.convert.register)
    assert doc is not None
    example = doc.partition("gates that are bare parameters::\n")[2].partition("Experts' matrices")[0]
    found = _run(textwrap.dedent(example) + "\nprint(mk.convert(BareMMoE(6, 5, 4, 3)))")
    assert "4 experts of 2 layers and 3 gates in one expert_mixture" in found


class MLP(nn.Sequential):
    """As torchvision's."""

    def __init__(self, *widths: int) -> None:
        super().__init__(*(step for pair in itertools.pairwise(widths) for step in (nn.Linear(*pair), nn.ReLU())))


class Scaled(MLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


@pytest.mark.parametrize("kind", [MLP, Scaled])
def test_experts_of_a_class_that_calls_its_parts_in_a_line(kind: type[MLP]) -> None:
    """One with a forward of its own stays a module."""
    model = Square()
    model.experts = nn.ModuleList(kind(4, 7, 5) for _ in range(4))
    own, x = copy.deepcopy(model), torch.randn(9, 4)
    mk.convert.register(Square, **{**SQUARE, "experts": lambda model: model.experts})
    assert bool(mk.convert(model).replaced) is (kind is MLP)
    torch.testing.assert_close(model(x), own(x))
    for each in (model, own):
        each.experts[0].register_forward_hook(lambda *args: args[2] + 1)  # type: ignore[union-attr]
    torch.testing.assert_close(model(x), own(x))


def test_numpy_is_not_needed() -> None:
    """PyTorch runs without it, and so does this package."""
    page = (ROOT / "docs" / "recipes" / "home-grown.md").read_text()
    program = page.split("```python\n")[1].split("```")[0]
    without = "import sys, warnings; sys.modules['numpy'] = None; warnings.simplefilter('ignore')\n"
    result = subprocess.run([sys.executable, "-c", without + program], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("replaced")


class WithRouting(nn.Module):
    """Whose class has its routing, as all instances have one."""

    routing = mk.Routing.mmoe(3, 2)

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 5) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        assert self.routing.num_experts == len(self.experts)
        hidden = torch.stack([expert(x) for expert in self.experts], 1)
        return [(gate(x).softmax(1).unsqueeze(1) @ hidden).squeeze(1) for gate in self.gates]


def test_a_routing_of_the_class() -> None:
    """It keeps what was made for it, which is not a change that forward makes."""
    mk.convert.register(
        WithRouting,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: model.routing,
    )
    model = WithRouting()
    x = torch.randn(7, 6)
    expected = model(x)
    assert mk.convert(model).replaced
    torch.testing.assert_close(list(model(x)), expected)
