"""Checks of PCGrad's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels import _torch
from mtlkernels.ops._checks import DTYPES, as_sequence, shape_of

Column = tuple[Tensor | None, ...]


def columns_of(grads: Any) -> tuple[int, list[Column]]:
    """The number of tasks, and for each parameter its T gradients, from ``grads`` as the public functions take it.

    Looks at the structure alone; :func:`check_columns` looks at the tensors.
    """
    if isinstance(grads, Tensor):
        if grads.dim() != 2:
            raise ValueError(f"grads must be a matrix [T, P] or a sequence of T sequences, got {shape_of(grads)}")
        if grads.layout != torch.strided:
            raise TypeError(f"grads must be a dense matrix or a sequence of sequences, got layout {grads.layout}")
        rows: list[Any] = [(row,) for row in grads.unbind(0)]
    else:
        what = "a matrix [T, P] or a sequence over T tasks"
        rows = [
            as_sequence(f"grads[{t}]", row, "a sequence over parameters")
            for t, row in enumerate(as_sequence("grads", grads, what))
        ]
    if not rows:
        raise ValueError("grads must hold the gradients of at least one task, got none")
    for t, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"grads[{t}] must hold {len(rows[0])} parameters as grads[0] does, got {len(row)}")
    return len(rows), list(zip(*rows, strict=True))


def check_columns(columns: Sequence[Column]) -> None:
    """Every gradient is a floating-point tensor, on one device, of its parameter's shape and dtype."""
    device: torch.device | None = None
    for p, column in enumerate(columns):
        like: Tensor | None = None
        sparse_dim: int | None = None
        for t, grad in enumerate(column):
            if grad is None:
                continue
            name = f"grads[{t}][{p}]"
            if not isinstance(grad, Tensor):
                raise TypeError(f"{name} must be a tensor or None, got {type(grad).__name__}")
            if grad.dtype not in DTYPES:
                raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {grad.dtype}")
            if grad.layout not in (torch.strided, torch.sparse_coo):
                raise TypeError(f"{name} must be dense or sparse_coo, got layout {grad.layout}")
            if device is None:
                device = grad.device
            if grad.device != device:
                raise ValueError(f"{name} must be on {device} as the first gradient is, got {grad.device}")
            if like is None:
                like = grad
            if grad.shape != like.shape:
                raise ValueError(f"{name} must have shape {shape_of(like)} as other tasks have, got {shape_of(grad)}")
            if grad.dtype != like.dtype:
                raise TypeError(f"{name} must have dtype {like.dtype} as other tasks have, got {grad.dtype}")
            if grad.layout == torch.sparse_coo:
                sparse_dim = _check_sparse(name, grad, sparse_dim)


def _check_sparse(name: str, grad: Tensor, expected: int | None) -> int:
    """The number of sparse dimensions, which is ``expected`` where another task's gradient is sparse too."""
    found = grad.sparse_dim()
    if found == 0:
        raise ValueError(f"{name} must have at least one sparse dimension, got none")
    if expected not in (None, found):
        raise ValueError(f"{name} must have {expected} sparse dimensions as other tasks have, got {found}")
    if grad.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require gradients: a sparse gradient has no derivative here")
    return found


def check_gram(gram: Any) -> Tensor:
    """A square matrix in float64."""
    if not isinstance(gram, Tensor):
        raise TypeError(f"gram must be a tensor [T, T], got {type(gram).__name__}")
    if gram.dtype != torch.float64:
        raise TypeError(f"gram must be float64, got {gram.dtype}")
    if gram.dim() != 2 or gram.shape[0] != gram.shape[1] or gram.shape[0] == 0:
        raise ValueError(f"gram must have shape [T, T] with T at least 1, got {shape_of(gram)}")
    return gram


def check_options(include_self: Any, max_norm: Any, normalize: Any, project: Any, eps: Any) -> None:
    """The options that act on T x T numbers."""
    for name, flag in (("include_self", include_self), ("normalize", normalize), ("project", project)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    for name, value in (("max_norm", max_norm), ("eps", eps)):
        if value is None and name == "max_norm":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if max_norm is not None and not (max_norm > 0 and math.isfinite(max_norm)):
        raise ValueError(f"max_norm must be positive and finite, got {max_norm}")
    if not (eps >= 0 and math.isfinite(eps)):
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")


def check_reduction(reduction: Any) -> bool:
    """Whether the result is the mean."""
    if not isinstance(reduction, str):
        raise TypeError(f"reduction must be 'sum' or 'mean', got {type(reduction).__name__}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")
    return reduction == "mean"


def check_order(order: Any, num_tasks: int) -> Tensor:
    """``order`` as a tensor; its entries are looked at unless they are on a GPU, where that would wait for it."""
    if isinstance(order, (list, tuple)):
        order = torch.tensor(order)
    if not isinstance(order, Tensor):
        raise TypeError(f"order must be a tensor of integers or nested lists of them, got {type(order).__name__}")
    shapes = ((num_tasks, num_tasks - 1), (num_tasks, num_tasks))
    if order.shape not in shapes:
        raise ValueError(f"order must have shape {list(shapes[0])} or {list(shapes[1])}, got {shape_of(order)}")
    if order.numel() and (order.is_floating_point() or order.is_complex() or order.dtype == torch.bool):
        raise TypeError(f"order must hold integers, got {order.dtype}")
    if order.is_cpu and not torch.compiler.is_compiling() and not _torch.func_transforms_active():
        for i, row in enumerate(order.tolist()):
            if any(not 0 <= j < num_tasks for j in row):
                raise ValueError(f"order[{i}] must hold tasks in [0, {num_tasks}), got {row}")
            if len(set(row)) != len(row):
                raise ValueError(f"order[{i}] must hold each task at most once, got {row}")
    return order


def check_group(group: Any) -> None:
    """A process group of torch.distributed, or None."""
    if group is None:
        return
    if not torch.distributed.is_available():
        raise TypeError("group must be None, as this PyTorch is built without torch.distributed")
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup or None, got {type(group).__name__}")
