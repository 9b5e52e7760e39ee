"""What ``gram_every`` keeps from one call to the next, when it keeps nothing, and what calls by kept weights do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.optim import _task_gradients, gram_weighted
from tests.optim.test_gram_every import Trunk, changing


def test_a_matrix_of_zeros_is_not_kept() -> None:
    """It says nothing of the next batch."""
    shared, seen = torch.ones(2, requires_grad=True), []

    def weighting(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.ones(1)

    optimizer = mk.optim.GramWeighted(torch.optim.SGD([shared]), weighting, gram_every=4)
    for scale in (0.0, 1.0, 1.0):
        optimizer.backward([(scale * shared).sum()])
    assert len(seen) == 2


def test_a_returned_matrix_is_the_callers() -> None:
    shared = torch.ones(2, requires_grad=True)
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([shared]), lambda gram: torch.ones(1), gram_every=4)
    for _ in range(4):
        assert optimizer.backward([shared.sum()]).sub_(2).item() == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_a_graph_is_freed(frozen: bool) -> None:
    """Also where all that is shared is frozen."""
    shared, head = (torch.ones(2, requires_grad=True) for _ in range(2))
    sgd = torch.optim.SGD([shared, head])
    optimizer = mk.optim.GramWeighted(sgd, lambda gram: torch.ones(1), shared=[shared], gram_every=2)
    for last in (False, True):
        shared.requires_grad_(not (last and frozen))
        loss = (head.exp() * shared.exp()).sum()
        optimizer.backward([loss])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, head)


def test_a_call_that_cannot_write_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one is exact, as if there had been none."""
    shared, calls = torch.ones(2, requires_grad=True), []

    def weighting(gram: Tensor) -> Tensor:
        calls.append(gram)
        return torch.ones(1)

    def failing(parameters: Any, grads: Any) -> None:
        raise MemoryError

    optimizer = mk.optim.GramWeighted(torch.optim.SGD([shared]), weighting, gram_every=2)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(gram_weighted, "accumulate", failing)
        optimizer.backward([shared.sum()])
    optimizer.backward([shared.sum()])
    assert len(calls) == 2


@pytest.mark.parametrize(("batched", "calls"), [(None, 1), (False, 0)])
def test_experts_that_are_not_shared_have_no_pass_of_their_own(
    batched: bool | None, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the level leads to them, and it would run in a pass of their own; ``batched=False`` asks for that."""
    shared_passes: list[int] = []
    original = _task_gradients.differentiate

    def counted(losses: Any, *args: Any) -> Any:
        shared_passes.append(len(losses))
        return original(losses, *args)

    monkeypatch.setattr(_task_gradients, "differentiate", counted)
    model = Trunk("mmoe")
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters()),
        changing,
        shared=[*model.embedding.parameters(), *model.gates()],
        batched=batched,
        gram_every=2,
    )
    optimizer.backward(model())
    shared_passes.clear()
    optimizer.backward(model())
    assert shared_passes == [2] * calls


def test_gradients_by_kept_weights_share_no_memory() -> None:
    """Of a sum that is multiplied, autograd gives one dense tensor to both summands."""
    a, b, c = (torch.zeros(3, requires_grad=True) for _ in range(3))
    factors = torch.tensor([1.0, 2.0, 3.0])
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD([a, b, c]), lambda gram: torch.ones_like(gram[0]), shared=[c], gram_every=2
    )
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([((a + b + c) * factors).sum(), c.sum()])
        assert a.grad is not None and b.grad is not None
        a.grad += 1
        assert b.grad.tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("size", [1e5, 1e-9])
def test_weights_that_losses_in_float16_cannot_hold(size: float) -> None:
    """As those by which small or large gradients get one norm: 1e5 would be infinite there, and 1e-9 zero."""
    shared = torch.ones(2, dtype=torch.float16, requires_grad=True)
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([shared]), lambda gram: torch.tensor([size, -size]), gram_every=2)
    factor, found = 0.01 if size > 1 else 1e4, []
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward([3 * factor * shared[0], factor * shared[1]])
        assert shared.grad is not None
        found.append(shared.grad)
    assert found[0].all() and found[0].isfinite().all()
    torch.testing.assert_close(found[1], found[0])
