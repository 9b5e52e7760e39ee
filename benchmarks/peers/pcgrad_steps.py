"""Whole training steps under PCGrad, as users of each implementation write them, in an order that is given."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

import mtlkernels as mk
from benchmarks.peers.pcgrad_libraries import GivenOrder, replaced
from benchmarks.peers.step_model import StepModel
from benchmarks.peers.usual_pcgrad import usual_backward


def fused_adam(module: nn.Module) -> torch.optim.Adam:
    """An Adam that moves nothing, so that each step does the same work on the same weights."""
    return torch.optim.Adam(module.parameters(), lr=0.0, fused=True)


class SummedStep:
    """A step on the plain sum of the losses: no surgery, and one backward pass.

    A step is ``zero_grad``, the forward pass, :meth:`differentiate`, in which the kinds of steps differ, and Adam.

    Args:
        model: a copy that is the step's own.
        x: [B, D].
        labels: [T, B].
    """

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor) -> None:
        self.model, self.x, self.labels = model, x, labels
        self.adam = fused_adam(model)
        self.optimizers = [self.adam]
        self.outputs: Sequence[Tensor] = ()

    def forget(self) -> None:
        self.outputs = ()
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def __call__(self) -> None:
        self.forget()
        features = self.model.trunk(self.x)
        losses = self.model.losses(features, self.labels)
        self.differentiate(features, losses)
        for optimizer in self.optimizers:
            optimizer.step()
        self.outputs = tuple(loss.detach() for loss in losses)

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        """Leaves gradients in ``.grad``, from the trunk's outputs and the losses."""
        torch.stack(losses).sum().backward()

    def results(self) -> Mapping[str, Tensor]:
        return {"outputs: losses": torch.stack(list(self.outputs))} | self.model.gradients()


class UsualStep(SummedStep):
    """A backward pass a loss, zeros where it does not reach, and the usual projection of the trunk's gradients."""

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, order: Sequence[Sequence[int]]) -> None:
        super().__init__(model, x, labels)
        self.order = order
        self.shared = list(model.trunk.parameters())
        self.own = list(model.towers.parameters())

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        usual_backward(losses, self.shared, self.own, self.order)


class PytorchOptimizerStep(SummedStep):
    """``pytorch_optimizer.PCGrad(adam, "sum").pc_backward(losses)``.

    It projects all parameters of the optimizer that it wraps, so that this one has the trunk's alone, and towers, whose
    gradients add up beside it, have an Adam of their own.
    """

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, order: Sequence[Sequence[int]]) -> None:
        super().__init__(model, x, labels)
        self.order = order
        self.module = importlib.import_module("pytorch_optimizer.optimizer.pcgrad")
        self.optimizers = [fused_adam(model.trunk), fused_adam(model.towers)]
        self.surgery = self.module.PCGrad(self.optimizers[0], reduction="sum")

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        with replaced(self.module, "random", GivenOrder(self.order)):
            self.surgery.pc_backward(losses)


class TorchJDStep(SummedStep):
    """``mtl_backward`` from the trunk's outputs on, which differentiates all losses at once, then ``jac_to_grad``."""

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, order: Sequence[Sequence[int]]) -> None:
        super().__init__(model, x, labels)
        self.autojac = importlib.import_module("torchjd.autojac")
        self.aggregator = importlib.import_module("torchjd.aggregation").PCGrad()
        self.permutations = [torch.tensor(row) for row in order]

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        self.autojac.mtl_backward(losses, features=features)
        rows = iter(self.permutations)
        with replaced(torch, "randperm", lambda _: next(rows)):
            self.autojac.jac_to_grad(self.model.trunk.parameters(), self.aggregator)


class WrappedStep(SummedStep):
    """``mk.optim.PCGrad`` around Adam, with a generator that draws the same order in each step."""

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__(model, x, labels)
        self.seed, self.generator = seed, torch.Generator()
        shared = model.trunk.parameters()
        self.surgery = mk.optim.PCGrad(self.adam, shared=shared, reduction="sum", generator=self.generator)

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        self.generator.manual_seed(self.seed)
        self.surgery.pc_backward(losses)
