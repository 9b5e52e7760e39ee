"""Tensor subclasses without memory of their own, such as DTensors: no short way may read past them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import mtlkernels as mk


class Wrapped(torch.Tensor):
    """Holds another tensor, and has no memory itself."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": inner.device}
        made: Any = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrapped(value: Any) -> Any:
            return value.inner if isinstance(value, Wrapped) else value

        out = function(*pytree.tree_map(unwrapped, args), **pytree.tree_map(unwrapped, kwargs or {}))
        return pytree.tree_map(lambda value: Wrapped(value) if isinstance(value, Tensor) else value, out)


ROUTING = mk.Routing.mmoe(2, 1)


def expert_mixture(x: Tensor, a: Tensor, b: Tensor, logits: Tensor) -> Any:
    return mk.expert_mixture(x, [[a, b]], None, logits, ROUTING)


def gate_layers(x: Tensor, a: Tensor, b: Tensor, gate: Tensor) -> Any:
    return mk.expert_mixture(x, [[a, b]], None, None, ROUTING, gate_weights=[gate])


def gated_mixture(experts: Tensor, logits: Tensor) -> Any:
    return mk.gated_mixture(experts, [logits], ROUTING)


def pcgrad(a: Tensor, b: Tensor) -> Any:
    return mk.pcgrad([[a], [b]], order=[[1], [0]])


def snr_trans(u: Tensor, weight: Tensor, z: Tensor) -> Any:
    return mk.snr_trans([u], [[weight]], z)


def snr_aver(u: Tensor, z: Tensor) -> Any:
    return mk.snr_aver([u], z)


CALLS: list[tuple[Any, tuple[tuple[int, ...], ...]]] = [
    (expert_mixture, ((5, 4), (3, 4), (3, 4), (5, 2))),
    (gate_layers, ((5, 4), (3, 4), (3, 4), (2, 4))),
    (gated_mixture, ((5, 2, 3), (5, 2))),
    (pcgrad, ((7,), (7,))),
    (snr_trans, ((5, 4), (3, 4), (1, 1))),
    (snr_aver, ((5, 4), (1, 1))),
]


@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("function, shapes, at", [(f, s, i) for f, s in CALLS for i in range(len(s))])
def test_one_of_the_arguments(function: Any, shapes: Any, at: int, grad: bool) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    (expected, *_) = function(*tensors)
    given: list[Tensor] = [Wrapped(t) if i == at else t for i, t in enumerate(tensors)]
    if grad and function is not pcgrad:
        given = [t.requires_grad_() for t in given]
    with torch.set_grad_enabled(grad):
        (found, *_) = function(*given)
    assert isinstance(found, Wrapped)
    torch.testing.assert_close(found.inner, expected.detach())
