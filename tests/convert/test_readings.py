"""What was read of a level is kept while it holds the same modules, tensors and settings, in training too."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels import _extension
from tests.convert.changes import (
    CHANGES,
    Level,
    assert_as_own_code,
    assert_noticed,
    first,
    register,
)
from tests.convert.hidden_gates import ROWS, HiddenGates, converted, kept, readings
from tests.convert.models import features, ple

pytestmark = pytest.mark.skipif(not _extension.has_module(), reason="no direct way from this Python")


@pytest.fixture(scope="module", autouse=True)
def _registered() -> None:
    register(HiddenGates)


def gradients(model: Any, x: Tensor, own: bool = False) -> dict[str, Tensor | None]:
    """Of a call in the mode that the model is in, dropout left out: by its own code where asked."""
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    sum((k + 1) * y.sin().sum() for k, y in enumerate(Level.forward(model, x) if own else model(x))).backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def assert_trains_as_own_code(model: Any, x: Tensor) -> None:
    other = copy.deepcopy(model).double()
    assert_same(gradients(model, x), gradients(other, x.double(), own=True))


def assert_same(found: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> None:
    """To float32's rounding beside the largest gradient: behind a batch norm a bias has one of zero."""
    most = max(gradient.abs().max().item() for gradient in exact.values() if gradient is not None)
    for name, gradient in exact.items():
        own = found[name]
        assert (own is None) == (gradient is None), name
        if own is not None and gradient is not None:
            torch.testing.assert_close(own.double(), gradient.double(), rtol=1e-4, atol=1e-5 * most, msg=name)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Callable[[Any], None]) -> None:
    assert_noticed(kept(), change)


@pytest.mark.parametrize("change", [change for change in CHANGES if "hook" not in change.__name__])
def test_changes_are_noticed_in_training(change: Callable[[Any], None]) -> None:
    model, x = converted().train(), torch.randn(ROWS, 20)
    for _ in range(4):
        assert_trains_as_own_code(model, x)
    assert readings(model)
    change(model)
    for _ in range(6):
        assert_trains_as_own_code(model, x)


@pytest.mark.parametrize("mode", ["serving", "training", "evaluation with gradients"])
def test_nothing_is_read_again(mode: str, chains: list[Any]) -> None:
    model = converted().train(mode == "training")
    with torch.set_grad_enabled(mode != "serving"):
        for _ in range(3):
            model(torch.randn(ROWS, 20))
        chains.clear()
        for rows in (ROWS, ROWS + 1, 2 * ROWS):
            sum(y.sum() for y in model(torch.randn(rows, 20)))
        assert not chains
        model(torch.randn(40, 20))  # of which another kernel may be asked
        assert chains


def test_optimizers_may_move_numbers(chains: list[Any]) -> None:
    """``parameter.data`` becomes another memory at each step of some."""
    model = converted().train()
    for step in range(8):
        if step == 3:
            chains.clear()
        assert_trains_as_own_code(model, torch.randn(ROWS, 20))
        for parameter in model.parameters():
            parameter.data = parameter.data - 0.01
    assert not [chain for chain in chains if chain[0] in list(model.experts)]


def test_modes_may_alternate(chains: list[Any]) -> None:
    model, x = converted(), torch.randn(ROWS, 20)
    for turn in range(8):
        if turn == 3:
            chains.clear()
        assert_trains_as_own_code(model.train(), x)
        assert_as_own_code(model.eval(), x)
    assert not [chain for chain in chains if chain[0] in list(model.experts)]


def test_a_deepctr_level(chains: list[Any]) -> None:
    model, x = ple().eval(), features(5).float()
    assert mk.convert(model, force=True).replaced
    with torch.no_grad():
        found = [model(x) for _ in range(3)]
        chains.clear()
        found += [model(x) for _ in range(3)]
        assert not chains
        mk.revert(model)
        exact = model(x)
    for y in found:
        torch.testing.assert_close(y, exact)


def _frozen(model: Any, weight: nn.Parameter) -> None:
    weight.requires_grad_(False)


def _another_over_the_same_memory(model: Any, weight: nn.Parameter) -> None:
    first(model)[0].weight = nn.Parameter(weight.data)


def _heard(model: Any, weight: nn.Parameter) -> None:
    weight.register_hook(lambda gradient: 3 * gradient)


def _heard_behind(model: Any, weight: nn.Parameter) -> None:
    def enlarge(parameter: Tensor) -> None:
        parameter.grad.mul_(5)  # type: ignore[union-attr]

    weight.register_post_accumulate_grad_hook(enlarge)


@pytest.mark.parametrize("change", [_frozen, _another_over_the_same_memory, _heard, _heard_behind])
def test_what_gradients_depend_on(change: Callable[[Any, nn.Parameter], None]) -> None:
    model, x = converted(), torch.randn(ROWS, 20)
    for _ in range(4):
        before = gradients(model, x)
    assert readings(model)
    change(model, first(model)[0].weight)
    for _ in range(4):
        after = gradients(model, x)
        assert_same(after, gradients(model, x, own=True))
    if change is not _another_over_the_same_memory:
        name = "experts.0.0.weight"
        assert after[name] is None or not torch.allclose(after[name], before[name])  # type: ignore[arg-type]
