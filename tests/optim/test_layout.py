"""Gradients lie in memory as ``loss.backward()`` lays them, which fused optimizers and LBFGS rely on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.seeding import seed

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


class Model(nn.Module):
    """Experts as one parameter, and parameters that lie as no gradient does by itself."""

    def __init__(self) -> None:
        super().__init__()
        seed(0)
        self.experts = nn.Parameter(torch.randn(3, 8, 4))
        self.trunk = mk.nn.MMoE(4, 2, (6, 4), num_experts=3)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(module.weight.detach().t().contiguous().t())
        self.gaps = nn.Parameter(torch.randn(4, 16)[:, ::2])

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.einsum("bd,edh->beh", x * self.gaps.sum(0), self.experts).sum(1)
        return [head(h).square().mean() for head, h in zip(self.heads, self.trunk(hidden), strict=True)]

    def shared(self) -> list[nn.Parameter]:
        return [self.experts, self.gaps, *self.trunk.parameters()]


def _strides(parameters: Sequence[Tensor]) -> list[Any]:
    return [None if p.grad is None else p.grad.stride() for p in parameters]


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_strides_are_those_of_backward(batched: bool | None, shared: bool) -> None:
    model, x = Model(), torch.randn(20, 8)
    parameters = list(model.parameters())
    torch.stack(model(x)).sum().backward()
    wanted = _strides(parameters)
    of_trunk = model.shared() if shared else None
    optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters), shared=of_trunk, batched=batched)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(model(x))
        assert _strides(parameters) == wanted


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_backward_does(name: str, batched: bool | None) -> None:
    model, plain, x = Model(), Model(), torch.randn(20, 8)
    del model.gaps, plain.gaps  # for which fused optimizers have no order
    model.gaps = plain.gaps = torch.randn(4, 8)
    usual = OPTIMIZERS[name](plain.parameters())
    optimizer = mk.optim.PCGrad(
        OPTIMIZERS[name](model.parameters()), project=False, reduction="sum", batched=batched,
        shared=[model.experts, *model.trunk.parameters()],
    )  # fmt: skip
    for _ in range(5):
        usual.zero_grad()
        torch.stack(plain(x)).sum().backward()
        usual.step()
        optimizer.zero_grad()
        optimizer.pc_backward(model(x))
        optimizer.step()
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_lbfgs() -> None:
    """Which takes views of gradients."""
    x = torch.randn(32, 8)
    found = []
    for by_tasks in (False, True):
        seed(0)
        weight = nn.Parameter(torch.randn(3, 8, 4))
        optimizer = mk.optim.PCGrad(torch.optim.LBFGS([weight]), project=False, reduction="sum")

        def closure(weight: Tensor = weight, optimizer: Any = optimizer, by_tasks: bool = by_tasks) -> Tensor:
            optimizer.zero_grad()
            losses = torch.einsum("bd,edh->beh", x, weight).square().mean((0, 2))
            if by_tasks:
                optimizer.pc_backward(losses)
            else:
                losses.sum().backward()
            return losses.sum().detach()

        optimizer.step(closure)
        found.append(weight.detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_a_gradient_of_a_parameter_with_gaps_is_contiguous() -> None:
    """In whatever order autograd has made it."""
    parameter, x = nn.Parameter(torch.randn(6, 8)[:, ::2]), torch.randn(6, 5)
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([parameter]), lambda gram: torch.ones_like(gram[0]), gram_every=2)

    def losses() -> list[Tensor]:
        product = parameter.t() @ x
        return [product.square().sum(), product.sum()]

    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(losses())
        found = parameter.grad
        optimizer.zero_grad()
        torch.stack(losses()).sum().backward()
        assert found is not None and parameter.grad is not None
        assert found.stride() == parameter.grad.stride() == (4, 1)
        torch.testing.assert_close(found, parameter.grad)
