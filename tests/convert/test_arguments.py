"""Arguments that no trial gave: only a description's streams go the fused way, so the model's own code has to run."""

from __future__ import annotations

import copy
import enum
import pickle
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels._convert import registry
from tests.convert import doubles
from tests.convert.models import fill
from tests.convert.weighing import Level, X

SCALE = torch.full((3,), 2.0)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is forgotten afterwards."""
    monkeypatch.setattr(registry, "_registered", {})


class Scaled(Level):
    """Which multiplies what it returns by a number, or a tensor, or returns another type."""

    def heads(self, mixed: Any) -> Tensor:
        return torch.stack([y.sum(1) for y in mixed], 1)

    def forward(  # type: ignore[override]
        self, x: Tensor, scale: Any = None, *others: Any, wide: bool = False, power: int = 1, **more: Any
    ) -> Tensor:
        y = self.heads(super().forward(x))
        for factor in (scale, *others, *more.values()):
            y = y if factor is None else y * factor
        return y.double() if wide else y**power


def x_alone(model: Any, x: Tensor) -> Tensor:
    return x


def all_of_them(model: Any, x: Tensor, scale: Any = None, *others: Any, **more: Any) -> Tensor:
    return x


def convert(example: Callable[[int], tuple[Any, ...]], inputs: Any = all_of_them) -> tuple[Any, Any]:
    """A model that is converted, and one that is not."""
    mk.convert.register(
        Scaled,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        inputs=inputs,
        outputs=Scaled.heads,
        example=lambda model, rows: example(rows),
    )
    own = Scaled()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    return model, own


def rows_alone(rows: int) -> tuple[Any, ...]:
    return (torch.randn(rows, 8),)


CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], bool]] = {
    "as tried": ((X,), {}, True),
    "by name": ((), {"x": X}, True),
    "the default": ((X, None), {}, True),
    "defaults by name": ((X,), {"scale": None, "wide": False, "power": 1}, True),
    "a number": ((X, 5.0), {}, False),
    "a number by name": ((X,), {"scale": 5.0}, False),
    "all by name": ((), {"scale": 5.0, "x": X}, False),
    "a tensor": ((X, SCALE), {}, False),
    "one more": ((X, None, 3.0), {}, False),
    "a flag": ((X,), {"wide": True}, False),
    "a whole number": ((X,), {"power": 2}, False),
    "a number that is equal": ((X,), {"power": 1.0}, False),
    "a name of any": ((X,), {"another": 3.0}, False),
}


@pytest.mark.parametrize("inputs", [x_alone, all_of_them])
@pytest.mark.parametrize("call", CALLS)
def test_an_argument_that_no_trial_gave(call: str, inputs: Any, fused_calls: list[int]) -> None:
    args, kwargs, fused = CALLS[call]
    model, own = convert(rows_alone, inputs)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fused_calls.clear()
        torch.testing.assert_close(each(*args, **kwargs), own(*args, **kwargs))
        assert bool(fused_calls) == fused


def test_arguments_that_the_method_refuses() -> None:
    """It says so itself, not the description."""
    model, _ = convert(rows_alone, x_alone)
    with pytest.raises(TypeError, match=r"forward\(\) missing 1 required positional argument: 'x'"):
        model()
    with pytest.raises(TypeError, match=r"forward\(\) got multiple values for argument 'x'"):
        model(X, x=X)


@pytest.mark.parametrize(("scale", "fused"), [(None, True), (5.0, False), (SCALE, False)])
def test_none_is_all_that_a_trial_gave(scale: Any, fused: bool, fused_calls: list[int]) -> None:
    """As labels that only training has."""
    model, own = convert(lambda rows: (torch.randn(rows, 8), None), lambda model, x, scale: x)
    torch.testing.assert_close(model(X, scale), own(X, scale))
    assert bool(fused_calls) == fused
    fused_calls.clear()
    model(X)  # inputs has no default
    assert not fused_calls


def test_a_flag_that_a_trial_gave(fused_calls: list[int]) -> None:
    """Also where it is not the default, which no trial has shown then."""
    model, own = convert(lambda rows: (torch.randn(rows, 8), True), lambda model, x, scale=None: x)
    for args, fused in (((X, True), True), ((X, False), False), ((X,), False)):
        fused_calls.clear()
        torch.testing.assert_close(model(*args), own(*args))
        assert bool(fused_calls) == fused


class Reduction(enum.Enum):
    NONE = 0
    MEAN = 1


class Worded(Level):
    """Which returns something else when it is asked to, by a word or by a member of an Enum."""

    def forward(self, x: Tensor, reduction: str | Reduction = "none") -> list[Tensor]:
        found = super().forward(x)
        return [y.mean(1) for y in found] if reduction in ("mean", Reduction.MEAN) else found


@pytest.mark.parametrize(("word", "other"), [("none", "mean"), (Reduction.NONE, Reduction.MEAN)])
def test_a_word_that_a_trial_gave(word: Any, other: Any, fused_calls: list[int]) -> None:
    """Any other makes its own code run, also in copies and pickles."""
    mk.convert.register(
        Worded,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        inputs=lambda model, x, reduction: x,
        example=lambda model, rows: (torch.randn(rows, 8), word),
    )
    own = Worded()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for given, fused in ((word, True), (other, False)):
            fused_calls.clear()
            torch.testing.assert_close(each(X, given), own(X, given))
            assert bool(fused_calls) == fused


class ByTask(Level):
    """Which returns one task's mixture, by its number."""

    def forward(self, x: Tensor, task: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)[int(task)]


@pytest.mark.parametrize("kind", [int, float, numpy.int64, numpy.float32])
def test_a_number_that_all_trials_gave(kind: Any, fused_calls: list[int]) -> None:
    """No trial has shown what another one does."""
    mk.convert.register(
        ByTask,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        inputs=lambda model, x, task: x,
        arguments=lambda model, streams: (streams[0], kind(0)),
        outputs=lambda model, mixed: mixed[0],
    )
    own = ByTask()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for task in range(3):
            for args, kwargs in (((X, kind(task)), {}), ((X,), {"task": kind(task)})):
                fused_calls.clear()
                torch.testing.assert_close(each(*args, **kwargs), own(*args, **kwargs))
                assert bool(fused_calls) == (task == 0)


def of_rows(rows: int) -> int:
    return rows


def at_random(rows: int) -> float:
    return torch.rand(()).item()


@pytest.mark.parametrize("number", [of_rows, at_random])
def test_a_number_that_differs_between_trials(number: Callable[[int], Any], fused_calls: list[int]) -> None:
    """As a batch size or a weight: the description has shown that it takes any."""
    mk.convert.register(
        Masked,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        inputs=lambda model, x, mask: x * mask,
        example=lambda model, rows: (torch.randn(rows, 8), number(rows)),
    )
    own = Masked()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    for given in (7, 0.25):
        fused_calls.clear()
        torch.testing.assert_close(model(X, given), own(X, given))
        assert fused_calls


class Masked(Level):
    def forward(self, x: Tensor, mask: Tensor | float | None = None) -> list[Tensor]:
        return super().forward(x if mask is None else x * mask)


def test_an_argument_that_a_trial_gave_may_be_left_out(fused_calls: list[int]) -> None:
    """Where inputs has a default for it."""
    mk.convert.register(
        Masked,
        experts=lambda model: model.experts,
        gates=lambda model: model.gates,
        routing=lambda model: mk.Routing.mmoe(4, 3),
        inputs=lambda model, x, mask=None: x if mask is None else x * mask,
        example=lambda model, rows: (torch.randn(rows, 8), torch.rand(rows, 8)),
    )
    own = Masked()
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    for call in ({"x": X}, {"x": X, "mask": None}, {"mask": X.abs(), "x": X}):
        fused_calls.clear()
        torch.testing.assert_close(model(**call), own(**call))
        assert fused_calls


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("call", ["as tried", "by name", "defaults by name", "a number by name", "a tensor"])
def test_compiled_in_one_graph(call: str, fused_calls: list[int]) -> None:
    args, kwargs, fused = CALLS[call]
    model, own = convert(rows_alone, x_alone)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args, **kwargs), own(*args, **kwargs))
    assert bool(fused_calls) == fused


class MMoEModel(doubles.MMoEModel):
    """MTReclib's with an argument more, as its user may have edited it."""

    def forward(self, categorical_x: Tensor, numerical_x: Tensor, scale: float = 1.0) -> list[Tensor]:  # type: ignore[override]
        return [scale * y for y in super().forward(categorical_x, numerical_x)]


def test_a_known_class_with_an_argument_more(fused_calls: list[int]) -> None:
    own = fill(MMoEModel())
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    given = torch.zeros(300, model.FIELDS, dtype=torch.long), torch.randn(300, model.NUMBERS)
    for scale, fused in ((1.0, True), (2.0, False)):
        fused_calls.clear()
        torch.testing.assert_close(model(*given, scale=scale), own(*given, scale=scale))
        assert bool(fused_calls) == fused


@pytest.mark.parametrize("asked", [False, True])
def test_an_argument_that_a_known_class_has(asked: bool, fused_calls: list[int]) -> None:
    """FuxiCTR's, with which its weights are asked for too."""
    own: nn.Module = doubles.CGC_Layer(8, (6, 5))
    model = copy.deepcopy(own)
    assert mk.convert(model).replaced
    streams = [X] * 4
    for args, kwargs in (((streams, asked), {}), ((streams,), {"require_gate": asked})):
        fused_calls.clear()
        torch.testing.assert_close(model(*args, **kwargs), own(*args, **kwargs))
        assert bool(fused_calls) != asked
