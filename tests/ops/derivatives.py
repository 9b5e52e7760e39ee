"""What tests of derivatives share: a call as a function of its leaves, and a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from mtlkernels.testing import Case


def leaves_of(case: Case) -> list[Tensor]:
    return [leaf for group in case.leaves().values() for leaf in group]


def function_of_leaves(op: Callable[..., Any], case: Case) -> tuple[Callable[..., Any], list[Tensor]]:
    """The call as a function of its leaves, for gradcheck and torch.func."""
    leaves = leaves_of(case)
    place = {id(leaf): i for i, leaf in enumerate(leaves)}

    def call(*values: Tensor) -> tuple[Tensor, ...]:
        arguments = case.map(lambda leaf: values[place[id(leaf)]] if id(leaf) in place else leaf).arguments
        return tuple(op(**arguments))

    return call, leaves


def loss_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    return lambda *values: sum((y * y).sum() * (k + 1) for k, y in enumerate(function(*values)))
