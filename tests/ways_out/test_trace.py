"""``torch.jit.trace``: a plain graph, which is right for other rows and other parameters, and which runs anywhere."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mtlkernels as mk
from tests.ops.agreement import assert_as_exact
from tests.ways_out.kinds import ALL, CONVERTED, Kind, Mixture, assert_same, changed

ROOT = Path(__file__).parents[2]
# torch.jit is deprecated and there; library code and trunks compare shapes, which the tracer warns of.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def traced(model: Any, example: tuple[Any, ...], check: bool = True) -> Any:
    return torch.jit.trace(model, example, check_trace=check)


@pytest.mark.parametrize("grad, count", [(True, 300), (False, 4)], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ALL)
def test_in_evaluation(name: str, count: int, grad: bool) -> None:
    kind = ALL[name]
    model = kind.model()
    with torch.set_grad_enabled(grad):
        module = traced(model, kind.inputs(count, 0), check=False)
        assert_plain(module)
        for other in (1, 3, 40, 300):
            x = kind.inputs(other, other)
            assert_same(module(*x), model(*x), f"{other} rows")
        state = changed(model)
        model.load_state_dict(state)
        module.load_state_dict(state)
        assert_same(module(*x), model(*x), "after load_state_dict")
    wide = tuple(t.double() for t in x)
    found, exact, usual = (
        torch.autograd.grad(outputs_sum(m(*given)), parameters(m), allow_unused=True)
        for m, given in ((module, x), (copy.deepcopy(model).double(), wide), (model, x))
    )
    for a, true, b in zip(found, exact, usual, strict=True):
        if b is None or not b.any():
            assert a is None or not a.any()
        else:
            assert_as_exact(a, true, b)


@pytest.mark.parametrize("name", ALL)
def test_a_trace_that_was_made_for_inference_may_be_trained(name: str) -> None:
    """No constant of the graph is an inference tensor, which cannot be saved for a backward pass."""
    kind = ALL[name]
    model, x = kind.model(), kind.inputs(4, 0)
    with torch.inference_mode():
        module = traced(model, x, check=False)
    outputs_sum(module(*x)).backward()
    found = [p.grad for p in parameters(module)]
    outputs_sum(model(*x)).backward()
    for a, b in zip(found, [p.grad for p in parameters(model)], strict=True):
        assert (a is None or not a.any()) == (b is None or not b.any())


def outputs_sum(result: Any) -> Any:
    return sum(y.square().sum() for y in torch.utils._pytree.tree_leaves(result))


def parameters(module: Any) -> list[Any]:
    return [p for _, p in sorted(module.named_parameters())]


def assert_plain(module: Any) -> None:
    """Only operators that PyTorch itself has, and nothing that makes memory without filling it."""
    nodes = list(module.inlined_graph.nodes())
    nodes += [inner for node in nodes for block in node.blocks() for inner in block.nodes()]
    kinds = {node.kind() for node in nodes}
    assert {kind.partition("::")[0] for kind in kinds} <= {"aten", "prim"}
    assert not kinds & {"aten::empty", "aten::empty_strided", "prim::PythonOp"}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", [name for name in ALL if "compact" not in name])
def test_in_training(name: str, grad: bool) -> None:
    """Batch norm by the batch's statistics; what is random is drawn anew at each call."""
    kind = ALL[name]
    model, twin = kind.model(training=True), kind.model(training=True)
    with torch.set_grad_enabled(grad):
        module = traced(model, kind.inputs(24, 0), check=False)
        assert_plain(module)
        twin.load_state_dict(model.state_dict())  # tracing has brought statistics up to date
        x = kind.inputs(40, 3)
        torch.manual_seed(1)
        found = module(*x)
        torch.manual_seed(1)
        assert_same(found, twin(*x))
    for key, value in twin.state_dict().items():  # sums of batch norms, by a trace in another order
        torch.testing.assert_close(module.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_dropout_is_drawn_at_each_call() -> None:
    module = mk.nn.MMoE(7, 2, expert_units=(64,), num_experts=2, dropout=0.5).train()
    x = torch.randn(20, 7)
    found = torch.jit.trace(module, x, check_trace=False)
    assert not torch.equal(found(x)[0], found(x)[0])


@pytest.mark.parametrize("name", CONVERTED)
def test_is_what_the_original_gives(name: str) -> None:
    kind = CONVERTED[name]
    found, original = (traced(m, kind.inputs(5, 0)) for m in (kind.model(), kind.original()))
    nodes = [[n.kind() for n in module.inlined_graph.nodes()] for module in (found, original)]
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_under_autocast(autocast: torch.dtype) -> None:
    model = Mixture("layers")
    x = torch.randn(9, 7)
    with torch.autocast("cpu", autocast, cache_enabled=False):
        module, expected = torch.jit.trace(model, x), model(x)
        found = module(x)
    assert {y.dtype for y in found} == {autocast}
    assert_as_exact(found, copy.deepcopy(model).double()(x.double()), expected)


def test_checks_do_not_warn() -> None:
    """Nothing of what the checks read of shapes goes into the graph, so the tracer has nothing to warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        for kind in (m for name, m in ALL.items() if name not in CONVERTED):
            torch.jit.trace(kind.model(), kind.inputs(5, 0), check_trace=False)


def test_another_implementation_is_not_substituted() -> None:
    with mk.use_backend("cpp"), pytest.raises(RuntimeError, match="only the reference for torch.jit.trace"):
        torch.jit.trace(Mixture("logits"), torch.randn(3, 7))


def run(code: str, *args: str) -> str:
    """In a process of its own, which may crash."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), *args]
    result = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, f"{result.returncode}: {result.stderr[-2000:]}"
    return result.stdout


@pytest.mark.parametrize("name", ["rechub PLE", "PLE with batch norm", "expert_mixture with gate_weights"])
def test_needs_no_mtlkernels_where_it_is_loaded(name: str, tmp_path: Path) -> None:
    kind: Kind = ALL[name]
    model, x = kind.model(), kind.inputs(13, 1)
    traced(model, kind.inputs(4, 0)).save(str(tmp_path / "model.pt"))
    torch.save({"x": x, "y": model(*x)}, tmp_path / "expected.pt")
    code = """
    import sys, torch
    sys.modules["mtlkernels"] = None
    module, expected = torch.jit.load(sys.argv[1]), torch.load(sys.argv[2])
    y = module(*expected["x"])
    for a, b in zip(*((v if isinstance(v, tuple) else (v,)) for v in (y, expected["y"]))):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    print("same")
    """
    assert "same" in run(code, str(tmp_path / "model.pt"), str(tmp_path / "expected.pt"))


def test_does_not_crash() -> None:
    """At 256 rows with gradients the tracer met an output that it had not seen made, stopped tracing and raised; the
    direct way took that for a refusal and went on, until the tracer read its state, which was gone."""
    code = """
    import torch, mtlkernels as mk
    torch.set_num_threads(2)
    experts = [[torch.nn.Parameter(torch.randn(b, a)) for _ in range(3)] for a, b in ((416, 256), (256, 128))]
    gates = [torch.nn.Parameter(torch.randn(3, 416)) for _ in range(2)]
    class Level(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.ParameterList(layer) for layer in experts)
            self.gates = torch.nn.ParameterList(gates)
        def forward(self, x):
            weights = [list(layer) for layer in self.experts]
            return mk.expert_mixture(x, weights, None, None, mk.Routing.mmoe(3, 2), gate_weights=list(self.gates))
    for rows in (8, 256, 512):
        level, x = Level(), torch.randn(rows, 416)
        y = torch.jit.trace(level, x)(x)  # roughly: the others say how exact a trace is
        assert torch.allclose(y[0], level(x)[0], rtol=1e-3, atol=1e-2)
    print("traced")
    """
    assert "traced" in run(code)


def test_a_function() -> None:
    weights, x = [torch.randn(3, 5, 7)], torch.randn(6, 7)

    def level(x: Any, logits: Any) -> Any:
        return mk.expert_mixture(x, weights, None, logits, mk.Routing.mmoe(3, 2))

    found = torch.jit.trace(level, (x, torch.randn(6, 6)))
    other = (torch.randn(11, 7), torch.randn(11, 6))
    assert_same(found(*other), level(*other))


def test_pcgrad() -> None:
    class Update(nn.Module):
        def forward(self, a: Any, b: Any) -> Any:
            return mk.pcgrad([[a], [b]], order=[[1], [0]])[0], mk.gram([[a], [b]])

    found = torch.jit.trace(Update(), (torch.randn(9), torch.randn(9)))
    assert_plain(found)
    for seed in range(4):
        torch.manual_seed(seed)
        other = (torch.randn(9), torch.randn(9))
        assert_same(found(*other), Update()(*other))
