"""Copies of library classes that users have edited: what differs from experts, gates and mixing is left alone, with
the reason."""

from __future__ import annotations

import copy
import pickle
import random
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from mtlkernels._convert.classes import OWN_UNDER_AUTOCAST
from tests.convert import doubles
from tests.convert.doubles import mixed
from tests.convert.edits import (
    LOSSES,
    TRACKER,
    WIDTH,
    ALoss,
    CastGates,
    Clamped,
    ClampedExperts,
    ClassLosses,
    Cooling,
    Counts,
    DeadZone,
    DetachedGate,
    DetachedOutput,
    DroppedElsewhere,
    DroppedLogits,
    Edited,
    GateNoise,
    GatesInAList,
    GatesInANestedContainer,
    GatesInAnObject,
    GlobalLosses,
    GlobalTracker,
    InPlace,
    LastGates,
    Load,
    LossesInADefault,
    LossesOfAFunction,
    LossesOfAStaticMethod,
    MomentumTwice,
    NumpyNoise,
    OneRow,
    OtherwiseUnderAutocast,
    OtherwiseWithoutGradients,
    PythonNoise,
    Residual,
    ScaledGradient,
    SetsOnAnExpert,
    Stem,
    StraightThrough,
    Temperature,
    TiedInEvaluation,
    TopKOfManyRows,
    Tuples,
    TwoRows,
    UnusedGate,
    WithoutGradients,
    WritesWeights,
)
from tests.convert.models import fill, mmoe
from tests.convert.test_edits import register
from tests.convert.weighing import Level

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
    "losses in a global list, by a function": (
        LossesOfAFunction,
        "its forward changes LOSSES, which is not its own",
    ),
    "losses in a global list, by a static method": (
        LossesOfAStaticMethod,
        "its forward changes LOSSES, which is not its own",
    ),
    "a list that is a default": (
        LossesInADefault,
        "its forward changes a default of finish, which is not its own",
    ),
    "a global object": (GlobalTracker, "its forward changes TRACKER, which is not its own"),
    "a temperature in training": (Temperature, f"in training {OUTPUTS}"),
    "a temperature that may change": (
        Cooling,
        f"in training with another temperature {OUTPUTS}",
    ),
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
    "its input is changed": (InPlace, "its forward changes its arguments"),
    "a tuple": (Tuples, f"in evaluation {OUTPUTS}"),
    "another result": (ALoss, f"in evaluation {OUTPUTS}"),
    "outputs without gradients": (DetachedOutput, f"in evaluation {OUTPUTS}"),
    "outputs of one another in evaluation": (
        TiedInEvaluation,
        "in evaluation gradients of gates.1.weight differ: the fused way gives none",
    ),
    "another gate": (UnusedGate, f"in evaluation {OUTPUTS}"),
    "statistics twice": (
        lambda: MomentumTwice(norm=True),
        "its forward leaves another experts.0.1.running_mean behind than its parts do",
    ),
    "weights clamped": (WritesWeights, "in training its outputs differ"),
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})
    register(Edited)
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


def test_what_differs_under_autocast_alone_is_fused_elsewhere() -> None:
    model = OtherwiseUnderAutocast().eval()
    x = torch.randn(9, model.gates[0].in_features)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    (line,) = mk.convert(model).replaced
    assert line.detail.endswith(f"in one expert_mixture; its own code under autocast: under autocast {OUTPUTS}")
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(other(x), expected, rtol=0, atol=0)
    assert mk.revert(model).reverted
    assert OWN_UNDER_AUTOCAST not in vars(model)


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
        assert not LossesInADefault.finish.__defaults__[0]  # type: ignore[index]
        assert TRACKER.total == 0
        assert not ClassLosses.everyone
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(("norm", "fused"), [(nn.LayerNorm, [4]), (nn.BatchNorm1d, [])])
def test_a_norm_that_experts_share_since_the_conversion(
    norm: type[nn.Module], fused: list[int], fused_calls: list[int]
) -> None:
    """A batch norm takes one expert's batch after another to its statistics, which a fused call does not."""
    model = Edited()
    for expert in model.experts:
        expert[1] = norm(5)
    fill(model)
    plain = copy.deepcopy(model)
    assert mk.convert(model).replaced
    for other in (model, plain):
        other.experts[2][1] = other.experts[0][1]
    x = torch.randn(200, WIDTH)  # of fewer a layer norm's experts are called
    fused_calls.clear()
    for found, expected in zip(model(x), plain(x), strict=True):
        torch.testing.assert_close(found, expected)
    assert fused_calls == fused
    for (name, found), expected in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)


def test_what_hooks_keep_stays() -> None:
    """A trial calls the hooks of copies."""
    seen: list[Any] = []
    model = Edited()
    model.register_forward_hook(lambda *args: seen.append(len(args)))
    assert mk.convert(model).replaced
    assert not seen
    model(torch.randn(3, WIDTH))
    assert seen == [3]


def test_what_an_instances_own_forward_keeps_stays() -> None:
    """Of a part that is called fused too."""
    model = mmoe()
    seen: list[int] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        seen.append(len(x))
        y: Tensor = type(self).forward(self, x)
        return y

    model.tower_dnn[0].forward = types.MethodType(forward, model.tower_dnn[0])
    (line,) = mk.convert(model).left_alone
    assert line.detail == "its forward changes seen, which is not its own"
    assert not seen


def test_parameters_of_several_dtypes_are_left_alone() -> None:
    model = CastGates().bfloat16()
    model.gates.float()
    (line,) = mk.convert(model).left_alone
    assert line.detail == "its parameters are of several dtypes"


@pytest.mark.parametrize("part", ["gates", "experts"])
def test_parameters_that_get_another_dtype_later(part: str) -> None:
    """The trial, all in float64, says nothing about casts."""
    model = CastGates()
    assert mk.convert(model).replaced
    for module in getattr(model, part):
        module.bfloat16()
    x = torch.randn(9, WIDTH, dtype=torch.float32 if part == "gates" else torch.bfloat16)
    found = model(x)
    mk.revert(model)
    torch.testing.assert_close(found, model(x), rtol=0, atol=0)


class Widened(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [y.double() for y in super().forward(x)]


def test_outputs_of_another_dtype() -> None:
    """Which all are in a trial in float64."""
    register(Widened)
    (line,) = mk.convert(Widened()).left_alone
    assert line.detail == "in evaluation in float32 its outputs are float64, but float32 fused"


def test_a_norm_of_another_dtype() -> None:
    """PyTorch's takes bfloat16 where its parameters are in float32."""
    model = Edited(norm=True).bfloat16()
    other = copy.deepcopy(model)
    for each in (model, other):
        if each is other:
            assert mk.convert(other).replaced
        for expert in each.experts:
            expert[1].float()  # type: ignore[index]
    x = torch.randn(200, WIDTH, dtype=torch.bfloat16)
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)
    assert mk.convert(model).left_alone[0].detail == "its parameters are of several dtypes"


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
