"""What a level may hold of which nothing is kept, as it could change unseen, and what it may have held before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtlkernels import _extension
from tests.convert.changes import Level, assert_as_own_code, first, register, serve
from tests.convert.hidden_gates import ROWS, HiddenGates, converted, readings

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register(HiddenGates)


class Odd:
    """An object of a class of its own."""


def _sparse(expert: Any) -> None:
    expert.register_buffer("table", torch.eye(3).to_sparse())


def _computed(expert: Any) -> None:
    expert.doubled = 2 * expert[0].weight


def _object(expert: Any) -> None:
    expert.settings = [Odd()]


def _key(expert: Any) -> None:
    expert.settings = {Odd(): 1}


def _subclass(expert: Any) -> None:
    expert.settings = type("Settings", (dict,), {})(a=1)


def _itself(expert: Any) -> None:
    expert.settings = {}
    expert.settings["settings"] = expert.settings


@pytest.mark.parametrize("put", [_sparse, _computed, _object, _key, _subclass, _itself])
def test_nothing_is_kept(put: Callable[[Any], None]) -> None:
    model, x = converted(), torch.randn(ROWS, 20)
    put(first(model))
    for _ in range(6):
        for y, true in zip(serve(model, x), Level.forward(model, x), strict=True):
            torch.testing.assert_close(y, true, rtol=1e-4, atol=1e-5)
    assert not readings(model)


def test_a_hook_that_was_removed() -> None:
    """It leaves an empty dictionary behind."""
    model, x = converted(), torch.randn(ROWS, 20)

    def listen(grad: Tensor) -> None:
        pass

    weight: Any = first(model)[0].weight
    weight.register_hook(listen).remove()
    weight.register_post_accumulate_grad_hook(listen).remove()
    for _ in range(4):
        assert_as_own_code(model, x)
    assert len(readings(model)) == 1


def test_a_class_that_gets_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some profilers put one there."""

    def called(self: Any, *args: Any) -> Any:
        return nn.Module._wrapped_call_impl(self, *args)

    model, x = converted(), torch.randn(ROWS, 20)
    for _ in range(4):
        assert_as_own_code(model, x)
    (kept,) = readings(model)
    monkeypatch.setattr(nn.LeakyReLU, "__call__", called)
    for _ in range(4):
        assert_as_own_code(model, x)
    assert [kept] != readings(model)
