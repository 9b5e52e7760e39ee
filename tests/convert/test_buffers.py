"""Buffers, frozen parameters and inputs by which a class's own code decides: noticed as they change, or left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.classes import WATCHED
from mtlkernels._convert.watched import changed
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree


class Masked(Level):
    """Experts that a mask closes, none so far."""

    def prepare(self) -> None:
        self.register_buffer("mask", torch.ones(len(self.experts), dtype=torch.bool))

    def weigh(self, z: Tensor) -> Tensor:
        return z.masked_fill(~self.mask, float("-inf")).softmax(1)


class Annealed(Level):
    """A temperature by a count of epochs, which the loop around it writes."""

    def prepare(self) -> None:
        self.register_buffer("epoch", torch.tensor(0))

    def weigh(self, z: Tensor) -> Tensor:
        return (z / max(0.3, 0.9 ** int(self.epoch))).softmax(1)


class WarmedUp(Level):
    """Gates that are frozen later."""

    def prepare(self) -> None:
        self.register_buffer("frozen", torch.tensor(False))

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1).detach() if self.frozen else z.softmax(1)


CHANGES: dict[type[Any], Callable[[Any], object]] = {
    Masked: lambda model: model.mask[1:].fill_(False),
    Annealed: lambda model: model.epoch.fill_(10),
    WarmedUp: lambda model: model.frozen.fill_(True),
}


def gradients(model: Any) -> list[Tensor | None]:
    found = torch.autograd.grad(sum(y.square().sum() for y in model(X)), list(model.parameters()), allow_unused=True)
    return list(found)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("kind", CHANGES)
def test_whole_numbers_and_flags_are_watched(kind: type[Any], loaded: bool) -> None:
    """Whether they are written to or come from a checkpoint."""
    register(kind)
    own = kind()
    model, before = copy.deepcopy(own), [y.clone() for y in own(X)]
    assert mk.convert(model).replaced
    agree(model, own)
    CHANGES[kind](own)
    if loaded:
        model.load_state_dict(own.state_dict())
    else:
        CHANGES[kind](model)
    agree(model, own)
    for mine, right in zip(gradients(model), gradients(own), strict=True):
        assert (mine is None) == (right is None)
        if mine is not None:
            torch.testing.assert_close(mine, right)
    fresh = kind()
    fresh.load_state_dict(model.state_dict())
    assert kind is WarmedUp or not torch.equal(fresh(X)[0], before[0])
    assert not mk.convert(fresh).replaced


class MaskedByNumbers(Level):
    """A mask of floating-point numbers, by whether they are zero: a trial has some that are."""

    def prepare(self) -> None:
        self.register_buffer("mask", torch.ones(len(self.experts)))

    def weigh(self, z: Tensor) -> Tensor:
        return z.masked_fill(self.mask == 0, float("-inf")).softmax(1)


class MaskedByParameter(MaskedByNumbers):
    def prepare(self) -> None:
        self.mask = nn.Parameter(torch.ones(len(self.experts)), requires_grad=False)


class Wanting(Level):
    """Another result where nobody wants the gradient of its inputs."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x if x.requires_grad else 2 * x)


class Normalized(Level):
    """In training alone."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(F.normalize(x) if self.training and not x.requires_grad else x)


class OfLeaves(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(2 * x if x.is_leaf else x)


class ByColumns(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x if x.is_contiguous() else 2 * x)


LEFT_ALONE: dict[type[Level], str] = {
    MaskedByNumbers: "with zeros in buffers and what is frozen",
    MaskedByParameter: "with zeros in buffers and what is frozen",
    Wanting: "in evaluation with inputs that want no gradient",
    Normalized: "in training with inputs that want no gradient",
    OfLeaves: "in evaluation with inputs that want no gradient",
    ByColumns: "with inputs that lie column by column",
}


@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_what_a_trial_shows(kind: type[Level]) -> None:
    register(kind)
    report = mk.convert(kind())
    assert not report.replaced and LEFT_ALONE[kind] in str(report)


class Beside(Level):
    """A norm of the user's, whose count of batches changes at each step and decides nothing."""

    class Norm(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            assert self.num_batches_tracked is not None
            return super().forward(x)

    def prepare(self) -> None:
        self.norm = self.Norm(X.shape[1])

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(self.norm(x))


def test_a_norms_count_of_batches_does_not_decide() -> None:
    register(
        Beside, inputs=lambda model, x: [model.norm(x)], example=lambda model, rows: (torch.randn(rows, X.shape[1]),)
    )
    model = Beside().train()
    report = mk.convert(model)
    assert report.replaced, report
    for _ in range(3):
        model(X)
        assert changed(model, vars(model)[WATCHED]) is None
