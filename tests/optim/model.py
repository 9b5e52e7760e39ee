"""A model of three tasks, and what PCGrad makes of its gradients by the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.ops.pcgrad.definition import formula

TASKS = 3
ORDER = [[1, 2], [2, 0], [0, 1]]


class Model(nn.Module):
    """A trunk, a head a task, and a layer that no task reaches."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, sparse: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 4, dtype=dtype))
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=dtype) for _ in range(TASKS))
        self.unused = nn.Linear(2, 2, dtype=dtype)
        self.embedding = nn.Embedding(50, 5, sparse=True, dtype=dtype) if sparse else None
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 5, generator=generator).to(dtype)
        self.ids = torch.randint(0, 50, (16,), generator=generator)
        self.y = torch.randn(TASKS, 16, 1, generator=generator).to(dtype)

    def shared(self) -> list[Tensor]:
        return [*self.trunk.parameters(), *(self.embedding.parameters() if self.embedding else ())]

    def forward(self) -> list[Tensor]:
        x = self.x if self.embedding is None else self.x + self.embedding(self.ids)
        hidden = self.trunk(x)
        return [(head(hidden) - y).square().mean() for head, y in zip(self.heads, self.y, strict=True)]


def grads_of(parameters: Any) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().to_dense().clone() for p in parameters]


def expected(model: Model, shared: Any, others: Any, *, reduction: str = "mean", **options: Any) -> list[Tensor | None]:
    """By the definition for ``shared``; what an ordinary backward pass gives ``others``."""
    model.zero_grad()
    rows = []
    for i in range(TASKS):
        loss = model()[i]
        rows.append(list(torch.autograd.grad(loss, shared, allow_unused=True)))
    total = sum(model())
    (total / TASKS if reduction == "mean" else total).backward()
    plain = grads_of(others)
    model.zero_grad()
    return [*formula(rows, ORDER, reduction=reduction, **options), *plain]


def assert_close(actual: list[Tensor | None], wanted: list[Tensor | None], **tolerance: float) -> None:
    assert [a is None for a in actual] == [w is None for w in wanted]
    for a, w in zip(actual, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a.to(torch.float64), w.to(torch.float64), **tolerance)  # type: ignore[union-attr]
