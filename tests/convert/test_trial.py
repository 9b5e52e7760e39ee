"""Copies of library classes that users have edited: what differs from experts, gates and mixing is left alone, with
the reason."""

from __future__ import annotations

import collections
import contextlib
import copy
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from tests.convert import doubles
from tests.convert.doubles import mixed
from tests.convert.models import fill

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


class Temperature(Edited):
    def mix(self, k: int, logits: Tensor, hidden: list[Tensor]) -> Tensor:
        return super().mix(k, logits / 2 if self.training else logits, hidden)


class Residual(Edited):
    def finish(self, x: Tensor, outputs: list[Tensor]) -> Any:
        return [y + x[:, :4] for y in outputs]


class ScaledGradient(Edited):
    def expert(self, e: int, x: Tensor) -> Tensor:
        y = super().expert(e, x)
        if y.requires_grad:
            y.register_hook(lambda gradient: gradient * 0.5)
        return y


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


OUTPUTS = "its outputs differ from those of its experts and gates"
EDITS: dict[str, tuple[Callable[[], Edited], str]] = {
    "detached experts": (Stem, "in evaluation gradients of experts.0.0.weight differ"),
    "detached input of gates": (DetachedGate, "in evaluation gradients of its input differ"),
    "noise on gates in training": (GateNoise, "its forward draws random numbers of its own"),
    "noise of NumPy": (NumpyNoise, "its forward draws random numbers of its own"),
    "noise of Python": (PythonNoise, "its forward draws random numbers of its own"),
    "dropout of a function": (lambda: DroppedLogits(rate=0.3), "its forward draws random numbers of its own"),
    "dropout at another place": (lambda: DroppedElsewhere(rate=0.3), f"in training with dropout {OUTPUTS}"),
    "gates kept": (LastGates, "its forward sets last_gates"),
    "losses in a list": (GatesInAList, "its forward sets losses"),
    "losses in nested containers": (GatesInANestedContainer, "its forward sets kept"),
    "losses in an object": (GatesInAnObject, "its forward sets tracker"),
    "outputs kept on experts": (SetsOnAnExpert, "its forward sets experts.0.last_output"),
    "a buffer": (Load, "its forward leaves another load behind than its parts do"),
    "a count of steps": (Counts, "its forward sets steps"),
    "losses of the class": (ClassLosses, "its forward changes ClassLosses.everyone, which is not its own"),
    "losses in a global list": (GlobalLosses, "its forward changes LOSSES, which is not its own"),
    "a temperature in training": (Temperature, f"in training {OUTPUTS}"),
    "a residual": (Residual, f"in evaluation {OUTPUTS}"),
    "a hook on a tensor": (ScaledGradient, "in evaluation gradients of experts.0.0.weight differ"),
    "a straight-through estimator": (StraightThrough, "in evaluation gradients of gates.0.weight differ"),
    "clamped logits": (Clamped, f"in evaluation with large inputs {OUTPUTS}"),
    "clamped experts": (ClampedExperts, f"in evaluation with large inputs {OUTPUTS}"),
    "small inputs are zero": (DeadZone, f"in training with small inputs {OUTPUTS}"),
    "the best experts of many rows": (TopKOfManyRows, f"in evaluation on many rows {OUTPUTS}"),
    "one row": (OneRow, f"in evaluation on 1 row {OUTPUTS}"),
    "two rows": (TwoRows, f"in training on 2 rows {OUTPUTS}"),
    "an expert without gradients": (
        WithoutGradients,
        "in evaluation gradients of experts.1.0.weight differ: its own code gives none",
    ),
    "otherwise without gradients": (OtherwiseWithoutGradients, f"in evaluation on 1 row {OUTPUTS}"),
    "otherwise under autocast": (OtherwiseUnderAutocast, f"under autocast {OUTPUTS}"),
    "its input is changed": (InPlace, "its forward changes its arguments"),
    "a tuple": (Tuples, f"in evaluation {OUTPUTS}"),
    "another result": (ALoss, f"in evaluation {OUTPUTS}"),
    "outputs without gradients": (DetachedOutput, f"in evaluation {OUTPUTS}"),
    "another gate": (UnusedGate, f"in evaluation {OUTPUTS}"),
    "statistics twice": (
        lambda: MomentumTwice(norm=True),
        "its forward leaves another experts.0.1.running_mean behind than its parts do",
    ),
    "weights clamped": (WritesWeights, "in training its outputs differ"),
}


def described(kind: type) -> None:
    mk.convert.register(
        kind,
        experts=lambda level: level.experts,
        gates=lambda level: level.gates,
        routing=lambda level: mk.Routing.mmoe(len(level.experts), len(level.gates)),
    )


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    described(Edited)
    yield
    LOSSES.clear()
    ClassLosses.everyone.clear()


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_left_alone(name: str) -> None:
    make, reason = EDITS[name]
    model = make()
    report = mk.convert(model)
    assert not report.replaced
    (line,) = report.left_alone
    assert line.detail.startswith(reason)
    assert type(model) is type(make())


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"rate": 0.3}, {"norm": True, "rate": 0.3}])
def test_without_an_edit_it_is_converted(options: dict[str, Any]) -> None:
    assert mk.convert(Edited(**options)).replaced


def test_frozen_experts_keep_no_gradient() -> None:
    model = Edited()
    model.experts[1].requires_grad_(False)
    model.gates[0].weight.requires_grad_(False)
    assert mk.convert(model).replaced
    torch.stack(model(torch.randn(7, WIDTH))).sum().backward()
    frozen = {name for name, p in model.named_parameters() if p.grad is None}
    assert frozen == {"gates.0.weight", *(f"experts.1.{i}.{part}" for i in (0, 4) for part in ("weight", "bias"))}


def test_what_the_user_has_stays() -> None:
    """Weights, modes, attributes, and the state of every generator, whatever the forward does."""
    for make, _ in EDITS.values():
        model = make()
        model.experts[0].eval()
        before = copy.deepcopy(model)
        draws = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        threads = torch.get_num_threads()
        mk.convert(model)
        after = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
        assert torch.equal(after[0], draws[0])
        assert after[1:] == draws[1:]
        assert torch.get_num_threads() == threads
        assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
        assert vars(model).keys() == vars(before).keys()
        torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
        assert not model.losses
        assert not LOSSES
        assert not ClassLosses.everyone
        assert all(p.grad is None for p in model.parameters())


def test_a_module_that_has_run_is_tried() -> None:
    """What it keeps of its last call cannot be copied as it is."""
    model = LastGates()
    model(torch.randn(3, WIDTH))
    assert mk.convert(model).left_alone[0].detail == "its forward sets last_gates"
    plain = Edited()
    plain.note = plain.gates[0](torch.randn(3, WIDTH))
    assert mk.convert(plain).replaced


def test_a_trial_draws_no_weights_where_they_are() -> None:
    """On the meta device every copy of a weight would be one more without values."""
    assert mk.convert(Edited(norm=True).to("meta")).replaced


# Each edit of a copied library class by its name; the lines are those of the libraries' own code.


class DetachingLayer(doubles.CGC_Layer):
    """FuxiCTR's layer with STEM's gates."""

    def forward(self, x: list[Tensor], require_gate: bool = False) -> Any:
        shared = [expert(x[-1]) for expert in self.shared_experts]
        weights = [self.gate_activation(gate(stream)) for gate, stream in zip(self.gate, x, strict=True)]
        seen = [
            [expert(s) for expert in task] + [y.detach() for y in shared]
            for s, task in zip(x, self.specific_experts, strict=False)
        ]
        outputs = [mixed(w, experts) for w, experts in zip(weights, [*seen, shared], strict=True)]
        return (outputs, [w.mean(0) for w in weights]) if require_gate else outputs


DetachingLayer.__name__ = "CGC_Layer"


def test_a_library_class_with_detached_experts() -> None:
    (line,) = mk.convert(DetachingLayer(WIDTH, (5, 4))).left_alone
    assert line.detail == "in evaluation gradients of shared_experts.0.mlp.0.weight differ"


@pytest.mark.parametrize("norm", [False, True])
def test_a_last_shared_gate_keeps_no_gradient(norm: bool) -> None:
    """FuxiCTR's last level mixes for its shared gate too, and its model drops the result."""
    models = [fill(doubles.CGC_Layer(WIDTH, (5, 4), norm=norm)) for _ in range(2)]
    assert mk.convert(models[1]).replaced
    generator = torch.Generator().manual_seed(0)
    streams = [torch.randn(300, WIDTH, generator=generator) for _ in range(4)]
    found = []
    for model in models:
        sum(y.square().sum() for y in model(streams)[:-1]).backward()
        found.append({name for name, p in model.named_parameters() if p.grad is None})
    assert found[0] == found[1] == {name for name, _ in models[0].named_parameters() if name.startswith("gate.3.")}
