"""A conversion draws as many masks of dropouts as the original does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.weighing import Level


class ByTask(Level):
    """Experts are called once a task, and so draw a mask for each."""

    def prepare(self) -> None:
        for expert in self.experts:
            expert.append(nn.Dropout(0.5))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            sum(w[:, i : i + 1] * e(x) for i, e in enumerate(self.experts))  # type: ignore[misc]
            for w in (g(x).softmax(1) for g in self.gates)
        ]


class OverABottom(Level):
    """All experts read one mask."""

    def prepare(self) -> None:
        self.bottom = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(self.bottom(x))


class OverADropout(Level):
    def prepare(self) -> None:
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(self.drop(x))


class OfShares(Level):
    """A dropout that drops nothing yet."""

    def prepare(self) -> None:
        self.drop = nn.Dropout(0.0)

    def weigh(self, z: Tensor) -> Tensor:
        return self.drop(z.softmax(1))  # type: ignore[no-any-return]


class Stacked(nn.Module):
    """Experts in one product, behind which one dropout draws all of their masks."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6, 8))
        self.drop = nn.Dropout(0.5)
        self.gates = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = self.drop(torch.einsum("bd,ehd->beh", x, self.weight).relu())
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


class SecondElsewhere(Level):
    """The second dropout is applied behind the last layer, where the list has it before."""

    def prepare(self) -> None:
        for expert in self.experts:
            layers = nn.Dropout(0.5), nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 6)
            expert.extend(layers)  # type: ignore[operator]

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([last_drop(last(rest(x))) for last_drop, last, rest in map(_parts, self.experts)], 1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


def _parts(expert: Any) -> tuple[Any, Any, Any]:
    """The last dropout, the last layer and what is before both."""
    return expert[5], expert[6], expert[:5]


class OfLogits(Level):
    """A dropout of logits, before their softmax."""

    def prepare(self) -> None:
        self.gates = nn.ModuleList(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.3)) for _ in range(3))


def _register(kind: type, experts: Any) -> None:
    routing = mk.Routing.mmoe(4, 3)
    mk.convert.register(kind, experts=experts, gates=lambda model: model.gates, routing=lambda model: routing)


DROPOUTS: dict[str, tuple[type, Callable[[Any], Any], bool]] = {
    "a mask a task": (ByTask, lambda model: model.experts, False),
    "a mask for all experts": (OverABottom, lambda model: [[model.bottom, e] for e in model.experts], False),
    "a mask of the input": (OverADropout, lambda model: [[model.drop, e] for e in model.experts], False),
    "a rate of zero": (OfShares, lambda model: model.experts, False),
    "a second one elsewhere": (SecondElsewhere, lambda model: model.experts, False),
    "masks of logits": (OfLogits, lambda model: model.experts, True),
    "masks in one call": (Stacked, lambda model: [[w.t(), "relu", model.drop] for w in model.weight], True),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_as_many_masks_are_drawn(name: str) -> None:
    kind, experts, converted = DROPOUTS[name]
    _register(kind, experts)
    assert bool(mk.convert(kind()).replaced) == converted
