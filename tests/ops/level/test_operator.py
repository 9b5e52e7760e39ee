"""A level's operators themselves, and what its autograd Functions do: whatever names a level's internals is here."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops.expert_level.autograd import ExpertLevel, Plan
from mtlkernels.ops.expert_mixture.autograd import ExpertMixture
from mtlkernels.testing import Case, CaseFactory
from tests import requires
from tests.ops.level import operator
from tests.ops.level.gate_layers import by_layers, by_logits, random_layers
from tests.ops.level.test_norm_modules import Experts, step

# Ragged gates, three streams of which nobody reads the second, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))
OPS = torch.ops.mtlkernels


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


@LEVELS
def test_opcheck_forward(make: Any) -> None:
    for save in (True, False):
        torch.library.opcheck(OPS.expert_mixture_forward, (*operator.of_case(make()), save))


@LEVELS
def test_opcheck_backward(make: Any) -> None:
    arguments = operator.of_case(make().map(Tensor.detach))
    inputs, weights, biases, logits, *routing = arguments
    outputs, saved = OPS.expert_mixture_forward(*arguments, True)
    tensors = ([torch.randn_like(y) for y in outputs], inputs, weights, biases, logits, saved)
    for needs in ((True,) * 4, (False, True, False, False), (True, False, False, True), (False, False, True, False)):
        torch.library.opcheck(OPS.expert_mixture_backward, (*tensors, *routing, *needs))


@DTYPES_ROWS
@pytest.mark.parametrize("save", [False, True])
def test_opcheck_forward_with_gate_layers(kind: torch.dtype, rows: int, save: bool) -> None:
    for requires_grad in (True, False):
        arguments = (*operator.with_gate_layers(kind, rows, requires_grad), save)
        torch.library.opcheck(OPS.expert_level_forward, arguments)


@DTYPES_ROWS
def test_opcheck_backward_with_gate_layers(kind: torch.dtype, rows: int) -> None:
    arguments = operator.with_gate_layers(kind, rows, False)
    inputs, weights, biases, gate_weights, _, *routing = arguments
    outputs, saved, logits = OPS.expert_level_forward(*arguments, True)
    tensors = ([torch.randn_like(y) for y in outputs], inputs, weights, biases, gate_weights, logits, saved)
    for needs in ((True,) * 5, *(tuple(i == j for i in range(5)) for j in range(5))):
        torch.library.opcheck(OPS.expert_level_backward, (*tensors, *routing, *needs))


@DTYPES_ROWS
def test_opcheck_forward_with_norms(kind: torch.dtype, rows: int) -> None:
    for requires_grad in (True, False):
        arguments = operator.with_norms(kind, rows, requires_grad)
        torch.library.opcheck(OPS.normalized_mixture_forward, arguments)


@DTYPES_ROWS
def test_opcheck_backward_with_norms(kind: torch.dtype, rows: int) -> None:
    arguments = operator.with_norms(kind, rows, False)
    inputs, weights, _, *affine, logits = arguments[:7]
    outputs, saved, means, variances = OPS.normalized_mixture_forward(*arguments)
    grads = [torch.randn_like(y) for y in outputs]
    tensors = (grads, inputs, weights, *affine, logits, saved, means, variances)
    for needs in ((True,) * 6, *(tuple(i == j for i in range(6)) for j in range(6))):
        torch.library.opcheck(OPS.normalized_mixture_backward, (*tensors, *arguments[7:], *needs))


def test_no_zeros_are_made_for_what_is_saved(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    seen: list[Any] = []
    usual = ExpertMixture.backward
    monkeypatch.setattr(ExpertMixture, "backward", lambda ctx, *grads: seen.append(grads) or usual(ctx, *grads))
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(**level(torch.float32, 3, "tanh").arguments)
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
    (grads,) = seen
    assert [grad is None for grad in grads] == [False] * 3 + [True]


def test_the_functions_own_rule_for_vmap() -> None:
    """Whatever brings torch.func.vmap to it: the public function does not."""
    inputs, *groups, experts, gate_experts, sizes, codes = operator.with_gate_layers(torch.float64, 5, False)
    plan = Plan.of(2, None, tuple(map(tuple, (experts, gate_experts, sizes, codes))))
    rest = [tensor for group in groups for tensor in group]
    examples = torch.stack([inputs[0], 2 * inputs[0], inputs[1]])

    def outputs(x: Tensor) -> Any:
        return ExpertLevel.apply(plan, x, inputs[1], *rest)[:2]

    found = torch.func.vmap(outputs)(examples)
    for i, x in enumerate(examples):
        for got, want in zip(found, outputs(x), strict=True):
            torch.testing.assert_close(got[i], want)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("implementation", ["reference", "operator", "triton"])
@pytest.mark.parametrize("part", ["scales", "shifts", "slopes"])
def test_parts_of_what_a_layer_has_not(part: str, implementation: str, direction: str) -> None:
    """Calls of the operator itself, as the public function gives a layer no such parts."""
    given: dict[str, list[torch.Tensor | None]] = {"scales": [None] * 4, "shifts": [None] * 4, "slopes": [None] * 4}
    given[part][3] = torch.ones(3)
    weights = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(3, 4), torch.randn(3, 4)]
    run: Any = getattr(OPS, f"normalized_mixture_{direction}")
    if implementation == "triton":
        pytest.importorskip("triton")
    if implementation != "operator":
        run = getattr(importlib.import_module(f"mtlkernels.ops.normalized_mixture.{implementation}"), direction)
    flat = ((0, 0), (0, 1), (2,), (1, 1), (0, 0), (0.0, 0.0), (1.0, 1.0), (0.0, 0.0), None)
    lack = "an activation without slopes" if part == "slopes" else "no norm"
    with pytest.raises(ValueError, match=rf"{part}\[3\] must be None, as its layer has {lack}"):
        if direction == "forward":
            run([torch.randn(6, 5)], weights, [None] * 4, *given.values(), [torch.randn(6, 2)], *flat)
        else:
            saved = [torch.randn(2, 6, 4), torch.randn(2, 6, 3)]
            level = ([torch.randn(6, 3)], [torch.randn(6, 5)], weights, *given.values(), [torch.randn(6, 2)])
            run(*level, saved, [], [], *flat, *[True] * 6)


@requires.cpp_kernels
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("rows", [1, 4, 16, 64, 100])
def test_serving_goes_straight_to_cpp(rows: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gradients neither the checks in Python nor an operator of PyTorch is on the way."""
    torch.set_num_threads(threads)
    arguments = random_layers(3, torch.float32)
    arguments["inputs"] = torch.randn(rows, arguments["weights"][0][0].shape[1])
    expected = by_logits(**arguments)
    monkeypatch.setattr("mtlkernels.ops.expert_mixture.check_arguments", None)
    with torch.no_grad():
        found = by_layers(**arguments)
    torch.testing.assert_close(found, expected)


def test_evaluation_is_one_call_of_the_op_without_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Experts(nn.BatchNorm1d).eval()
    monkeypatch.setattr("mtlkernels.ops.expert_mixture.normalized_mixture", None)
    step(model.fused, model, 0)
