"""Products with weights take subnormal numbers for zeros: a processor takes some hundred times longer for each
multiply-add that meets one, and sixteen rows share their multiply-adds."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from tests import requires

pytestmark = [
    requires.cpp_kernels,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="other processors keep them"),
]

KINDS = pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
ROWS = pytest.mark.parametrize("rows", [1, 3, 8, 16, 40, 300])
INPUTS, OUTPUTS = 19, 33

Product = Callable[[Tensor, Tensor], Tensor]  # from rows [B, D] and a weight [H, D]


@pytest.fixture(params=_extension.instruction_sets(), autouse=True)
def _isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with _extension.instruction_set(request.param), mk.use_backend("cpp"):
        yield


def expert(x: Tensor, weight: Tensor) -> Tensor:
    """What a gate reads of its only expert, which is linear."""
    logits = x.new_zeros(len(x), 1)
    return mk.expert_mixture(x, [weight[None]], None, [logits], mk.Routing.mmoe(1, 1), activation="none")[0]


def route(x: Tensor, weight: Tensor) -> Tensor:
    """What a sub-network reads by its only route, which is open."""
    return mk.snr_trans([x], weight[None, None], x.new_ones(1, 1))[0]


PRODUCTS = pytest.mark.parametrize("product", [expert, route])


def numbers(kind: torch.dtype) -> tuple[float, float]:
    """A subnormal number, and one by which it becomes an ordinary one."""
    least = torch.finfo(kind).smallest_normal
    return least / 64, least**-0.5


@PRODUCTS
@KINDS
@ROWS
def test_of_weights(product: Product, kind: torch.dtype, rows: int) -> None:
    subnormal, large = numbers(kind)
    x = torch.full((rows, INPUTS), large, dtype=kind)
    weight = torch.ones(OUTPUTS, INPUTS, dtype=kind)
    weight[4] = subnormal
    y = product(x, weight)
    assert (y[:, 4] == 0).all()
    y[:, 4] = large * INPUTS
    torch.testing.assert_close(y, torch.full_like(y, large * INPUTS))


@PRODUCTS
@KINDS
@ROWS
def test_of_rows(product: Product, kind: torch.dtype, rows: int) -> None:
    """Both of inputs and of gradients: the others are what they are without such a row."""
    subnormal, large = numbers(kind)
    x = torch.ones(rows, INPUTS, dtype=kind)
    x[0] = subnormal
    weight = torch.full((OUTPUTS, INPUTS), large, dtype=kind, requires_grad=True)
    x.requires_grad_()
    y = product(x, weight)
    assert (y[0] == 0).all()
    torch.testing.assert_close(y[1:], torch.full_like(y[1:], large * INPUTS))
    upstream = torch.ones_like(y)
    upstream[0] = subnormal
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert (grad[0] == 0).all()
    torch.testing.assert_close(grad[1:], torch.full_like(grad[1:], large * OUTPUTS))


@PRODUCTS
@KINDS
@ROWS
def test_of_gradients_of_weights(product: Product, kind: torch.dtype, rows: int) -> None:
    subnormal, large = numbers(kind)
    x = torch.full((rows, INPUTS), large, dtype=kind)
    weight = torch.ones(OUTPUTS, INPUTS, dtype=kind, requires_grad=True)
    upstream = torch.ones(rows, OUTPUTS, dtype=kind)
    upstream[:, 7] = subnormal
    (grad,) = torch.autograd.grad(product(x, weight), weight, upstream)
    assert (grad[7] == 0).all()
    torch.testing.assert_close(grad[:7], torch.full_like(grad[:7], large * rows))


@PRODUCTS
@KINDS
@ROWS
def test_of_results(product: Product, kind: torch.dtype, rows: int) -> None:
    """Products that are too small for ordinary numbers."""
    x = torch.full((rows, INPUTS), torch.finfo(kind).smallest_normal ** 0.5 / 64, dtype=kind)
    assert (product(x, torch.full((OUTPUTS, INPUTS), x[0, 0].item(), dtype=kind)) == 0).all()


@PRODUCTS
@KINDS
@ROWS
def test_infinities(product: Product, kind: torch.dtype, rows: int) -> None:
    """An infinity times such a number is NaN, as it is times 0."""
    x = torch.full((rows, INPUTS), float("inf"), dtype=kind)
    weight = torch.ones(OUTPUTS, INPUTS, dtype=kind)
    weight[4, 3] = numbers(kind)[0]
    y = product(x, weight)
    assert y[:, 4].isnan().all()
    assert (y[:, :4] == float("inf")).all()


@pytest.mark.parametrize("flushed", [False, True], ids=["", "they are zeros everywhere"])
def test_the_threads_keep_their_mode(flushed: bool) -> None:
    """What PyTorch computes after a call is as before it, on each thread."""
    x = torch.randn(500, INPUTS, requires_grad=True)
    many = torch.full((torch.get_num_threads(), 1 << 16), numbers(torch.float32)[0])
    torch.set_flush_denormal(flushed)
    try:
        before = many * 0.5 == 0
        for rows in (1, 16, 500):
            expert(x[:rows], torch.randn(OUTPUTS, INPUTS, requires_grad=True)).sum().backward()
        assert torch.equal(many * 0.5 == 0, before)
        assert before[0, 0] == flushed
    finally:
        torch.set_flush_denormal(False)
