"""What a call leaves behind: its matrix, gradients' layouts, and no graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mtlkernels as mk


def test_the_matrix_is_the_callers() -> None:
    """To be changed in place, as a plot of cosines does, while its weights are kept."""
    linear, x = nn.Linear(3, 2), torch.randn(5, 3)
    sgd = torch.optim.SGD(linear.parameters(), 0.1)
    optimizer = mk.optim.GramWeighted(sgd, lambda gram: torch.ones(len(gram)), gram_every=4)
    found = []
    for _ in range(4):
        gram = optimizer.backward(list(linear(x).square().mean(0)))
        found.append(gram.clone())
        gram.zero_()
    assert found[0].any() and all(torch.equal(gram, found[0]) for gram in found)


def test_a_dense_gradient_behind_a_sparse_one_lies_as_the_parameter() -> None:
    weight = nn.Parameter(torch.randn(4, 6).t())
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight], 0.1))
    optimizer.pc_backward([nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum()])
    assert weight.grad is not None and weight.grad.is_sparse
    optimizer.pc_backward([(weight * torch.randn(6, 4)).sum()])
    assert not weight.grad.is_sparse and weight.grad.stride() == weight.stride()


@pytest.mark.parametrize("shared", [True, False])
def test_each_call_frees_its_graph(shared: bool) -> None:
    """Those by weights that were kept, too."""
    trunk, heads = nn.Linear(3, 4), nn.Linear(4, 2)
    model = nn.Sequential(trunk, nn.Tanh(), heads)
    options = {"shared": trunk.parameters()} if shared else {}
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizer = mk.optim.GramWeighted(sgd, lambda gram: torch.ones(len(gram)), gram_every=2, **options)
    for _ in range(2):
        losses = list(model(torch.randn(5, 3)).square().mean(0))
        optimizer.backward(losses)
        with pytest.raises(RuntimeError, match="second time|already been freed"):
            torch.stack(losses).sum().backward()
