"""What becomes another after a conversion: settings, gates' softmaxes, lists of parts."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert.paying import FORCE
from tests.convert.models import by_name, features, mmoe, ple, rechub_mmoe
from tests.convert.test_edits import register
from tests.convert.weighing import Level, agree


@dataclasses.dataclass
class Config:
    temperature: float = 1.0


class InEvaluation(Level):
    temperature = 1.0

    def weigh(self, z: Tensor) -> Tensor:
        return (z if self.training else z / self.temperature).softmax(1)


class Validated(Level):
    def prepare(self) -> None:
        self.temperature = 1.0

    def weigh(self, z: Tensor) -> Tensor:
        if not 0 < self.temperature <= 1:
            raise ValueError("temperature must be in (0, 1]")
        return (z / self.temperature).softmax(1)


class Configured(Level):
    def prepare(self) -> None:
        self.config = Config()

    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.config.temperature).softmax(1) if self.config.temperature < 1 else z.softmax(1)


class Clipped(Level):
    def prepare(self) -> None:
        self.most = float("inf")

    def weigh(self, z: Tensor) -> Tensor:
        return z.softmax(1) if self.most > 0.2 else z.clamp(-self.most, self.most).softmax(1)


class Scheduled(Level):
    def prepare(self) -> None:
        self.epoch, self.weights = 0, [1.0, 1.0]

    @property
    def temperature(self) -> float:
        return max(0.1, 1 - 0.1 * self.epoch)

    def weigh(self, z: Tensor) -> Tensor:
        return (
            (z / self.temperature * self.weights[0]).softmax(1) if self.epoch or self.weights[0] < 1 else z.softmax(1)
        )


class Masked(Level):
    def prepare(self) -> None:
        self.mask: Tensor | None = None
        self.uniform = False

    def weigh(self, z: Tensor) -> Tensor:
        if self.uniform:
            return torch.full_like(z, 0.25)
        return (z if self.mask is None else z.masked_fill(self.mask, -1e9)).softmax(1)


class WithActivation(Level):
    def prepare(self) -> None:
        self.activation: nn.Module = nn.Softmax(dim=1)

    def weigh(self, z: Tensor) -> Tensor:
        return self.activation(z)  # type: ignore[no-any-return]


LATER: dict[str, tuple[type, Callable[[Any], object]]] = {
    "a number that is looked at": (Validated, lambda model: setattr(model, "temperature", 0.2)),
    "a number in an object": (Configured, lambda model: setattr(model.config, "temperature", 0.2)),
    "another object": (Configured, lambda model: setattr(model, "config", Config(0.2))),
    "an infinite number": (Clipped, lambda model: setattr(model, "most", 0.1)),
    "a whole number": (Scheduled, lambda model: setattr(model, "epoch", 8)),
    "a number in a list": (Scheduled, lambda model: model.weights.__setitem__(0, 0.5)),
    "a flag": (Masked, lambda model: setattr(model, "uniform", True)),
    "a mask": (Masked, lambda model: setattr(model, "mask", torch.tensor([True, False, False, False]))),
    "a part that nobody reads": (WithActivation, lambda model: setattr(model, "activation", nn.Sigmoid())),
    "a method": (Level, lambda model: setattr(model, "weigh", torch.sigmoid)),
}


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: model, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("name", LATER)
def test_another_setting_brings_its_own_code_back(name: str, copied: Any, fused_calls: list[int]) -> None:
    kind, change = LATER[name]
    register(kind)
    plain = kind().eval()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    model = copied(model)
    fused_calls.clear()
    agree(model, plain)
    assert fused_calls
    change(model)
    change(plain)
    fused_calls.clear()
    agree(model, plain)
    assert not fused_calls


def test_a_level_with_another_setting_is_tried_again() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model)
    assert "already converted" in str(mk.convert(model))
    model.mask = torch.tensor([True, False, False, False])
    assert mk.convert(model).left_alone and type(model) is Masked
    model.mask = None
    assert mk.convert(model).replaced


def test_a_level_that_is_tried_again_stays_forced() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model, force=True)
    model.uniform = 0  # type: ignore[assignment]
    assert mk.convert(model).replaced and FORCE in vars(model)
    mk.revert(model)
    assert mk.convert(model).replaced and FORCE not in vars(model)


def test_a_class_that_was_made_of_a_converted_one_stays() -> None:
    register(Masked)
    model = Masked()
    mk.convert(model)
    wrapped = type("Wrapped", (type(model),), {})
    model.__class__ = wrapped
    model.uniform = True
    assert "already converted" in str(mk.convert(model)) and type(model) is wrapped


class OfTensor(Level):
    def prepare(self) -> None:
        self.temperature = torch.tensor(1.0)

    def weigh(self, z: Tensor) -> Tensor:
        return (z / self.temperature).softmax(1)


@pytest.mark.parametrize("kind", [InEvaluation, OfTensor])
def test_settings_that_a_trial_changes(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


def test_a_class_that_is_gone_is_gone() -> None:
    """As of a function that defines a class for each trial of a search."""

    def converted() -> tuple[Any, ...]:
        held = torch.zeros(3)

        class Own(type(rechub_mmoe())):  # type: ignore[misc]
            def extra(self) -> Tensor:
                return held

        model = rechub_mmoe()
        model.__class__ = Own
        assert mk.convert(model).replaced
        model(by_name(features(5).float()))
        return weakref.ref(Own), weakref.ref(held)

    trials = [converted() for _ in range(4)]
    gc.collect()
    assert all(ref() is None for refs in trials[:-1] for ref in refs)  # Python itself may hold the last


class OwnSoftmax(Level):
    """Its gates end with a softmax."""

    def prepare(self) -> None:
        self.gates = nn.ModuleList(nn.Sequential(gate, nn.Softmax(dim=1)) for gate in self.gates)

    def weigh(self, z: Tensor) -> Tensor:
        return z


class NoSoftmax(Level):
    """Its gates could have one more module."""

    def prepare(self) -> None:
        self.gates = nn.ModuleList(nn.Sequential(gate) for gate in self.gates)


# What makes a model, a gate's modules, and what is done to them.
SOFTMAXES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], object]]] = {
    "a sigmoid": (OwnSoftmax, lambda model: model.gates[0], lambda gate: gate.__setitem__(1, nn.Sigmoid())),
    "an identity": (OwnSoftmax, lambda model: model.gates[0], lambda gate: gate.__setitem__(1, nn.Identity())),
    "none": (OwnSoftmax, lambda model: model.gates[0], lambda gate: gate.__delitem__(1)),
    "one more": (NoSoftmax, lambda model: model.gates[0], lambda gate: gate.append(nn.Softmax(dim=1))),
    "a library's, a sigmoid": (
        rechub_mmoe, lambda model: model.gates[0].mlp, lambda gate: gate.__setitem__(2, nn.Sigmoid()),
    ),
    "a library's, an identity": (
        rechub_mmoe, lambda model: model.gates[0].mlp, lambda gate: gate.__setitem__(2, nn.Identity()),
    ),
    "a library's, none": (rechub_mmoe, lambda model: model.gates[0].mlp, lambda gate: gate.__delitem__(2)),
}  # fmt: skip


def with_softmax(name: str) -> tuple[Any, Callable[[Any], dict[str, nn.Module]]]:
    """A model, and an edit of one like it, which gives what the gate held before."""
    make, gate_of, edit = SOFTMAXES[name]

    def change(model: Any) -> dict[str, nn.Module]:
        gate = gate_of(model)
        before = dict(gate._modules)
        edit(gate)
        return before

    if make is not rechub_mmoe:
        register(make)  # type: ignore[arg-type]
    return make(), change


def restore(name: str, model: Any, before: dict[str, nn.Module]) -> None:
    gate = SOFTMAXES[name][1](model)
    gate._modules.clear()
    gate._modules.update(before)


def assert_same(model: Any, plain: Any, rows: int = 300) -> None:
    x = features(rows).float()
    for y, right in zip(model(by_name(x)), plain(by_name(x)), strict=True):
        torch.testing.assert_close(y, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SOFTMAXES)
def test_softmaxes_of_gates(name: str, training: bool, fused_calls: list[int]) -> None:
    """Its own code runs from the next call on, until the edit is taken back."""
    plain, change = with_softmax(name)
    model = copy.deepcopy(plain.train(training))
    assert mk.convert(model).replaced
    compare = agree if isinstance(plain, Level) else assert_same
    compare(model, plain)
    assert fused_calls
    fused_calls.clear()
    before, before_plain = change(model), change(plain)
    for _ in range(3):
        compare(model, plain)
    assert not fused_calls
    restore(name, model, before)
    restore(name, plain, before_plain)
    compare(model, plain)
    assert fused_calls


@pytest.mark.parametrize("name", SOFTMAXES)
def test_a_model_with_another_softmax_is_tried_again(name: str) -> None:
    model, change = with_softmax(name)
    kind = type(model)
    mk.convert(model)
    assert "already converted" in str(mk.convert(model))
    before = change(model)
    assert mk.convert(model).left_alone and type(model) is kind
    restore(name, model, before)
    assert mk.convert(model).replaced


# Lists whose modules deepctr-torch takes by their numbers.
LISTS = {
    "mmoe": (mmoe, (
        "expert_dnn", "expert_dnn.1.linears", "expert_dnn.1.bn", "expert_dnn.1.activation_layers", "gate_dnn",
        "gate_dnn_final_layer", "tower_dnn", "tower_dnn_final_layer", "out",
    )),
    "ple": (ple, (
        "specific_experts", "specific_experts.0", "specific_experts.1.2", "specific_experts.0.1.0.linears",
        "shared_experts", "shared_experts.1.0", "specific_gate_dnn", "specific_gate_dnn.0",
        "specific_gate_dnn_final_layer", "specific_gate_dnn_final_layer.1", "shared_gate_dnn",
        "shared_gate_dnn_final_layer", "tower_dnn", "tower_dnn_final_layer", "out",
    )),
}  # fmt: skip


@pytest.mark.parametrize("kind", LISTS)
def test_the_order_of_keys(kind: str, fused_calls: list[int]) -> None:
    """A module that is taken away and put back is the last of its list, and keeps its number."""
    (make, paths), x = LISTS[kind], features(300).float()
    model = make(dnn_use_bn=True, dnn_activation="prelu").eval()
    expected = model(x)
    assert mk.convert(model).replaced
    for path in paths:
        parts = model.get_submodule(path)
        whole = dict(parts._modules)
        part = getattr(parts, "0")
        delattr(parts, "0")
        setattr(parts, "0", part)
        assert list(parts._modules)[-1] == "0"
        fused_calls.clear()
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        assert len(fused_calls) == (2 if make is ple else 1), path
        parts._modules.clear()
        parts._modules.update(whole)


@pytest.mark.parametrize(
    "make, name",
    [
        (rechub_mmoe, "towers"),
        (rechub_mmoe, "predict_layers"),
        (mmoe, "tower_dnn"),
        (mmoe, "tower_dnn_final_layer"),
        (mmoe, "out"),
    ],
)
def test_one_more_than_tasks(make: Callable[[], Any], name: str, fused_calls: list[int]) -> None:
    """It is left out, as by the library's own code."""
    plain, rows = make().eval(), features(300).float()
    x: Any = by_name(rows) if make is rechub_mmoe else rows
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    for each in (model, plain):
        parts = getattr(each, name)
        parts.append(copy.deepcopy(parts[0]))
    fused_calls.clear()
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    assert fused_calls
