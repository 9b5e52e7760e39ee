"""gated_mixture against its formula, over every implementation, dtype and memory layout."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, evaluate, random_gated_mixture
from tests.ops import agreement
from tests.ops.agreement import assert_as_exact, kinds
from tests.ops.gated_mixture.definition import formula

CASES = 12


def check(case: Case, backend: str, threads: int = 1) -> None:
    agreement.check(mk.gated_mixture, formula, case, backend, threads)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(random_gated_mixture(seed, dtype), backend, threads=1 + seed % 2)


@pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
@pytest.mark.parametrize("seed", range(1000, 1005))
def test_every_instruction_set(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        check(random_gated_mixture(seed, dtype), "cpp")


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows: int, dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(0, dtype).gated_mixture(rows, 13, mk.Routing.cgc(2, 1, 2, shared_gate=True)), backend)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(1, dtype, layouts=[layout])
    check(make.gated_mixture(33, 17, mk.Routing.mmoe(5, 3)), backend)
    check(make.gated_mixture(33, 17, mk.Routing.mmoe(5, 3), joined_logits=True), backend)


def test_many_experts_and_gates(dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(2, dtype).gated_mixture(9, 5, mk.Routing.mmoe(67, 66), joined_logits=True), backend)


def test_wide_features(dtype: torch.dtype, backend: str) -> None:
    check(CaseFactory(3, dtype).gated_mixture(5, 2049, mk.Routing.mmoe(3, 2)), backend)


def test_no_features(backend: str) -> None:
    case = CaseFactory(4, torch.float32).gated_mixture(5, 0, mk.Routing.mmoe(3, 2))
    check(case, backend)


def test_one_tensor_for_several_gates(backend: str) -> None:
    make = CaseFactory(5, torch.float32)
    case = make.gated_mixture(12, 7, mk.Routing.mmoe(4, 3))
    shared = make.leaf(12, 4)
    case.arguments["gate_logits"][:] = [shared, shared, shared]
    check(case, backend)


@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_of_another_dtype(logits_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    case = CaseFactory(6, dtype).gated_mixture(12, 7, mk.Routing.mmoe(4, 3))
    case.arguments["gate_logits"][:] = [
        t.detach().to(logits_dtype).requires_grad_() for t in case.arguments["gate_logits"]
    ]
    with mk.use_backend(backend):
        got = evaluate(mk.gated_mixture, case)
    assert {t.dtype for t in got["outputs"] + got["experts"]} == {dtype}
    assert {t.dtype for t in got["gate_logits"]} == {logits_dtype}
    check(case, backend)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_logits_of_any_scale(scale: float, backend: str) -> None:
    """The softmax subtracts the largest logit: large ones neither overflow nor lose the mixture."""
    case = CaseFactory(7, torch.float32).gated_mixture(20, 6, mk.Routing.mmoe(5, 2))
    with torch.no_grad():
        for logits in case.arguments["gate_logits"]:
            logits.mul_(scale)
    with mk.use_backend(backend):
        got = mk.gated_mixture(**case.arguments)
    experts, logits = case.arguments["experts"], case.arguments["gate_logits"]
    usual = [(torch.softmax(own, 1)[:, :, None] * experts).sum(1) for own in logits]
    exact = [(torch.softmax(own.double(), 1)[:, :, None] * experts.double()).sum(1) for own in logits]
    assert_as_exact(got, exact, usual)


def test_outputs_are_new_dense_tensors(backend: str) -> None:
    """Also where a gate sees one expert, and its output is that expert's."""
    case = CaseFactory(8, torch.float32).gated_mixture(4, 3, mk.Routing((0, 0), ((1,), (0, 1))))
    with mk.use_backend(backend), torch.inference_mode():
        outputs = mk.gated_mixture(**case.arguments)
    for y in outputs:
        assert y.is_contiguous()
        assert y.untyped_storage().data_ptr() != case.arguments["experts"].untyped_storage().data_ptr()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(value: float, dtype: torch.dtype, backend: str) -> None:
    """A share of exactly 0 times an infinite expert is NaN, and logits that are all -Inf have no softmax."""
    routing = mk.Routing((0, 0, 0), ((0, 1, 2), (1, 0)))
    for place in ("experts", "logits", "upstream", "a share of 0"):
        experts = torch.randn(7, 3, 5, dtype=dtype)
        logits, upstream = torch.randn(7, 3, dtype=dtype), torch.randn(7, 5, dtype=dtype)
        {"experts": experts[2], "logits": logits, "upstream": upstream}.get(place, experts[1])[1:2] = value
        logits[3, 0] = -float("inf")
        experts, logits = experts.requires_grad_(), logits.requires_grad_()
        second = torch.randn(7, 2, dtype=dtype)
        expected = [
            (own.softmax(1).unsqueeze(2) * experts[:, list(gate)]).sum(1)
            for gate, own in zip(routing.gate_experts, (logits, second), strict=True)
        ]
        with mk.use_backend(backend):
            got = mk.gated_mixture(experts, [logits, second], routing)
            grads = torch.autograd.grad(got, [experts, logits], [upstream, upstream])
        wanted = torch.autograd.grad(expected, [experts, logits], [upstream, upstream])
        for found, right in zip((*got, *grads), (*expected, *wanted), strict=True):
            assert torch.equal(kinds(found), kinds(right)), place


@pytest.mark.parametrize("isa", _extension.instruction_sets())
def test_shares_that_are_subnormal(isa: str) -> None:
    """A share of 6e-39 counts beside an expert of 1e35, as in PyTorch's softmax, and so does its gradient."""
    experts = torch.tensor([[[0.0] * 20, [1e35] * 20]])
    logits = torch.tensor([[0.0, -88.0]], requires_grad=True)
    with _extension.instruction_set(isa), mk.use_backend("cpp"):
        (got,) = mk.gated_mixture(experts, [logits], mk.Routing.mmoe(2, 1))
        grads = torch.autograd.grad(got.sum(), logits)
    expected = (logits.double().softmax(1) @ experts[0].double()).expand(1, 20)
    wanted = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close((got, *grads), (expected.float(), *wanted), rtol=1e-4, atol=0.0)
