"""What ``gram_every`` keeps from one call to the next, and when it keeps nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.optim import gram_weighted


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
