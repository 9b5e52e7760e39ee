"""A level as users copy one from a library, and what they make of it."""

from __future__ import annotations

import collections
import contextlib
import random
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.convert.doubles import mixed

WIDTH = 6


class Edited(nn.Module):
    """A level as users copy one, with a place for an edit wherever they make one."""

    def __init__(self, norm: bool = False, rate: float = 0.0) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(WIDTH, 5),
                nn.BatchNorm1d(5) if norm else nn.Identity(),
                nn.ReLU(),
                nn.Dropout(rate),
                nn.Linear(5, 4),
            )
            for _ in range(4)
        )
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 4) for _ in range(3))
        self.temperature = 1.0
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor) -> Any:
        hidden = [self.expert(e, x) for e in range(len(self.experts))]
        outputs = [self.mix(k, self.logits(k, x), hidden) for k in range(len(self.gates))]
        return self.finish(x, outputs)

    def expert(self, e: int, x: Tensor) -> Tensor:
        y: Tensor = self.experts[e](x)
        return y

    def logits(self, k: int, x: Tensor) -> Tensor:
        z: Tensor = self.gates[k](x)
        return z

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return mixed(logits.softmax(1), hidden)

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return outputs


class Stem(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return mixed(logits.softmax(1), [y if e == k else y.detach() for e, y in enumerate(hidden)])


class DetachedGate(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x.detach())


class GateNoise(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        z = super().logits(k, x)
        return z + 0.1 * torch.randn_like(z) if self.training else z


class NumpyNoise(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x) + (float(numpy.random.rand()) if self.training else 0.0)


class PythonNoise(Edited):
    """A number that is drawn, and so far changes nothing."""

    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x) + 0.0 * random.random()


class DroppedLogits(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        dropout: Any = self.experts[0][3]  # type: ignore[index]
        return F.dropout(super().logits(k, x), dropout.p, self.training)


class DroppedElsewhere(Edited):
    """A dropout module that the experts' list has is not applied there."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        first, norm, relu, dropout, last = self.experts[e]  # type: ignore[misc]
        y: Tensor = dropout(last(relu(norm(first(x)))))
        return y


class LastGates(Edited):
    last_gates: Any

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        self.last_gates = logits.softmax(1)
        return super().mix(k, logits, hidden)


class GatesInAList(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        self.losses.append(logits.softmax(1).var())
        return super().mix(k, logits, hidden)


class GatesInANestedContainer(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.kept = {"by gate": collections.deque([torch.zeros(1)], maxlen=1)}

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        self.kept["by gate"].append(logits.detach())
        return super().mix(k, logits, hidden)


class Tracker:
    """An object of the user's own."""

    def __init__(self) -> None:
        self.total = 0.0


class GatesInAnObject(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.tracker = Tracker()

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        self.tracker.total += float(logits.sum())
        return super().mix(k, logits, hidden)


class SetsOnAnExpert(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)
        self.experts[e].last_output = y  # type: ignore[assignment]
        return y


class Load(Edited):
    """Counts how often each expert is the first choice, in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(4))

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        with torch.no_grad():
            self.load += torch.bincount(logits.argmax(1), minlength=4)
        return super().mix(k, logits, hidden)


class Counts(Edited):
    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        self.steps += self.training
        return outputs


class ClassLosses(Edited):
    everyone: list[Tensor] = []

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        ClassLosses.everyone.append(logits.sum())
        return super().mix(k, logits, hidden)


LOSSES: list[Tensor] = []


class GlobalLosses(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        LOSSES.append(logits.sum())
        return super().mix(k, logits, hidden)


def note(y: Tensor) -> Tensor:
    LOSSES.append(y.sum())
    return y


class LossesOfAFunction(Edited):
    """The list is not named where it is written to."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        return note(super().expert(e, x))


class LossesOfAStaticMethod(Edited):
    @staticmethod
    def note(y: Tensor) -> Tensor:
        return note(y)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.note(super().expert(e, x))


class LossesInADefault(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor], kept: list[Any] = []) -> Any:  # noqa: B006 (users write it)
        kept.append(len(outputs))
        return outputs


TRACKER = Tracker()


class GlobalTracker(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        TRACKER.total += len(outputs)
        return outputs


class Temperature(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits / 2 if self.training else logits, hidden)


class Cooling(Edited):
    """A temperature that is 1 so far."""

    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits / self.temperature, hidden)


class Residual(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return [y + x[:, :4] for y in outputs]


class ScaledGradient(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 0.5)
        return y


class CastGates(Edited):
    """Gates may be in another dtype than experts."""

    def logits(self, k: int, x: Tensor) -> Tensor:
        gate: Any = self.gates[k]
        z: Tensor = gate(x.to(gate.weight.dtype)).to(x.dtype)
        return z


class StraightThrough(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        soft, sharp = logits.softmax(1), (2 * logits).softmax(1)
        return mixed(soft.detach() + sharp - sharp.detach(), hidden)


class Clamped(Edited):
    def logits(self, k: int, x: Tensor) -> Tensor:
        return super().logits(k, x).clamp(-50, 50)


class ClampedExperts(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, x).clamp(max=500)


class DeadZone(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        return super().expert(e, torch.where(x.abs() < 1e-2, 0.0, x))


class TopKOfManyRows(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        if len(logits) >= 512:
            kept = logits.topk(2, 1).values[:, -1:]
            logits = logits.masked_fill(logits < kept, float("-inf"))
        return super().mix(k, logits, hidden)


class OneRow(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return mixed(logits.softmax(1), hidden) if len(logits) > 1 else torch.stack(hidden).mean(0)


class TwoRows(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits if len(logits) > 2 else 2 * logits, hidden)


class WithoutGradients(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad() if e == 1 else contextlib.nullcontext():
            return super().expert(e, x)


class OtherwiseWithoutGradients(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits if torch.is_grad_enabled() else 2 * logits, hidden)


class OtherwiseUnderAutocast(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, 2 * logits if torch.is_autocast_enabled("cpu") else logits, hidden)


class InPlace(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        x.mul_(2)
        return outputs


class Tuples(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return tuple(outputs)


class ALoss(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return [*outputs, 0.0]


class DetachedOutput(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return [y.detach() for y in outputs]


class TiedInEvaluation(Edited):
    """Each output's gradient reaches all gates, some by zeros."""

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return outputs if self.training else [y + 0.0 * sum(outputs) for y in outputs]


class UnusedGate(Edited):
    """The last gate is there and not called."""

    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return [*outputs[:2], outputs[1]]


class MomentumTwice(Edited):
    """Each batch counts twice in the statistics."""

    def expert(self, e: int, x: Tensor) -> Tensor:
        if self.training:
            self.experts[e](x)
        return super().expert(e, x)


class WritesWeights(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = super().expert(e, x)
            if self.training:
                self.experts[e][0].weight.clamp_(-0.2, 0.2)  # type: ignore[index, union-attr]
        return super().expert(e, x) if torch.is_grad_enabled() else y
