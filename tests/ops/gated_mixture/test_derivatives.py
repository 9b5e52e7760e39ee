"""gated_mixture in PyTorch: opcheck, derivatives of every order against finite differences, and torch.func.vmap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

import mtlkernels as mk
from mtlkernels.ops.gated_mixture import reference
from mtlkernels.testing import Case, CaseFactory
from tests.ops.derivatives import function_of_leaves, loss_of

# Ragged gates, and an expert that no gate mixes.
ROUTING = mk.Routing((0, 2, 0, 0), ((2, 0), (1,), (0, 1, 2)))


def gated(dtype: torch.dtype = torch.float64, rows: int = 3, **options: Any) -> Case:
    return CaseFactory(0, dtype, **options).gated_mixture(rows, 3, ROUTING)


def operator_arguments(case: Case) -> tuple[Any, ...]:
    """The arguments of the forward operator."""
    flat = [e for gate in ROUTING.gate_experts for e in gate]
    return case.arguments["experts"], case.arguments["gate_logits"], flat, list(map(len, ROUTING.gate_experts))


CHECKED = pytest.mark.parametrize(
    "kind, rows, layout",
    [(torch.float32, 5, "contiguous"), (torch.bfloat16, 0, "contiguous"), (torch.float16, 5, "transposed")],
)


@CHECKED
def test_opcheck_forward(kind: torch.dtype, rows: int, layout: str) -> None:
    arguments = operator_arguments(gated(kind, rows, layouts=[layout]))
    torch.library.opcheck(torch.ops.mtlkernels.gated_mixture_forward, arguments)


@CHECKED
def test_opcheck_backward(kind: torch.dtype, rows: int, layout: str) -> None:
    arguments = operator_arguments(gated(kind, rows, layouts=[layout]).map(Tensor.detach))
    grads = [torch.randn_like(y) for y in torch.ops.mtlkernels.gated_mixture_forward(*arguments)]
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(torch.ops.mtlkernels.gated_mixture_backward, (grads, *arguments, *needs))


def test_finite_differences(backend: str) -> None:
    with mk.use_backend(backend):
        function, leaves = function_of_leaves(mk.gated_mixture, gated())
        gradcheck(function, leaves, check_batched_grad=True)
        gradgradcheck(function, leaves, check_batched_grad=True)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (1, 2)])
def test_vmap(dims: tuple[int | None, int | None], backend: str) -> None:
    routing = mk.Routing.mmoe(3, 2)
    experts, logits = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    batched = [
        t if dim is None else torch.stack([t, 2 * t], dim) for t, dim in zip((experts, logits), dims, strict=True)
    ]

    def fused(experts: Tensor, logits: Tensor) -> Any:
        return mk.gated_mixture(experts, logits, routing)

    def plain(experts: Tensor, logits: Tensor) -> Any:
        return tuple((torch.softmax(part, 1)[..., None] * experts).sum(1) for part in logits.split(3, 1))

    with mk.use_backend(backend):
        assert_close(torch.func.vmap(fused, dims)(*batched), torch.func.vmap(plain, dims)(*batched))
        got = torch.func.vmap(torch.func.grad(loss_of(fused), (0, 1)), dims)(*batched)
    assert_close(got, torch.func.vmap(torch.func.grad(loss_of(plain), (0, 1)), dims)(*batched))


def test_an_expert_that_a_gate_names_twice() -> None:
    """Routing refuses it, but operators that are called directly take it."""
    experts, logits = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    leaf, grad = experts.clone().requires_grad_(), torch.randn(5, 3, dtype=torch.float64)
    weight = logits.softmax(1)
    mixed = (weight.unsqueeze(2) * torch.stack([leaf[:, 1], leaf[:, 1]], 1)).sum(1)
    (expected,) = torch.autograd.grad(mixed, leaf, grad)
    (found,) = reference.backward([grad], experts, [logits], [1, 1], [2], True, False)
    assert_close(found, expected)
