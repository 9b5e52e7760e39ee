"""PCGrad of pytorch-optimizer and of TorchJD on ready gradients, in an order that is given instead of drawn."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers.task_gradients import Grads
from benchmarks.peers.usual_pcgrad import Surgery


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute has another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


class _Objective:
    """A task's loss whose backward pass is done: it puts down ready gradients."""

    def __init__(self, parameters: list[nn.Parameter], grads: list[Tensor]) -> None:
        self.parameters, self.grads = parameters, grads

    def backward(self, retain_graph: bool = False) -> None:
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad


class GivenOrder:
    """Stands for the module ``random`` and shuffles the tasks' gradients to the next row of the order."""

    def __init__(self, order: Sequence[Sequence[int]]) -> None:
        self.rows = iter(order)
        self.tasks: list[Tensor] = []

    def shuffle(self, grads: list[Tensor]) -> None:
        self.tasks = self.tasks or list(grads)
        grads[:] = [self.tasks[j] for j in next(self.rows)]


class PytorchOptimizer(Surgery):
    """``pytorch_optimizer.PCGrad(optimizer, "sum").pc_backward``, but for the backward passes themselves."""

    def __init__(self, grads: Grads, order: Sequence[Sequence[int]]) -> None:
        super().__init__(grads, order)
        self.module = importlib.import_module("pytorch_optimizer.optimizer.pcgrad")
        parameters = [nn.Parameter(torch.empty_like(grad)) for grad in grads[0]]
        self.parameters = parameters
        self.optimizer = self.module.PCGrad(torch.optim.SGD(parameters, lr=0.1), reduction="sum")
        self.objectives = [_Objective(parameters, task) for task in grads]

    def update(self) -> Sequence[Tensor]:
        for parameter in self.parameters:
            parameter.grad = None
        with replaced(self.module, "random", GivenOrder(self.order)):
            self.optimizer.pc_backward(self.objectives)
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


class TorchJDReady(Surgery):
    """``torchjd.aggregation.PCGrad`` on a matrix [T, P] that is there already, as models do not have it."""

    def __init__(self, grads: Grads, order: Sequence[Sequence[int]]) -> None:
        super().__init__(grads, order)
        self.aggregate = importlib.import_module("torchjd.aggregation").PCGrad()
        self.permutations = [torch.tensor(row) for row in order]
        self.matrix = self._matrix()

    def _matrix(self) -> Tensor:
        flat = [grad.reshape(-1) for task in self.grads for grad in task]
        return torch.cat(flat).view(len(self.grads), -1)

    def _aggregated(self, matrix: Tensor) -> Tensor:
        rows = iter(self.permutations)
        with replaced(torch, "randperm", lambda _: next(rows)):
            update: Tensor = self.aggregate(matrix)
        return update

    def update(self) -> Sequence[Tensor]:
        return (self._aggregated(self.matrix),)


class TorchJD(TorchJDReady):
    """The same from lists of gradients: concatenated, aggregated, split."""

    def __init__(self, grads: Grads, order: Sequence[Sequence[int]]) -> None:
        super().__init__(grads, order)
        del self.matrix

    def update(self) -> Sequence[Tensor]:
        like = self.grads[0]
        parts = self._aggregated(self._matrix()).split([grad.numel() for grad in like])
        return [part.view_as(grad) for part, grad in zip(parts, like, strict=True)]
