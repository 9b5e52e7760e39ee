"""What a converted module's code reads by ways that are easily missed, and what a trial sees of its forward."""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from tests.convert.test_edits import register
from tests.convert.weighing import Level, X, agree


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Decorated(Level):
    """Whose method is read behind what decorates it."""

    def prepare(self) -> None:
        self.uniform = False

    @checked
    def weigh(self, z: Tensor) -> Tensor:
        return torch.full_like(z, 0.25) if self.uniform else z.softmax(1)

    def edit(self) -> None:
        self.uniform = True


def changes() -> list[Callable[[Tensor], Tensor]]:
    """Two functions without names, of one scope."""
    return [
        lambda z: z,
        lambda z: 3 * z,
    ]


class OfLambda(Level):
    def prepare(self) -> None:
        self.change = changes()[0]

    def weigh(self, z: Tensor) -> Tensor:
        return self.change(z).softmax(1)

    def edit(self) -> None:
        self.change = changes()[1]


class Scaled(Level):
    """By a tensor that is no buffer, and is changed in place."""

    def prepare(self) -> None:
        self.scale = torch.ones(4)

    def weigh(self, z: Tensor) -> Tensor:
        return (z * self.scale.to(z.dtype)).softmax(1)

    def edit(self) -> None:
        self.scale.mul_(torch.arange(1.0, 5.0))


class Mode(enum.Enum):
    SOFT = 0
    UNIFORM = 1


class OfMode(Level):
    """A value that becomes another of its kind, or of another kind though it is equal."""

    values: tuple[Any, Any] = (Mode.SOFT, Mode.UNIFORM)

    def prepare(self) -> None:
        self.mode = self.values[0]

    def is_uniform(self) -> bool:
        return self.mode is Mode.UNIFORM

    def weigh(self, z: Tensor) -> Tensor:
        return torch.full_like(z, 0.25) if self.is_uniform() else z.softmax(1)

    def edit(self) -> None:
        self.mode = self.values[1]


class OfSteps(OfMode):
    values = ([1, 2], [1])

    def is_uniform(self) -> bool:
        return len(self.mode) == 1


class OfOne(OfMode):
    values = (1, True)

    def is_uniform(self) -> bool:
        return self.mode is True


class OfActivation(OfMode):
    values = (nn.Identity, nn.Sigmoid)

    def is_uniform(self) -> bool:
        return self.mode is nn.Sigmoid


@pytest.mark.parametrize("kind", [Decorated, OfLambda, Scaled, OfMode, OfSteps, OfOne, OfActivation])
def test_what_is_edited_later(kind: Any) -> None:
    register(kind)
    model, own = kind(), kind()
    mk.convert(model)
    own.load_state_dict(model.state_dict())
    agree(model, own)
    before = model(X)
    model.edit()
    own.edit()
    agree(model, own)
    assert not torch.equal(model(X)[0], before[0])


class Remembering(Level):
    """In a default that can be given by name alone."""

    def weigh(self, z: Tensor, *, seen: list[Tensor] = []) -> Tensor:  # noqa: B006
        seen.append(z.detach().mean())
        return z.softmax(1)


def test_a_default_that_is_written_to() -> None:
    register(Remembering)
    defaults: Any = Remembering.weigh.__kwdefaults__
    assert not mk.convert(Remembering()).replaced and not defaults["seen"]


class Leaning(Level):
    """Whose second output depends on the first one, though not by its value."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second, *rest = super().forward(x)
        return [first, second + 0 * first, *rest]


def test_gradients_of_the_second_output_alone() -> None:
    register(Leaning)
    model, own = Leaning(), Leaning()
    mk.convert(model)
    own.load_state_dict(model.state_dict())
    for each in (model, own):
        each(X)[1].sum().backward()
    grads: list[list[nn.Parameter]] = [list(each.parameters()) for each in (model, own)]
    assert [p.grad is None for p in grads[0]] == [p.grad is None for p in grads[1]]
