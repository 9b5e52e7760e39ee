"""A caller of ``expert_mixture`` with lists of its own, until its calls are kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.ops.level import lists
from tests.seeding import seed

ROUTING = mk.Routing((0, 1, 0), ((2, 0), (0, 1, 2)))
SINGLE = mk.Routing((0, 0, 0), ((2, 0), (0, 1, 2)))
WIDTHS = (20, 37, 24)
CALLS = 4  # so many make the last one a kept one


class Level:
    """A caller with lists of parameters."""

    def __init__(self, dtype: torch.dtype = torch.float32, routing: mk.Routing = ROUTING, biases: bool = True) -> None:
        seed(3)

        def make(*shape: int) -> Tensor:
            return (torch.randn(*shape) / 4).to(dtype)

        pairs = list(zip(WIDTHS, WIDTHS[1:], strict=False))
        sizes = [len(gate) for gate in routing.gate_experts]
        self.routing, self.activation = routing, "relu"
        self.weights: list[Any] = [[make(b, a) for _ in range(3)] for a, b in pairs]
        self.biases: Any = [[make(b) for _ in range(3)] for _, b in pairs] if biases else None
        self.gate_weights: Any = [make(size, WIDTHS[0]) for size in sizes]
        self.gate_biases: Any = [make(size) for size in sizes] if biases else None

    def __call__(self, x: Any) -> list[Tensor]:
        with torch.no_grad():
            return self.trained(x)

    def trained(self, x: Any) -> list[Tensor]:
        """The outputs, where gradients may be wanted."""
        gates = {"gate_weights": self.gate_weights, "gate_biases": self.gate_biases}
        args = (x, self.weights, self.biases, None, self.routing)
        return list(mk.expert_mixture(*args, activation=self.activation, **gates))

    def anew(self, x: Any) -> list[Tensor]:
        """The outputs of a copy, of which nothing is kept."""
        return copy.deepcopy(self)(x)


def rows(count: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    seed(count)
    return [torch.randn(count, WIDTHS[0]).to(dtype) for _ in range(2)]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """For each test of the modules that import it."""
    lists.kept_lists.cache_clear()
    yield
    lists.kept_lists.cache_clear()


class Read:
    """Within the block, how many calls were read by ``_C.level``."""

    def __enter__(self) -> Read:
        self.count, function = 0, _extension.function

        def counting(name: str) -> Any:
            self.count += name == "level"
            return function(name)

        self._patch = mock.patch.object(_extension, "function", counting)
        self._patch.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.__exit__(*error)


def kept(level: Level, x: Any) -> Level:
    """The level, after calls that made it a kept one."""
    for _ in range(CALLS):
        level(x)
    with Read() as read:
        level(x)
    assert read.count == 0 and len(lists.kept_lists()) == 1
    return level
