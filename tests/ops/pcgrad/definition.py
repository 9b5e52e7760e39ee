"""PCGrad by its definition, independent of the package, and how results are held against it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _backends
from mtlkernels.testing import poisoned_outputs

# How far inner products may be off, as a share of |g_i| |g_j|: in float64, and what `mk.gram` promises for narrower
# dtypes.
EXACT, PROMISED = 1e-13, 1e-6

OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "mean"},
    {"include_self": True},
    {"max_norm": 0.5},
    {"normalize": True},
    {"normalize": True, "max_norm": 2.0, "reduction": "mean"},
    {"project": False},
    {"project": False, "max_norm": 1e-3, "normalize": True},
    {"eps": 1e-3},
]


def formula(
    grads: Sequence[Sequence[Tensor | None]],
    order: Sequence[Sequence[int]],
    *,
    reduction: str = "sum",
    include_self: bool = False,
    max_norm: float | None = None,
    normalize: bool = False,
    project: bool = True,
    eps: float = 0.0,
) -> list[Tensor | None]:
    """Gradient surgery by walking over whole gradients, in float64."""
    shapes = [next((g for g in column if g is not None), None) for column in zip(*grads, strict=True)]

    def flatten(row: Sequence[Tensor | None]) -> Tensor:
        parts = [
            (torch.zeros_like(like) if grad is None else grad).double().to_dense().flatten()
            for grad, like in zip(row, shapes, strict=True)
            if like is not None
        ]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)

    tasks = [flatten(row) for row in grads]
    if max_norm is not None:
        tasks = [g * (max_norm / g.norm()) if g.norm() > max_norm else g for g in tasks]
    if normalize:
        mean = sum(g.norm() for g in tasks) / len(tasks)
        tasks = [g * (mean / g.norm()) if g.norm() > 0 else g for g in tasks]
    total = torch.zeros_like(tasks[0])
    for i, own in enumerate(tasks):
        projected = own.clone()
        for j in order[i] if project else ():
            if (j == i and not include_self) or not tasks[j].any():
                continue
            inner = projected @ tasks[j]
            if inner < 0:
                projected -= inner / (tasks[j] @ tasks[j] + eps) * tasks[j]
        total += projected
    if reduction == "mean":
        total = total / len(tasks)
    found, at = [], 0
    for like in shapes:
        if like is None:
            found.append(None)
            continue
        found.append(total[at : at + like.numel()].reshape(like.shape))
        at += like.numel()
    return found


def assert_agrees(
    grads: Sequence[Sequence[Tensor | None]], order: Tensor, sums: float | None = None, **options: Any
) -> None:
    """mk.pcgrad against the definition; ``sums`` as below."""
    with poisoned_outputs():
        actual = mk.pcgrad(grads, order=order, **options)
    assert_right(actual, grads, order, sums=sums, **options)


def assert_right(
    actual: Sequence[Tensor | None],
    grads: Sequence[Sequence[Tensor | None]],
    order: Tensor,
    *,
    sums: float | None = None,
    **options: Any,
) -> None:
    """A result against the definition: an error of one rounding to the dtype, and of sums of all tasks.

    Those are off by so much of the size of their terms: ``sums`` is what the dtypes and the forced backend allow, if
    not given.
    """
    if sums is None:
        narrow = any(grad is not None and grad.dtype != torch.float64 for row in grads for grad in row)
        sums = PROMISED if narrow and _backends.forced() != "reference" else EXACT
    expected = formula(grads, order.tolist(), **options)
    assert len(actual) == len(expected)
    sizes = [float(sum(g.double().to_dense().square().sum() for g in row if g is not None)) ** 0.5 for row in grads]
    for got, want, column in zip(actual, expected, zip(*grads, strict=True), strict=True):
        if want is None:
            assert got is None
            continue
        like = next(grad for grad in column if grad is not None)
        assert got.dtype == like.dtype and got.shape == like.shape and got.device == like.device
        assert_rounded(got, want, sums * len(sizes) * max(sizes))


def assert_rounded(got: Tensor, want: Tensor, error_of_sum: float) -> None:
    """One rounding to the dtype away from a sum, which itself is off by that much."""
    rounding = torch.finfo(got.dtype).eps * want.abs() + torch.finfo(got.dtype).tiny
    error = (got.to_dense().double().cpu() - want.cpu()).abs()
    excess = error - rounding.cpu() - error_of_sum
    assert not excess.numel() or float(excess.max()) <= 0, f"error {float(error.max()):.3g} in {got.dtype}"
