"""A level, called again and again, and how its results are checked; for calls that are recorded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.ops._recording import Recording
from mtlkernels.testing import assert_within_budget

WIDTHS = (16, 32, 16)


class Level:
    """Parameters of a level with linear gates, or with gates whose logits come from outside; no input comes twice."""

    def __init__(
        self, routing: mk.Routing | None = None, linear: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        self.routing = routing or mk.Routing.cgc(2, 2, 1, single_input=True)
        self.linear, self.dtype, self.generator = linear, dtype, torch.Generator().manual_seed(0)
        experts, shapes = self.routing.num_experts, list(zip(WIDTHS[1:], WIDTHS, strict=False))
        self.weights = [[self.random(*shape) / 4 for _ in range(experts)] for shape in shapes]
        self.biases = [[self.random(shape[0]) for _ in range(experts)] for shape in shapes]
        self.sizes = [len(gate) for gate in self.routing.gate_experts]
        self.gates = [self.random(size, WIDTHS[0]) for size in self.sizes]

    def random(self, *shape: int) -> Tensor:
        """The same numbers in every dtype."""
        return torch.randn(shape, generator=self.generator).to(self.dtype)

    def inputs(self, rows: int) -> list[Tensor]:
        """The streams, then logits where those are given."""
        streams = [self.random(rows, WIDTHS[0]) for _ in range(self.routing.num_inputs)]
        return streams + ([] if self.linear else [self.random(rows, size) for size in self.sizes])

    def parameters(self) -> list[Tensor]:
        return [t for layer in self.weights + self.biases for t in layer] + (self.gates if self.linear else [])

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Level:
        """The same level of other parameters."""
        level = copy.copy(self)
        level.weights, level.biases = (
            [list(map(change, layer)) for layer in own] for own in (self.weights, self.biases)
        )
        level.gates = list(map(change, self.gates))
        return level

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        count = self.routing.num_inputs
        logits, weights = (None, self.gates) if self.linear else (inputs[count:], None)
        experts = (self.weights, self.biases)
        return mk.expert_mixture(inputs[:count], *experts, logits, self.routing, gate_weights=weights)


Run = Callable[[Level, list[Tensor]], list[Tensor]]


def outputs(level: Level, inputs: list[Tensor]) -> list[Tensor]:
    return list(level(inputs))


def cotangents(results: Sequence[Tensor]) -> list[Tensor]:
    """The same numbers in every dtype, others for each result."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(y.shape, generator=generator).to(y) for y in results]


def gradients(level: Level, inputs: list[Tensor]) -> list[Tensor]:
    """Of all that there is; outputs too."""
    leaves = [*inputs, *level.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = level(inputs)
    found = torch.autograd.grad(results, leaves, cotangents(results))
    for leaf in leaves:
        leaf.requires_grad_(False)
    return [*(y.detach() for y in results), *found]


def agree(
    found: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor], names: Sequence[str] | None = None
) -> None:
    """Within the budget that follows from PyTorch's own error against float64: each result, or those of a name."""
    groups: tuple[dict[str, list[Tensor]], ...] = ({}, {}, {})
    for group, results in zip(groups, (found, exact, expected), strict=True):
        for i, tensor in enumerate(results):
            group.setdefault(names[i] if names else str(i), []).append(tensor)
    assert_within_budget(*groups)


def check(level: Level, run: Run, inputs: list[Tensor]) -> None:
    """Against the reference, in the same dtype and in float64; what has one shape is of one kind."""
    with mk.use_backend("triton"):
        found = run(level, inputs)
    with mk.use_backend("reference"):
        expected = run(level, inputs)
        exact = run(level.mapped(Tensor.double), [x.double() for x in inputs])
    agree(found, expected, exact, [str(tuple(y.shape)) for y in found])


@contextmanager
def noted() -> Iterator[list[Recording]]:
    """The recordings that are replayed in the block, in their order."""
    found: list[Recording] = []
    replay = Recording.replay

    def note(self: Recording, moving: Any) -> Any:
        found.append(self)
        return replay(self, moving)

    with mock.patch.object(Recording, "replay", note):
        yield found
