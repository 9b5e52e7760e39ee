"""torch.func.vmap and jacrev where there is nothing: no examples, no rows. Plain modules give empty tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, vmap

import mtlkernels as mk

ROUTING = mk.Routing.mmoe(2, 2)
WEIGHTS = [torch.randn(3, 2) for _ in range(2)]
LOGITS, Z, MATRICES = torch.randn(4, 2), torch.rand(2, 2), torch.randn(2, 2, 5, 3)


def level(x: Tensor) -> Tensor:
    logits = LOGITS[: x.shape[0]]
    return mk.expert_mixture(x, [WEIGHTS], None, [logits, logits], ROUTING)[0]


def gated(x: Tensor) -> Tensor:
    logits = LOGITS[: x.shape[0]]
    return mk.expert_mixture(x, [WEIGHTS], None, None, ROUTING, gate_weights=[logits.new_ones(2, 2)] * 2)[0]


def mixed(h: Tensor) -> Tensor:
    logits = LOGITS[: h.shape[0]]
    return mk.gated_mixture(h, [logits, logits], ROUTING)[0]


CALLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "level": (level, (2,), (3,)),
    "linear gates": (gated, (2,), (3,)),
    "gated_mixture": (mixed, (2, 3), (3,)),
    "snr_aver": (lambda u: mk.snr_aver([u, u], Z)[0], (3,), (3,)),
    "snr_trans": (lambda u: mk.snr_trans([u, u], MATRICES, Z)[0], (3,), (5,)),
}


@pytest.mark.parametrize("name", CALLS)
def test_no_examples(name: str) -> None:
    call, inner, outer = CALLS[name]
    assert vmap(call)(torch.randn(0, 4, *inner)).shape == (0, 4, *outer)
    assert vmap(call, in_dims=1, out_dims=1)(torch.randn(4, 0, *inner)).shape == (4, 0, *outer)
    assert vmap(grad(lambda x: call(x).square().sum()))(torch.randn(0, 4, *inner)).shape == (0, 4, *inner)


@pytest.mark.parametrize("name", CALLS)
def test_jacobians_of_no_rows(name: str) -> None:
    call, inner, outer = CALLS[name]
    assert jacrev(call)(torch.randn(0, *inner)).shape == (0, *outer, 0, *inner)


def test_gram_matrices_of_no_examples() -> None:
    assert vmap(mk.gram)(torch.randn(0, 2, 5)).shape == (0, 2, 2)
