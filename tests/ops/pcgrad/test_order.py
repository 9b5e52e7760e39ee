"""Whose entries of PCGrad's order are looked at: a list's always, a tensor's where no tracer hides them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import mtlkernels as mk

TASKS = 3
GRADS = torch.randn(TASKS, 5, generator=torch.Generator().manual_seed(0))
ORDER = [[1, 2], [2, 0], [0, 1]]
BAD: list[tuple[Any, str]] = [
    ([[1, 1], [0, 2], [0, 1]], r"order\[0\] must hold each task at most once, got \[1, 1\]"),
    ([[1, 2], [0, 9], [0, 1]], r"order\[1\] must hold tasks in \[0, 3\), got \[0, 9\]"),
]


def with_lists(grads: Tensor) -> Any:
    return mk.pcgrad(grads, order=ORDER)


def with_a_tensor(grads: Tensor, order: Tensor) -> Any:
    return mk.pcgrad(grads, order=order)


@pytest.mark.parametrize("tensor", [False, True], ids=["lists", "tensor"])
def test_of_fake_tensors(tensor: bool) -> None:
    with FakeTensorMode() as mode:
        order: Any = mode.from_tensor(torch.tensor(ORDER)) if tensor else ORDER
        assert mk.pcgrad(mode.from_tensor(GRADS), order=order).shape == (5,)


def test_of_fake_tensors_outside_their_mode() -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    assert mk.pcgrad(mode.from_tensor(GRADS), order=mode.from_tensor(torch.tensor(ORDER))).shape == (5,)


@pytest.mark.parametrize("tensor", [False, True], ids=["lists", "tensor"])
@pytest.mark.parametrize("kind", ["real", "fake", "symbolic"])
def test_make_fx(kind: str, tensor: bool) -> None:
    """The graph of a tensor's order serves other orders."""
    expected = mk.pcgrad(2 * GRADS, order=ORDER)
    if tensor:
        graph = make_fx(with_a_tensor, tracing_mode=kind)(GRADS, torch.tensor(ORDER).flip(1))
        found = graph(2 * GRADS, torch.tensor(ORDER))
    else:
        found = make_fx(with_lists, tracing_mode=kind)(GRADS)(2 * GRADS)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("order, message", BAD)
def test_lists_are_refused_whoever_looks_on(order: Any, message: str) -> None:
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=message):
        mk.pcgrad(mode.from_tensor(GRADS), order=order)
    with pytest.raises(ValueError, match=message):
        make_fx(lambda grads: mk.pcgrad(grads, order=order))(GRADS)
    with pytest.raises(ValueError, match=message):
        torch.func.vmap(lambda grads: mk.pcgrad(grads, order=order))(GRADS.unsqueeze(0))


@pytest.mark.parametrize("order, message", BAD)
def test_a_tensor_is_refused_where_products_are_counted(order: Any, message: str) -> None:
    with FlopCounterMode(display=False), pytest.raises(ValueError, match=message):
        mk.pcgrad(GRADS, order=torch.tensor(order))


@pytest.mark.parametrize("order, message", BAD)
def test_lists_are_refused_by_what_is_compiled(order: Any, message: str) -> None:
    compiled = torch.compile(lambda grads: mk.pcgrad(grads, order=order), backend="eager")
    with pytest.raises(ValueError, match=message):
        compiled(GRADS)


def test_lists_of_other_orders_compile_nothing_anew() -> None:
    """Once the compiler has seen each entry change, it takes them for numbers that it does not know."""

    def function(grads: Tensor, order: Any) -> Any:
        return mk.pcgrad(grads, order=order)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    orders = [list(map(list, rows)) for rows in itertools.product(*(itertools.permutations(row) for row in ORDER))]
    for order in (orders[0], orders[-1]):
        compiled(GRADS, order)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for order in orders:
            torch.testing.assert_close(compiled(GRADS, order), mk.pcgrad(GRADS, order=order))
