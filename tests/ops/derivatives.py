"""What tests of derivatives share: a call as a function of its leaves, a loss, and a comparison of nested results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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


def assert_same(got: Any, expected: Any) -> None:
    flat_got, spec = torch.utils._pytree.tree_flatten(got)
    flat_expected, expected_spec = torch.utils._pytree.tree_flatten(expected)
    assert spec == expected_spec
    for a, b in zip(flat_got, flat_expected, strict=True):
        torch.testing.assert_close(a, b)
