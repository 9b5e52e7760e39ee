"""What differs for those who come from the usual PCGrad, as docs/pcgrad.md has it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.optim import pcgrad as module
from tests.ops.pcgrad.definition import formula
from tests.optim.model import TASKS, Model, assert_close, grads_of

ORDER = [[1, 0, 2], [2, 0, 1], [2, 1, 0]]


def rows_of(model: Model) -> list[list[Tensor | None]]:
    return [list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)) for loss in retained(model)]


def retained(model: Model) -> list[Tensor]:
    """Losses of which each has a graph of its own."""
    return [model()[i] for i in range(TASKS)]


def usual(rows: list[list[Tensor | None]]) -> list[Tensor | None]:
    """All parameters are projected, and the mean is taken of those that every loss reaches: of the others the sum."""
    summed = formula(rows, ORDER, include_self=True)
    columns = zip(*rows, strict=True)
    everywhere = [all(grad is not None for grad in column) for column in columns]
    return [g / TASKS if g is not None and mean else g for g, mean in zip(summed, everywhere, strict=True)]


@pytest.fixture
def _whole_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """With each task itself, which the usual PCGrad does not leave out."""
    monkeypatch.setattr(module, "draw_order", lambda *_: torch.tensor(ORDER))


@pytest.mark.usefixtures("_whole_order")
@pytest.mark.parametrize("seed", range(8))
def test_its_gradients_by_a_factor_for_what_not_every_loss_reaches(seed: int) -> None:
    model = Model()
    model.y = torch.randn(model.y.shape, generator=torch.Generator().manual_seed(seed), dtype=model.y.dtype)
    rows = rows_of(model)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), include_self=True)
    optimizer.pc_backward(model())
    found, wanted = grads_of(model.parameters()), usual(rows)
    partly = [any(grad is None for grad in column) for column in zip(*rows, strict=True)]
    assert 0 < sum(partly) < len(partly)
    for i, grad in enumerate(found):
        if partly[i] and grad is not None:
            assert not torch.allclose(grad, wanted[i])
            found[i] = grad * TASKS
    assert_close(found, wanted)


def test_a_tower_gets_a_share_of_its_gradient() -> None:
    """1/T of it by default, and with the sum all of it."""
    for options, share in (({}, 1 / TASKS), ({"reduction": "sum"}, 1.0)):
        model = Model()
        towers = [list(head.parameters()) for head in model.heads]
        wanted = [torch.autograd.grad(loss, tower) for loss, tower in zip(retained(model), towers, strict=True)]
        given: dict[str, Any] = options
        optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.shared(), **given)
        optimizer.pc_backward(model())
        for tower, grads in zip(towers, wanted, strict=True):
            assert_close(grads_of(tower), [share * grad for grad in grads])


def test_adam_hardly_notices_the_factor() -> None:
    model = Model()
    other = copy.deepcopy(model)
    for each, factor in ((model, 1), (other, TASKS)):
        optimizer = mk.optim.PCGrad(torch.optim.Adam(each.parameters(), lr=1e-3), shared=each.shared())
        for _ in range(5):
            optimizer.zero_grad()
            optimizer.pc_backward(each())
            for parameter in each.heads.parameters():
                assert parameter.grad is not None
                parameter.grad *= factor
            optimizer.step()
    found, wanted = list(model.parameters()), list(other.parameters())
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)  # of steps of 1e-3


def test_a_loop_without_zero_grad_accumulates() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    optimizer.pc_backward(model())
    once = grads_of(model.parameters())
    optimizer.pc_backward(model())
    assert_close(grads_of(model.parameters()), [None if grad is None else 2 * grad for grad in once])
