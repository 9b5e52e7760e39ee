"""A trunk in float64, which says what the right numbers are."""

from __future__ import annotations

import copy
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.peers.per_expert import PerExpertTrunk

# Rows evaluated at a time, so that float64 intermediates of a large batch fit in memory.
CHUNK = 8192
# A pre-activation this close to zero, in units of epsilon and of the layer's root mean square, may fall on either side
# of the ReLU's corner by rounding alone.
CORNER = 32.0


def evaluate(source: PerExpertTrunk, x: Tensor, cotangents: list[Tensor] | None) -> dict[str, Tensor]:
    """Outputs in float64, and with cotangents the gradients of the sum of outputs times cotangents."""
    trunk = copy.deepcopy(source).double()
    parts: list[tuple[Tensor, ...]] = []
    grad_inputs = []
    for start in range(0, x.shape[0], CHUNK):
        rows = x.detach()[start : start + CHUNK].double().requires_grad_(cotangents is not None)
        with torch.set_grad_enabled(cotangents is not None):
            outputs = trunk(rows)
        if cotangents is not None:
            torch.autograd.backward(outputs, [c[start : start + CHUNK].double() for c in cotangents])
            assert rows.grad is not None
            grad_inputs.append(rows.grad)
        parts.append(tuple(y.detach() for y in outputs))
    found = {f"outputs: {k}": torch.cat(pieces) for k, pieces in enumerate(zip(*parts, strict=True))}
    if cotangents is not None:
        found["gradients: input"] = torch.cat(grad_inputs)
        found |= trunk.gradients()
    return found


class HasCorners(Protocol):
    """A module in which some linear layers are followed by a ReLU."""

    def before_relu(self) -> list[nn.Linear]:
        """These layers."""


def rows_at_a_corner(source: HasCorners, x: Tensor) -> Tensor:
    """[B] bool: rows in which some pre-activation is zero but for rounding in the dtype of ``x``.

    There the derivative jumps, so two right implementations may differ by all of it. In bfloat16 and float16 this
    befalls every row, and every implementation about equally often; those dtypes get no such rows.
    """
    corner = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    if x.dtype.itemsize < 4:
        return corner
    module: Any = copy.deepcopy(source).double()
    near = CORNER * torch.finfo(x.dtype).eps
    start = 0

    def look(_: nn.Module, __: object, before: Tensor) -> None:
        scale = before.square().mean().sqrt()
        corner[start : start + before.shape[0]] |= (before.abs() <= near * scale).any(1)

    for linear in module.before_relu():
        linear.register_forward_hook(look)
    with torch.no_grad():
        for start in range(0, x.shape[0], CHUNK):
            module(x.detach()[start : start + CHUNK].double())
    return corner
