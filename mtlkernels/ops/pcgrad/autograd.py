"""Derivatives of PCGrad's operators and their rules for vmap: those of the reference, which is plain PyTorch.

Gradients are seldom differentiated again, so this is written for correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mtlkernels._backends import register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops.pcgrad import reference

_OP = "pcgrad"


def _differentiable_combine(grads: list[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    return reference.combine(grads, num_tasks, coefficients)


def _register(direction: str, function: Callable[..., Any]) -> None:
    register_reference(_OP, direction, function)
    register_autograd(f"{_OP}_{direction}", function)

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        dims = tuple(
            dim if not isinstance(arg, list) else (dim or [None] * len(arg))
            for arg, dim in zip(args, in_dims, strict=True)
        )
        out = torch.vmap(function, in_dims=dims)(*args)
        return out, pytree.tree_map(lambda _: 0, out)

    torch.library.register_vmap(f"mtlkernels::{_OP}_{direction}", rule)


_register("gram", reference.gram)
_register("weights", reference.weights)
_register("combine", _differentiable_combine)
