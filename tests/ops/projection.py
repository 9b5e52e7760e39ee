"""PCGrad by its definition: projections of whole gradients, one after another, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flattened(grads: Sequence[Sequence[Tensor | None]], shapes: Sequence[Sequence[int]]) -> Tensor:
    """One row a task in float64, [T, P]; None counts as zero, and duplicates of a sparse gradient are added up."""
    rows = []
    for row in grads:
        parts = []
        for grad, shape in zip(row, shapes, strict=True):
            dense = torch.zeros(tuple(shape), dtype=torch.float64)
            if grad is not None:
                dense += grad.detach().to("cpu", torch.float64).to_dense()
            parts.append(dense.flatten())
        rows.append(torch.cat(parts))
    return torch.stack(rows)


def projected(
    grads: Tensor,
    order: Sequence[Sequence[int]],
    *,
    reduction: str = "sum",
    include_self: bool = False,
    max_norm: float | None = None,
    normalize: bool = False,
    project: bool = True,
    eps: float = 0.0,
) -> Tensor:
    """What PCGrad makes of [T, P] gradients, [P]."""
    scaled = grads.clone()
    if max_norm is not None:
        for row in scaled:
            if row.norm() > max_norm:
                row *= max_norm / row.norm()
    if normalize:
        norms = scaled.norm(dim=1)
        for row, norm in zip(scaled, norms, strict=True):
            if norm > 0:
                row *= norms.mean() / norm
    results = []
    for i, others in enumerate(order):
        row = scaled[i].clone()
        for j in others if project else ():
            if j == i and not include_self or not scaled[j].any():
                continue
            inner = row @ scaled[j]
            if inner < 0:
                row -= inner / (scaled[j] @ scaled[j] + eps) * scaled[j]
        results.append(row)
    total = torch.stack(results).sum(0)
    return total / len(results) if reduction == "mean" else total
