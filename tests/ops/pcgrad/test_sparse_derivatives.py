"""Derivatives and transforms in dense gradients that stand beside sparse ones, against those of dense tensors."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels.ops.pcgrad.sparse import SparseColumn

Grads = list[list[Tensor | None]]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"max_norm": 0.5, "reduction": "mean"},
    {"normalize": True, "eps": 0.1},
    {"project": False, "normalize": True},
]


def rows_of(seed: int, at: list[int]) -> Tensor:
    values = torch.randn(len(at), 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.sparse_coo_tensor(torch.tensor([at]), values, (6, 2), check_invariants=True)


def densified(grads: Grads) -> Grads:
    return [[None if grad is None else grad.to_dense() for grad in row] for row in grads]


# Beside dense gradients: some that are laid out over the union of their rows, some that are not, some with duplicates.
SPARSE = [rows_of(seed, at) for seed, at in enumerate(([1, 3], [3, 1], [0], [1], [2], [3], [4], [5], [2, 2, 5], [4]))]


def columns(dense: list[Tensor]) -> Grads:
    a, b, c, d = dense
    return [
        [a, SPARSE[2], None],
        [SPARSE[0], SPARSE[3], b],
        [SPARSE[1], c, SPARSE[8]],
        [None, SPARSE[4], d],
        [None, SPARSE[5], SPARSE[9]],
        [None, SPARSE[6], None],
        [None, SPARSE[7], None],
    ]


def dense() -> list[Tensor]:
    return [torch.randn(6, 2, dtype=torch.float64, requires_grad=True) for _ in range(4)]


def order_of(num_tasks: int) -> Tensor:
    others = [[j for j in range(num_tasks) if j != i] for i in range(num_tasks)]
    return torch.tensor([random.Random(i).sample(row, len(row)) for i, row in enumerate(others)])


def project(grads: Grads, **options: Any) -> Tensor:
    """All results, side by side."""
    results = mk.pcgrad(grads, order=order_of(len(grads)), **options)
    dense = [result.to_dense() if result.is_sparse else result for result in results if result is not None]
    return torch.cat([result.flatten() for result in dense])


FUNCTIONS: dict[str, Callable[[Grads], Tensor]] = {
    "gram": mk.gram,
    **{f"pcgrad {options}": lambda grads, options=options: project(grads, **options) for options in OPTIONS},
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_derivatives_beside_sparse_gradients(name: str) -> None:
    leaves, function = dense(), FUNCTIONS[name]
    for p in range(3):  # alone, as another parameter may ask for derivatives on its behalf
        column = [[row[p]] for row in columns(leaves)]
        wanted = [grad for (grad,) in column if grad is not None and grad.requires_grad]
        found, expected = function(column), function(densified(column))
        weights = torch.randn_like(found)
        found, expected = (torch.autograd.grad((each * weights).sum(), wanted) for each in (found, expected))
        torch.testing.assert_close(found, expected)
    assert torch.autograd.gradcheck(lambda *dense: function(columns(list(dense))), leaves)


def test_columns_are_of_both_layouts() -> None:
    assert [SparseColumn([row[p] for row in columns(dense())]).aligned for p in range(3)] == [True, False, True]


def test_derivative_of_a_square() -> None:
    grad = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(mk.gram([[grad], [SPARSE[0]]])[0, 0], grad)
    torch.testing.assert_close(found, 2 * grad.detach())


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_transforms_beside_sparse_gradients(name: str) -> None:
    function = FUNCTIONS[name]
    examples = torch.randn(3, 6, 2, dtype=torch.float64)
    fixed = [leaf.detach() for leaf in dense()]
    for place in range(4):

        def of(example: Tensor, place: int = place) -> Tensor:
            return function(columns([*fixed[:place], example, *fixed[place + 1 :]]))

        torch.testing.assert_close(torch.vmap(of)(examples), torch.stack([of(example) for example in examples]))
        jacobian = torch.func.jacrev(of)(examples[0])
        torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(of, examples[0]))
        torch.testing.assert_close(torch.func.jacfwd(of)(examples[0]), jacobian)
