"""Derivatives of PCGrad's operators and their rules for vmap: those of the reference, which is plain PyTorch.

Gradients are seldom differentiated again, so this is written for correctness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels._backends import register_reference
from mtlkernels._library import register_autograd
from mtlkernels.ops._autograd import copies
from mtlkernels.ops.pcgrad import reference, schema  # noqa: F401  (it defines the operators)

_OP = "pcgrad"


def _register(direction: str, function: Callable[..., Any]) -> None:
    register_reference(_OP, direction, function)
    register_autograd(f"{_OP}_{direction}", function)
    operator = getattr(torch.ops.mtlkernels, f"{_OP}_{direction}").default

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        """Example by example; the public functions, which call the reference under vmap, do not come here."""
        flat, spec = _torch.tree_flatten(args)
        dims = _spread(in_dims, args)
        columns = [
            copies(value, dim, info.batch_size) if isinstance(value, Tensor) else [value] * info.batch_size
            for value, dim in zip(flat, dims, strict=True)
        ]
        results = [operator(*_torch.tree_unflatten(row, spec)) for row in zip(*columns, strict=True)]
        out = _torch.tree_map(lambda *examples: torch.stack(examples), *results)
        return out, _torch.tree_map(lambda _: 0, out)

    torch.library.register_vmap(f"mtlkernels::{_OP}_{direction}", rule)


def _spread(dims: Any, args: Any) -> list[Any]:
    """The vmapped dimension of each argument, and of each entry of one that is a list."""
    spread: list[Any] = []
    for dim, arg in zip(dims, args, strict=True):
        spread += (dim or [None] * len(arg)) if isinstance(arg, list) else [dim]
    return spread


_register("gram", reference.gram)
_register("weights", reference.weights)
_register("combine", reference.combine)
