"""Closed routes that hold what is not finite: they take no part in derivatives of any order, traced or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk

NAN = float("nan")


def trans(u: Tensor, other: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return mk.snr_trans([u, other], weight, z, closed_grad=False)[0]


def aver(u: Tensor, other: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return mk.snr_aver([u, other], z, closed_grad=False)[0] + 0 * weight.nan_to_num(0.0, 0.0, 0.0).sum()


def operands(wrong: str) -> tuple[Tensor, ...]:
    """The second route is closed, and its input or its matrix is not finite."""
    torch.manual_seed(0)
    u, other, weight = torch.randn(3, 2), torch.randn(3, 2), torch.randn(1, 2, 2, 2)
    if wrong == "input":
        other[:] = NAN
    else:
        weight[0, 1] = float("inf")
    return u.requires_grad_(), other, weight.requires_grad_(), torch.tensor([[0.5, 0.0]])


@pytest.mark.parametrize("wrong", ["input", "matrix"])
@pytest.mark.parametrize("op", [trans, aver])
def test_second_derivatives(op: Any, wrong: str) -> None:
    u, other, weight, z = operands(wrong)
    first = torch.autograd.grad(op(u, other, weight, z).pow(3).sum(), [u, weight], create_graph=True)
    second = torch.autograd.grad(first[0].pow(2).sum(), [u, weight])
    assert all(grad.isfinite().all() for grad in (*first, *second))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("wrong", ["input", "matrix"])
@pytest.mark.parametrize("op", [trans, aver])
def test_traced(op: Any, wrong: str) -> None:
    u, other, weight, z = operands(wrong)
    traced = torch.jit.trace(op, (u, torch.randn(3, 2), torch.randn_like(weight).requires_grad_(), z))
    found = torch.autograd.grad(traced(u, other, weight, z).pow(2).sum(), [u, weight])
    expected = torch.autograd.grad(op(u, other, weight, z).pow(2).sum(), [u, weight])
    torch.testing.assert_close(found, expected)
    assert all(grad.isfinite().all() for grad in found)


@pytest.mark.parametrize("wrong", ["input", "matrix"])
@pytest.mark.parametrize("op", [trans, aver])
def test_transforms_that_are_compiled(op: Any, wrong: str, fresh_compiler: None) -> None:
    u, other, weight, z = (t.detach() for t in operands(wrong))
    gradient = torch.func.grad(lambda x: op(x, other, weight, z).pow(2).sum())
    found = torch.compile(gradient, backend="aot_eager", fullgraph=True)(u)
    assert found.isfinite().all()
    torch.testing.assert_close(found, gradient(u))


def test_numbers_that_change_from_call_to_call_compile(fresh_compiler: None) -> None:
    """The compiler makes variables of them, as of an annealed temperature."""
    log_alpha, uniform = torch.randn(2, 3), torch.rand(2, 3)
    sample = torch.compile(lambda a, u, beta: mk.hard_concrete(a, u, beta=beta), backend="aot_eager", fullgraph=True)
    grads = [[torch.tensor([1.0, 2.0])], [torch.tensor([-1.0, 0.5])]]
    project = torch.compile(
        lambda g, norm: mk.pcgrad(g, order=[[1], [0]], max_norm=norm), backend="aot_eager", fullgraph=True
    )
    for number in (0.6, 0.5, 0.4):
        torch.testing.assert_close(
            sample(log_alpha, uniform, number), mk.hard_concrete(log_alpha, uniform, beta=number)
        )
        torch.testing.assert_close(project(grads, number), mk.pcgrad(grads, order=[[1], [0]], max_norm=number))
    routing = mk.Routing.mmoe(2, 2)

    def level(x: Tensor, w: Tensor, g: Tensor, s: Tensor) -> Any:
        options: Any = {"gate_weights": [g, g], "slopes": [[s, s]], "activation": "prelu"}
        return mk.expert_mixture(x, [[w, w + 1]], None, None, routing, **options)

    args = torch.randn(7, 6), torch.randn(4, 6), torch.randn(2, 6), torch.rand(4)
    found = torch.compile(level, backend="aot_eager", fullgraph=True, dynamic=True)(*args)
    torch.testing.assert_close(found, level(*args))
