"""How a public function reaches its operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels._library import cast_floats


def under_autocast(like: Tensor, *groups: Any) -> Any:
    """The groups of tensors as autocast wants them: a differentiable cast, or the same objects outside autocast."""
    device = like.device.type
    if not torch.is_autocast_enabled(device):
        return groups
    dtype = torch.get_autocast_dtype(device)
    return tuple(cast_floats(group, dtype) for group in groups)


def needs_function(*groups: Sequence[Tensor | None]) -> bool:
    """Whether the call goes through the op's autograd Function: a gradient may be wanted, or torch.func is at work."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for group in groups for t in group)
