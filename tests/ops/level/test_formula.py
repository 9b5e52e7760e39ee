"""expert_mixture against its formula, over every implementation, dtype and memory layout."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels.ops.activations import ACTIVATIONS
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, evaluate, random_expert_mixture
from tests.ops import agreement
from tests.ops.level.definition import formula

CASES = 30  # the fuzzer has other ones
PLE = mk.Routing.cgc(2, 2, 1, shared_gate=True)


def check(case: Case, backend: str, threads: int = 1) -> None:
    agreement.check(mk.expert_mixture, formula, case, backend, threads)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(random_expert_mixture(seed, dtype), backend, threads=1 + seed % 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(0, dtype).expert_mixture(65, [19, 24, 33], PLE, activation=activation), backend)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_large_inputs(activation: str, backend: str) -> None:
    """Nothing overflows where an activation is flat."""
    case = CaseFactory(1, torch.float32).expert_mixture(9, [4, 5], PLE, activation=activation)
    with torch.no_grad():
        for x in case.arguments["inputs"]:
            x.mul_(1e3)
    with mk.use_backend(backend):
        for group in evaluate(mk.expert_mixture, case).values():
            assert all(torch.isfinite(t).all() for t in group)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_few_rows(rows: int, layers: int, dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(2, dtype).expert_mixture(rows, [21, 10, 12, 7][: layers + 1], PLE), backend)


@pytest.mark.parametrize("biases", [True, False, [True, False, False], [False, True, True]])
def test_biases(biases: bool | list[bool], dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(3, dtype).expert_mixture(40, [9, 8, 17, 5], PLE, biases=biases), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(4, dtype, layouts=[layout])
    check(make.expert_mixture(33, [18, 16, 20], PLE), backend)
    check(make.expert_mixture(33, [18, 16, 20], PLE, stacked=True, streams=False, joined_logits=True), backend)


@pytest.mark.parametrize("experts, gates", [(64, 65), (130, 3), (2, 100)])
def test_many_experts_and_gates(experts: int, gates: int, dtype: torch.dtype, backend: str) -> None:
    routing = mk.Routing.mmoe(experts, gates)
    check(CaseFactory(5, dtype).expert_mixture(5, [6, 8], routing, joined_logits=True), backend)


def test_many_streams(dtype: torch.dtype, backend: str) -> None:
    routing = mk.Routing.cgc(20, 1, 3)
    check(CaseFactory(6, dtype).expert_mixture(17, [6, 8], routing), backend)


def test_wide_layers(dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(7, dtype).expert_mixture(66, [513, 260, 300], mk.Routing.mmoe(2, 2)), backend)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_row_blocks(threads: int, dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(8, dtype).expert_mixture(1537, [20, 24, 16], PLE), backend, threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [20, 200, 300, 700])
def test_several_groups_of_experts(rows: int, threads: int, dtype: torch.dtype, backend: str) -> None:
    """In the backward pass experts of one stream go apart: one by one with few rows, otherwise in groups."""
    widths = [24, 520, 18] if rows > 300 else [24, 40, 18]  # wide enough that 700 rows are several chunks
    check(CaseFactory(13, dtype).expert_mixture(rows, widths, mk.Routing.cgc(2, 5, 2)), backend, threads)


def test_same_tensor_for_several_streams_and_gates(dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(9, dtype)
    case = make.expert_mixture(30, [12, 10], mk.Routing.cgc(2, 2, 2, shared_gate=False))
    x, logits = make.leaf(30, 12), make.leaf(30, 4)
    case.arguments["inputs"][:] = [x, x, x]
    case.arguments["gate_logits"][:] = [logits, logits]
    check(case, backend)


def test_same_parameters_for_two_experts(dtype: torch.dtype, backend: str) -> None:
    case = CaseFactory(10, dtype).expert_mixture(30, [12, 10, 11], mk.Routing.cgc(2, 2, 1))
    for entries in (*case.arguments["weights"], *case.arguments["biases"]):
        entries[3] = entries[0]
    check(case, backend)


def test_experts_without_a_gate_get_zero_gradients(dtype: torch.dtype, backend: str) -> None:
    routing = mk.Routing((0, 1, 0, 2), ((2,), (0, 2)))
    case = CaseFactory(11, dtype).expert_mixture(30, [12, 10, 9], routing)
    with mk.use_backend(backend):
        got = evaluate(mk.expert_mixture, case)
    for name in ("weights[0]", "weights[1]", "biases[0]", "biases[1]"):
        assert [bool(grad.any()) for grad in got[name]] == [True, False, True, False]
    assert [bool(grad.any()) for grad in got["inputs"]] == [True, False, False]
    check(case, backend)


def test_experts_without_a_gate_are_not_evaluated(backend: str) -> None:
    case = CaseFactory(12, torch.float32).expert_mixture(8, [5, 4], mk.Routing((0, 0, 0), ((0, 2),)))
    with torch.no_grad():
        case.arguments["weights"][0][1].fill_(float("nan"))
    with mk.use_backend(backend):
        for group in evaluate(mk.expert_mixture, case).values():
            assert all(torch.isfinite(t).all() for t in group)


def test_parameter_lists(backend: str) -> None:
    case = CaseFactory(13, torch.float32).expert_mixture(8, [5, 4, 3], PLE)
    listed = dict(case.arguments)
    for name in ("weights", "biases"):
        listed[name] = [torch.nn.ParameterList(map(torch.nn.Parameter, entry)) for entry in case.arguments[name]]
    with mk.use_backend(backend):
        for y, expected in zip(mk.expert_mixture(**listed), mk.expert_mixture(**case.arguments), strict=True):
            assert torch.equal(y, expected)


FROZEN = {
    "inputs": ["inputs"],
    "weights": ["weights"],
    "biases": ["biases"],
    "logits": ["gate_logits"],
    "parameters": ["weights", "biases"],
    "all but logits": ["inputs", "weights", "biases"],
    "all but biases": ["inputs", "weights", "gate_logits"],
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_frozen_arguments(frozen: list[str], backend: str) -> None:
    case = CaseFactory(14, torch.float32).expert_mixture(20, [12, 10, 9], PLE)
    full = evaluate(mk.expert_mixture, case)
    for name, leaves in case.leaves().items():
        if name.partition("[")[0] in frozen:
            for leaf in leaves:
                leaf.requires_grad_(False)
    check(case, backend)
    with mk.use_backend(backend):
        found = evaluate(mk.expert_mixture, case)
    torch.testing.assert_close(found, {name: full[name] for name in found})


def test_some_experts_frozen(backend: str) -> None:
    case = CaseFactory(15, torch.float32).expert_mixture(20, [12, 10, 9], PLE)
    for e in (0, 3):
        case.arguments["weights"][0][e].requires_grad_(False)
        case.arguments["biases"][1][e].requires_grad_(False)
    case.arguments["inputs"][1].requires_grad_(False)
    case.arguments["gate_logits"][0].requires_grad_(False)
    check(case, backend)


def test_some_outputs_unused(backend: str) -> None:
    """A gate whose output takes no part in the loss has no gradients; the others' are as ever."""
    case = CaseFactory(16, torch.float32).expert_mixture(20, [12, 10], PLE)
    logits = case.arguments["gate_logits"]
    with mk.use_backend(backend):
        outputs = mk.expert_mixture(**case.arguments)
        got = torch.autograd.grad(outputs[1].square().sum(), logits, allow_unused=True)
    assert [grad is not None and bool(grad.any()) for grad in got] == [False, True, False]
    assert got[0] is None and got[2] is None


def test_outputs_are_new_dense_tensors(backend: str) -> None:
    case = CaseFactory(17, torch.float32, layouts=["transposed"]).expert_mixture(20, [6, 6], PLE, activation="none")
    with mk.use_backend(backend):
        for y in mk.expert_mixture(**case.arguments):
            assert y.is_contiguous()


def test_same_result_with_and_without_gradients(dtype: torch.dtype, backend: str) -> None:
    case = CaseFactory(18, dtype).expert_mixture(70, [12, 10, 11], PLE)
    with mk.use_backend(backend):
        training = mk.expert_mixture(**case.arguments)
        with torch.no_grad():
            serving = mk.expert_mixture(**case.arguments)
    for a, b in zip(training, serving, strict=True):
        torch.testing.assert_close(a.detach(), b)
        assert not b.requires_grad


def test_repeats_exactly(dtype: torch.dtype, backend: str) -> None:
    torch.set_num_threads(2)
    case = CaseFactory(19, dtype).expert_mixture(300, [12, 10, 11], PLE)
    with mk.use_backend(backend):
        first, second = evaluate(mk.expert_mixture, case), evaluate(mk.expert_mixture, case)
    torch.testing.assert_close(second, first, rtol=0, atol=0)
