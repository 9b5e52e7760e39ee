"""A conversion is tried before it is made: copies with random weights run by the original code and fused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtlkernels import _torch

ROWS = 5


def call(module: Any, *args: Any) -> Any:
    """What ``module(*args)`` returns."""
    return module(*args)


class First(nn.Module):
    """Stands for a part that a trial leaves out: returns its first argument."""

    def forward(self, first: Any, *args: Any, **kwargs: Any) -> Any:
        """Returns ``first``."""
        return first


def disagreement(
    module: nn.Module,
    fused: Callable[..., Any],
    arguments: Callable[[Any, int, torch.Generator], tuple[Any, ...]],
    *,
    original: Callable[..., Any] = call,
    without: Sequence[str] = (),
) -> str | None:
    """Tries a conversion: the one place where it is decided whether fused evaluation is the same as a class's own code.

    The module itself is not touched or called; copies of it in float64 on the CPU are, with random weights.

    Args:
        module: what is to be converted.
        fused: from a copy and arguments, what the converted module would return; however few rows there are, it has
            to go the fused way.
        arguments: from a copy, a number of rows and a generator, arguments with float64 tensors of so many rows.
        original: from a copy and arguments, what the module returns.
        without: attributes of the module that both ways need not run, and that may be large, such as embeddings:
            a module becomes a :class:`First` in the copies.

    Returns:
        None where both agree, otherwise the reason, in the report's words.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        other = random_copy(module, generator, without)
        given = arguments(other, ROWS, generator)
        with torch.no_grad():
            found, expected = fused(other, *given), original(other, *given)
    except Exception as error:  # of code that is not ours; it goes into the report
        return f"it fails in a trial: {type(error).__name__}: {error}"
    return None if agree(found, expected) else "in a trial its forward gave other results than its experts and gates"


def random_copy(module: nn.Module, generator: torch.Generator, without: Sequence[str] = ()) -> Any:
    """A copy in evaluation with random weights in float64 on the CPU; the parts ``without`` are left out of it."""
    memo: dict[int, Any] = {id(getattr(module, name)): First() for name in without}
    other = copy.deepcopy(module, memo).to_empty(device="cpu").double().eval()
    for tensor in (*other.parameters(), *other.buffers()):
        if tensor.is_floating_point():
            # Positive, for variances, and of a size that keeps softmax away from 0 and 1.
            with torch.no_grad():
                tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)
                if tensor.dim() > 1:
                    tensor.sub_(0.6).mul_(3 * tensor.shape[-1] ** -0.5)
    return other


def agree(found: Any, expected: Any) -> bool:
    """Whether two results, tensors within lists, tuples and dicts, are the same within rounding."""
    leaves, structure = _torch.tree_flatten(found)
    others, other_structure = _torch.tree_flatten(expected)
    return structure == other_structure and all(map(_equal, leaves, others))


def _equal(found: Any, expected: Any) -> bool:
    if not isinstance(expected, Tensor):
        return bool(found == expected)
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    return torch.allclose(found, expected, rtol=0, atol=1e-9 * float(expected.abs().max()))
