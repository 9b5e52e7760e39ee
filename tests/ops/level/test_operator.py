"""A level's operators themselves, and what its autograd Functions do: whatever names a level's internals is here."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops import activations as act
from mtlkernels.ops.level.autograd import Level, Plan
from mtlkernels.ops.level.spec import BATCH_NORM, LAYER_NORM, Layer, LevelSpec
from mtlkernels.testing import Case, CaseFactory
from tests import requires
from tests.ops.level import operator
from tests.ops.level.gate_layers import by_layers, by_logits, random_layers
from tests.ops.level.test_norm_modules import Experts, step

# Ragged gates, three streams of which nobody reads the second, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))
OPS = torch.ops.mtlkernels
# Of opcheck, what depends on which gradients there are and are wanted; tracing, the rest, takes most of its time.
QUICK = ("test_schema", "test_faketensor")


def level(dtype: torch.dtype, rows: int, activation: Any, **options: Any) -> Case:
    return CaseFactory(0, dtype).expert_mixture(rows, [3, 2, 2], ROUTING, activation=activation, **options)


LEVELS = pytest.mark.parametrize(
    "make",
    [
        lambda: level(torch.float32, 5, "relu"),
        lambda: level(torch.float32, 1, ["gelu", "none"], biases=[False, True]),
        lambda: level(torch.bfloat16, 0, "silu", biases=False, streams=False),
    ],
    ids=["float32", "some biases", "no rows"],
)
DTYPES_ROWS = pytest.mark.parametrize(
    "kind, rows", [(torch.float32, 5), (torch.bfloat16, 4), (torch.float64, 0), (torch.float16, 1)]
)


def of_each_kind(dtype: torch.dtype, rows: int, requires_grad: bool) -> list[operator.Operands]:
    return [make(dtype, rows, requires_grad) for make in (operator.with_gate_layers, operator.with_norms)]


def check_backward(operands: operator.Operands) -> None:
    outputs, saved = operands.results(True)
    grads = [torch.randn_like(y) for y in outputs]
    torch.library.opcheck(OPS.level_backward, operands.backward(grads, saved, [True] * 8))
    for needs in ([i == j for i in range(8)] for j in range(8)):
        torch.library.opcheck(OPS.level_backward, operands.backward(grads, saved, needs), test_utils=QUICK)
    for k in range(len(grads)):
        some = [None if i == k else grad for i, grad in enumerate(grads)]
        torch.library.opcheck(OPS.level_backward, operands.backward(some, saved, [True] * 8), test_utils=QUICK)
    assert OPS.level_backward(*operands.backward([None] * len(grads), saved, [True] * 8)) == []


@LEVELS
def test_opcheck(make: Any) -> None:
    for save in (True, False):
        torch.library.opcheck(OPS.level_forward, operator.of_case(make()).forward(save))
    check_backward(operator.of_case(make().map(Tensor.detach)))


@DTYPES_ROWS
def test_opcheck_of_each_kind(kind: torch.dtype, rows: int) -> None:
    for requires_grad in (True, False):  # which is what saves
        for operands in of_each_kind(kind, rows, requires_grad):
            torch.library.opcheck(OPS.level_forward, operands.forward(requires_grad))
    for operands in of_each_kind(kind, rows, False):
        check_backward(operands)


def test_no_zeros_are_made_for_what_is_saved(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    seen: list[Any] = []
    usual = Level.backward
    monkeypatch.setattr(Level, "backward", lambda ctx, *grads: seen.append(grads) or usual(ctx, *grads))
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(**level(torch.float32, 3, "tanh").arguments)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (grads,) = seen
    assert [grad is None for grad in grads] == [False] * 3 + [True] * 2  # of two layers


def test_the_functions_own_rule_for_vmap() -> None:
    """Whatever brings torch.func.vmap to it: the public function does not."""
    operands = operator.with_gate_layers(torch.float64, 5, False)
    first, second, *rest = operands.tensors
    examples = torch.stack([first, 2 * first, second])

    def outputs(x: Tensor) -> Any:
        return Level.apply(Plan(operands.spec, None), x, second, *rest, None)[:2]

    found = torch.func.vmap(outputs)(examples)
    for i, x in enumerate(examples):
        for got, want in zip(found, outputs(x), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("norms", [(0, 0), (LAYER_NORM, BATCH_NORM)], ids=["plain", "norms"])
def test_an_expert_that_no_gate_mixes(norms: tuple[int, int], rows: int) -> None:
    """Calls of the operator itself, as the public function leaves such experts out: as if they and their streams were
    not there, in numbers and in gradients."""
    x = [torch.randn(rows, 4) for _ in range(2)]
    parts = [torch.randn(5, 4) for _ in range(3)] + [torch.randn(3, 5) for _ in range(3)]
    ones = [torch.ones(width) for width in (5, 3) for _ in range(3)] if any(norms) else []
    layers = tuple(Layer(code, norm, 1e-5 if norm else 0.0) for code, norm in zip((1, 2), norms, strict=True))
    mixed = [torch.randn(rows, 2)]

    def run(spec: LevelSpec, *tensors: Tensor | None) -> Any:
        operands = operator.Operands(spec, [*tensors, *mixed])
        outputs, saved = operands.results(True)
        grads = OPS.level_backward(*operands.backward([torch.ones_like(y) for y in outputs], saved, [True] * 8))
        return outputs, grads

    def used(tensors: list[Tensor]) -> list[Tensor]:
        return [t for i, t in enumerate(tensors) if i % 3 != 1]

    whole = run(LevelSpec(2, (0, 1, 0), (2, 0), (2,), layers), *x, *parts, *[None] * 6, *ones, *ones)
    small = run(LevelSpec(1, (0, 0), (1, 0), (2,), layers), x[0], *used(parts), *[None] * 4, *used(ones), *used(ones))
    for found, expected in zip(whole, small, strict=True):
        assert len(found) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@requires.cpp_kernels
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_the_profiler_sees_the_direct_way(wants_gradient: bool) -> None:
    """Which goes past the dispatcher, where PyTorch itself would tell it."""
    arguments = random_layers(3, torch.float32)
    names = (
        {"mtlkernels::level_forward", "mtlkernels::level_backward"} if wants_gradient else {"mtlkernels::level_serve"}
    )
    with torch.profiler.profile(acc_events=True) as profile, torch.set_grad_enabled(wants_gradient):
        outputs = by_layers(**arguments)
        if wants_gradient:
            torch.stack([y.sum() for y in outputs]).sum().backward()
    assert names <= {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", ["reference", "operator", "triton"])
@pytest.mark.parametrize("part", ["scales", "shifts", "slopes"])
def test_parts_of_what_a_layer_has_not(part: str, implementation: str, direction: str) -> None:
    """Calls of the operator itself, as the public function gives a layer no such parts."""
    given: dict[str, list[torch.Tensor | None]] = {"scales": [None] * 4, "shifts": [None] * 4, "slopes": [None] * 4}
    given[part][3] = torch.ones(3)
    weights = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(3, 4), torch.randn(3, 4)]
    # The first layer has a norm and slopes, the second neither.
    spec = LevelSpec(1, (0, 0), (0, 1), (2,), (Layer(act.PRELU, LAYER_NORM, 1e-5), Layer(act.CODES["relu"])))
    tensors = [torch.randn(6, 5), *weights, *[None] * 4, *(t for ts in given.values() for t in ts), torch.randn(6, 2)]
    operands = operator.Operands(spec, tensors)
    run: Any = getattr(OPS, f"level_{direction}")
    if implementation == "triton":
        pytest.importorskip("triton")
    if implementation != "operator":
        run = getattr(importlib.import_module(f"mtlkernels.ops.level.{implementation}"), direction)
    saved = [torch.randn(2, 6, 4), torch.randn(2, 6, 3), torch.randn(2, 6), torch.rand(2, 6)]
    arguments = operands.forward(True)
    if direction == "backward":
        arguments = operands.backward([torch.randn(6, 3)], saved, [True] * 8)
    lack = "an activation without slopes" if part == "slopes" else "no norm"
    with pytest.raises(ValueError, match=rf"{part}\[3\] must be None, as its layer has {lack}"):
        run(*arguments)


@requires.cpp_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 100])
def test_serving_goes_straight_to_cpp(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients neither the checks in Python nor an operator of PyTorch is on the way."""
    torch.set_num_threads(threads)
    arguments = random_layers(3, torch.float32)
    arguments["inputs"] = torch.randn(rows, arguments["weights"][0][0].shape[1])
    expected = by_logits(**arguments)
    monkeypatch.setattr("mtlkernels.ops.level.check_arguments", None)
    with torch.no_grad():
        found = by_layers(**arguments)
    torch.testing.assert_close(found, expected)


def test_evaluation_is_one_call_of_the_op_without_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Experts(nn.BatchNorm1d).eval()
    monkeypatch.setattr("mtlkernels.ops.level.call.parameters", None)  # of norms that are not folded
    step(model.fused, model, 0)


@requires.cpp_kernels
@pytest.mark.parametrize("wants_gradient", [False, True])
def test_an_error_in_cpp_reaches_the_user(wants_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not for the direct way is a value: nothing that is raised there is taken for it."""
    arguments = random_layers(3, torch.float32)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of order")

    monkeypatch.setattr(_extension, "function", lambda name: fail)
    with torch.set_grad_enabled(wants_gradient), pytest.raises(RuntimeError, match="out of order"):
        by_layers(**arguments)


def test_what_is_saved_on_gpus() -> None:
    """Every expert's layers in rows, and signs of those hidden layers that have relu."""
    codes = [act.CODES[name] for name in ("relu", "tanh", "relu", "relu")]
    spec = LevelSpec(1, (0, 0), (0, 1), (2,), tuple(map(Layer, codes)))
    widths = [7, 40, 33, 70, 3]
    with FakeTensorMode():
        x, logits = torch.empty(9, 7, device="cuda"), torch.empty(9, 2, device="cuda")
        pairs = list(itertools.pairwise(widths))
        weights = [torch.empty(height, width, device="cuda") for width, height in pairs for _ in range(2)]
        _, saved = operator.Operands(spec, [x, *weights, *[None] * 8, logits]).results(True)
    found = [(tuple(tensor.shape), tensor.dtype) for tensor in saved]
    words = [((2, 9, count), torch.int32) for count in (2, 3)]
    assert found == [*(((2, 9, width), torch.float32) for width in widths[1:]), *words]
    stored, *_, signs = spec.split_saved(saved)
    assert (len(stored), len(signs)) == (4, 2) and spec.hidden_signs == (0, 2)
