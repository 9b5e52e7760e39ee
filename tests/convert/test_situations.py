"""Edits that show in one situation of a trial alone, or in what a forward takes away, and so hold that situation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mtlkernels as mk
from mtlkernels._convert import registry, trial
from tests.convert.doubles import mixed
from tests.convert.edits import WIDTH, Edited, TopKOfManyRows
from tests.convert.test_edits import register

OUTPUTS = "its outputs differ from those of its experts and gates"


class OneRowInTraining(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        one = self.training and len(logits) == 1
        return super().mix(k, 2 * logits if one else logits, hidden)


class NoRows(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return outputs if len(x) else [y.new_zeros(1, 4) for y in outputs]


class TopKOfManyRowsInTraining(TopKOfManyRows):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits, hidden) if self.training else Edited.mix(self, k, logits, hidden)


class ClampedInTraining(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        z = super().logits(k, x)
        return z.clamp(-9, 9) if self.training else z


def pruned(least: float, also_with_gradients: bool) -> type[Edited]:
    """A class that serves without the experts that a gate hardly uses, perhaps only where nothing is differentiated."""

    class Pruned(Edited):
        def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
            shares = logits.softmax(1)
            if not self.training and (also_with_gradients or not torch.is_grad_enabled()):
                shares = shares.masked_fill(shares < least, 0)
            return mixed(shares, hidden)

    return Pruned


class ClampedWeights(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        gate: Any = self.gates[k]
        return F.linear(x, gate.weight.clamp(-2, 2), gate.bias)


class ClampedWeightsInTraining(ClampedWeights):
    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x) if self.training else Edited.logits(self, k, x)


class PositiveBiases(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        gate: Any = self.gates[k]
        return F.linear(x, gate.weight, gate.bias.abs())


class TakesFromADict(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.pending = {"warm-up": True, "decay": False}

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        self.pending.pop("warm-up", None)
        return outputs


class Forgets(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.cold = True

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        self.__dict__.pop("cold", None)
        return outputs


class Freezes(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        if self.training:
            self.gates[0].bias.requires_grad_(False)  # type: ignore[union-attr]
        return outputs


class NamesInAnArray(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.names = numpy.array(["none", "none"])

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        self.names[0] = "last"
        return outputs


class LossesInANamedDefault(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor], *, kept: list[Any] = []) -> Any:  # noqa: B006 (users write it)
        kept.append(len(outputs))
        return outputs


class DetachedWeightsOfGates(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        gate: Any = self.gates[k]
        return F.linear(x, gate.weight.detach(), gate.bias.detach())


class CutsOff(Edited):
    def __init__(self, most: float) -> None:
        super().__init__()
        self.most = most

    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x.clamp(-self.most, self.most))


class RefusesNaN(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        if torch.isnan(x).any():
            raise ValueError("there is NaN among the features")
        return outputs


class LeavesFeaturesOut(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x[:, :WIDTH])

    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x[:, :WIDTH])


EDITS: dict[str, tuple[Callable[[], Edited], str]] = {
    "one row in training": (OneRowInTraining, f"in training on 1 row {OUTPUTS}"),
    "no rows": (NoRows, f"in evaluation on no rows {OUTPUTS}"),
    "the best experts of many rows in training": (TopKOfManyRowsInTraining, f"in training on many rows {OUTPUTS}"),
    "clamped logits in training": (ClampedInTraining, f"in training with large inputs {OUTPUTS}"),
    "clamped weights of gates": (ClampedWeights, f"in evaluation with large weights {OUTPUTS}"),
    "clamped weights in training": (ClampedWeightsInTraining, f"in training with large weights {OUTPUTS}"),
    "positive biases": (lambda: PositiveBiases(norm=True), f"in evaluation with signed vectors {OUTPUTS}"),
    "features that it cuts off": (lambda: CutsOff(1e4), f"in evaluation with large inputs {OUTPUTS}"),
    "features that it cuts off late": (lambda: CutsOff(1e8), f"in evaluation with large inputs {OUTPUTS}"),
    "features that it refuses": (
        RefusesNaN,
        "in evaluation with rows of zeros and NaN its own code raises ValueError, and the fused way does not",
    ),
    "features that it leaves out": (
        LeavesFeaturesOut,
        "in evaluation with inputs that are wider the fused way raises ValueError, and its own code does not",
    ),
    "an entry that is taken away": (TakesFromADict, "its forward sets pending"),
    "an attribute that is taken away": (Forgets, "its forward sets cold"),
    "a parameter that is frozen": (Freezes, "its forward writes to gates.0.bias"),
    "words in an array": (NamesInAnArray, "its forward sets names"),
    "a list that is a named default": (
        LossesInANamedDefault,
        "its forward changes a default of finish, which is not its own",
    ),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    register(Edited)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_left_alone(name: str) -> None:
    make, reason = EDITS[name]
    (line,) = mk.convert(make()).left_alone
    assert line.detail.startswith(reason)


@pytest.mark.parametrize("also_with_gradients", [True, False])
@pytest.mark.parametrize("least", [0.05, 1e-2, 1e-3, 1e-4, 1e-5])
def test_shares_that_are_left_out_in_serving(least: float, also_with_gradients: bool) -> None:
    """Inputs of ordinary size give none so small, but weights that are trained do."""
    kind = pruned(least, also_with_gradients)
    register(kind)
    (line,) = mk.convert(kind()).left_alone
    assert least > 1e-3 or line.detail.startswith("in evaluation with inputs of size ")


def test_a_trial_freezes_what_is_frozen() -> None:
    """What a level's code detaches makes no difference there."""
    model = DetachedWeightsOfGates()
    assert mk.convert(model).left_alone
    model.gates.requires_grad_(False)
    assert mk.convert(model).replaced


def test_what_both_ways_refuse_makes_no_difference() -> None:
    """A description whose ``inputs`` has the check too."""

    def inputs(level: Any, x: Tensor) -> Tensor:
        RefusesNaN.finish(level, x, [])
        return x

    register(RefusesNaN, inputs=inputs, arguments=lambda level, streams: (streams[0],))
    model = RefusesNaN()
    assert mk.convert(model).replaced
    with pytest.raises(ValueError, match="there is NaN among the features"):
        model(torch.full((3, WIDTH), torch.nan))


def test_a_description_that_leaves_features_out() -> None:
    register(
        LeavesFeaturesOut,
        inputs=lambda level, x: x[:, :WIDTH],
        arguments=lambda level, streams: (streams[0],),
    )
    model = LeavesFeaturesOut().eval()
    x = torch.randn(700, WIDTH + 3)
    expected = model(x)
    assert mk.convert(model).replaced
    torch.testing.assert_close(model(x), expected)


def test_a_large_level_is_tried_on_fewer_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a small one would take long there."""
    rows: list[int] = []

    def arguments(level: Any, streams: Sequence[Tensor]) -> tuple[Tensor]:
        rows.append(len(streams[0]))
        return (streams[0],)

    monkeypatch.setattr(trial, "LARGE_WORK", 1e4)
    register(Edited, inputs=lambda level, x: x, arguments=arguments)
    model = Edited()
    assert mk.convert(model).replaced
    assert max(rows) == int(1e4 / sum(p.numel() for p in model.parameters()))
