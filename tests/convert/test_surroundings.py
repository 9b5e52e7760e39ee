"""Dtypes, checkpoints, arguments and what becomes of a module later: what a trial in float64 does not show."""

from __future__ import annotations

import copy
import itertools
import pickle
import sys
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk
from mtlkernels._convert import trial
from tests.convert import doubles, models
from tests.convert.doubles import CGC
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree

T = TypeVar("T")


class Router(Level):
    """In float32 under autocast, as routers often are."""

    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
        with torch.autocast("cpu", enabled=False):
            shares = [gate(x).softmax(1) for gate in self.gates]
        return [(w.unsqueeze(2) * hidden).sum(1) for w in shares]


class Narrow(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x)


class Wide(Level):
    def weigh(self, z: Tensor) -> Tensor:
        return (z.float() if z.dtype is torch.bfloat16 else z).softmax(1)


class Checkpointed(Level):
    def forward(self, x: Tensor) -> list[Tensor]:
        hidden = torch.stack([checkpoint(expert, x, use_reentrant=False) for expert in self.experts], dim=1)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]


@pytest.mark.parametrize("kind", [Narrow, Wide, Checkpointed])
def test_what_float64_does_not_show(kind: type) -> None:
    register(kind)
    assert mk.convert(kind()).left_alone


def test_a_router_in_float32_is_its_own_code_under_autocast() -> None:
    register(Router)
    level = Router()
    with torch.autocast("cpu", torch.bfloat16):
        expected = level(X)
        (line,) = mk.convert(level).replaced
        torch.testing.assert_close(level(X), expected, rtol=0, atol=0)
    assert line.detail.endswith(
        "its own code under autocast: in evaluation in float32 under autocast its outputs are float32, but bfloat16"
        " fused"
    )


def test_a_gate_of_equal_shares_under_autocast() -> None:
    """The logits of the others have another dtype there."""
    routing = mk.Routing((0,) * 4, ((0, 1, 2, 3),) * 3 + ((0, 1),))

    class WithMean(Level):
        def forward(self, x: Tensor) -> list[Tensor]:
            hidden = torch.stack([expert(x) for expert in self.experts], dim=1)
            mixed = [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate in self.gates]
            return [*mixed, hidden[:, :2].mean(1)]

    gates: Callable[[Any], Any] = lambda model: [*model.gates, None]  # noqa: E731
    mk.convert.register(WithMean, experts=lambda model: model.experts, gates=gates, routing=lambda model: routing)
    plain = WithMean()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    with torch.autocast("cpu", torch.bfloat16):
        for y, right in zip(model(X), plain(X), strict=True):
            torch.testing.assert_close(y, right, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    "looking", [lambda: FlopCounterMode(display=False), forward_ad.dual_level], ids=["FlopCounterMode", "dual level"]
)
# Forward-mode differentiation is made of torch.jit.script.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_conversion_while_somebody_looks_on(looking: Any) -> None:
    """The trial sees then what others see: what only unused outputs depend on has no gradient there either."""
    with looking():
        report = mk.convert(models.rechub_ple(tasks=2, levels=1, specific=1, shared=1, dims=(4,)))
    assert report.replaced and not report.left_alone


class OfAnything(Level):
    def forward(self, x: Any) -> list[Tensor]:
        return super().forward(torch.cat([*x.values()], 1) if isinstance(x, dict) else torch.as_tensor(x))


class OfStreams(Level):
    def forward(self, xs: Any) -> list[Tensor]:
        streams = list(xs)
        hidden = torch.stack([expert(x) for expert, x in zip(self.experts, streams, strict=True)], dim=1)
        gates = zip(self.gates, streams, strict=False)
        return [(gate(x).softmax(1).unsqueeze(2) * hidden).sum(1) for gate, x in gates]


def test_arguments_of_other_kinds() -> None:
    register(OfAnything)
    plain = OfAnything()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    for given in ({"a": X[:, :4], "b": X[:, 4:]}, X.tolist()):
        for y, right in zip(model(given), plain(given), strict=True):
            torch.testing.assert_close(y, right)


def test_streams_of_other_kinds() -> None:
    routing = mk.Routing((0, 1, 2, 3), ((0, 1, 2, 3),) * 3)
    experts: Callable[[Any], Any] = lambda model: model.experts  # noqa: E731
    mk.convert.register(OfStreams, experts=experts, gates=lambda model: model.gates, routing=lambda model: routing)
    plain = OfStreams()
    model = copy.deepcopy(plain)
    assert mk.convert(model).replaced
    makers: list[Callable[[], Any]] = [
        lambda: [X] * 4,
        lambda: dict.fromkeys(range(4), X).values(),
        lambda: (X for _ in range(4)),
        lambda: itertools.repeat(X, 4),
    ]
    for make in makers:
        for y, right in zip(model(make()), plain(make()), strict=True):
            torch.testing.assert_close(y, right)


def test_a_parametrization_that_is_removed_later() -> None:
    register(Level)
    model = Level()
    parametrizations.spectral_norm(model.gates[0])
    assert mk.convert(model).replaced
    model.eval()
    parametrize.remove_parametrizations(model.gates[0], "weight")
    agree(pickle.loads(pickle.dumps(model)), model)


def test_experts_whose_first_matrix_is_of_a_parametrization() -> None:
    register(Level)
    model = Level()
    for expert in model.experts:
        parametrizations.weight_norm(expert[0])
    plain = copy.deepcopy(model)
    assert mk.convert(model).lines[0].action == "mixing fused"
    agree(model, plain)


def test_lists_of_subclasses_stay_as_they_are() -> None:
    known: list[str] = []

    class Listed(Level):
        def __init_subclass__(cls, **options: Any) -> None:
            super().__init_subclass__(**options)
            known.append(cls.__name__)

    class Own(Listed):
        pass

    register(Own)
    assert mk.convert(Own()).replaced and known == ["Own"]


class Wrapped(Level):
    """In the place of a class that somebody makes of a converted one: its name is the subclass's."""


def test_a_class_that_was_made_of_a_converted_one_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its own name, as such classes are."""
    register(Level)
    model = Level()
    mk.convert(model)
    kind = type("Wrapped", (type(model),), {"__module__": __name__})
    monkeypatch.setattr(sys.modules[__name__], "Wrapped", kind)
    model.__class__ = kind
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is kind
        agree(other, model)


class Reversed(Level):
    """Described by itself, beside the class below it."""

    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x)[::-1]


def test_the_nearest_description_counts() -> None:
    parts: dict[str, Any] = {"experts": lambda model: model.experts, "routing": lambda model: mk.Routing.mmoe(4, 3)}
    mk.convert.register(Level, gates=lambda model: model.gates, **parts)
    mk.convert.register(Reversed, gates=lambda model: list(model.gates)[::-1], **parts)
    model = Reversed()
    own = copy.deepcopy(model)
    assert mk.convert(model).replaced
    agree(model, own)


def test_another_thread_that_draws_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not taken for the module; one that keeps drawing is."""
    own, moved = trial.random_state, [True]
    monkeypatch.setattr(trial, "random_state", lambda: object() if moved and moved.pop() else own())
    (line,) = mk.convert(doubles.ExtractionNet(8, (4,), tasks=2)).lines
    assert line.action == "replaced" and not moved
    monkeypatch.setattr(trial, "random_state", object)
    (line,) = mk.convert(doubles.ExtractionNet(8, (4,), tasks=2)).lines
    assert line.action == "left alone" and line.detail == "its forward draws random numbers of its own"


def test_a_class_keeps_the_bases_that_code_looks_for() -> None:
    """As LibMTL's weightings do, which are mixed into a class and ask whether they are among its bases."""

    class Weighting:
        def named(self) -> list[str]:
            return [base.__name__ for base in type(self).__bases__]

    class Mixed(CGC, Weighting, Generic[T]):
        pass

    model = Mixed(16, (32, 16))
    order = [kind.__name__ for kind in type(model).__mro__]
    assert "replaced" in str(mk.convert(model))
    assert {"CGC", "Weighting"} <= set(model.named())
    converted = [kind.__name__ for kind in type(model).__mro__]
    assert [name for name in converted if name in order] == order
