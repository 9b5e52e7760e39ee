"""PCGrad in PyTorch: the specification that every other implementation is tested against.

Gradients travel flat, parameter by parameter: that of task t for parameter p stands at ``p * T + t``, or is None. The
projected gradients stay in the span of the original ones, so that everything but the first and the last pass over the
parameters happens on T x T coefficients, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtlkernels.ops._layout import by_parameter
from mtlkernels.ops.pcgrad.checks import any_of, any_of_parameter


def gram(grads: Sequence[Tensor | None], num_tasks: int) -> Tensor:
    """``G_ij = <g_i, g_j>`` over all parameters: [T, T] in float64. A gradient that is None counts as zero.

    There must be at least one.
    """
    device = any_of(grads).device
    total = torch.zeros(num_tasks, num_tasks, dtype=torch.float64, device=device)
    for column in by_parameter(grads, num_tasks):
        tasks = [t for t, grad in enumerate(column) if grad is not None]
        if tasks:
            flat = torch.stack([grad.to(torch.float64).flatten() for grad in column if grad is not None])
            at = torch.tensor(tasks, device=device)
            total = total.index_put((at.unsqueeze(1), at.unsqueeze(0)), flat @ flat.T, accumulate=True)
    return total


def weights(
    gram: Tensor,
    order: Tensor | None,
    include_self: bool,
    max_norm: float | None,
    normalize: bool,
    project: bool,
    eps: float,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The projected gradients' coefficients over the original gradients [T, T], and the result's [T].

    Gradients are first clipped to ``max_norm``, if that is neither None nor negative, then scaled to their mean norm,
    both by factors on ``gram``. The result is the sum, or the mean, of the projected gradients. An entry of ``order``
    out of range makes its row NaN.
    """
    num_tasks = gram.shape[0]
    scale = _scales(gram, max_norm, normalize)
    scaled = scale.unsqueeze(1) * gram * scale
    rows = torch.eye(num_tasks, dtype=gram.dtype, device=gram.device)
    if project and order is not None:
        for step in range(order.shape[1]):
            rows = _project(rows, scaled, order[:, step], include_self, eps)
    rows = rows * scale
    return rows, rows.mean(0) if mean else rows.sum(0)


def _scales(gram: Tensor, max_norm: float | None, normalize: bool) -> Tensor:
    """What each task's gradient is multiplied by before the projection."""
    square = gram.diagonal()
    zero = square == 0
    norm = torch.where(zero, 0, torch.where(zero, 1, square).sqrt())  # the square root has no derivative at zero
    scale = torch.ones_like(norm)
    if max_norm is not None and max_norm >= 0:
        scale = torch.where(norm > max_norm, max_norm / torch.where(norm > max_norm, norm, 1), scale)
    if normalize:
        clipped = scale * norm
        zero = clipped == 0
        scale = torch.where(zero, scale, scale * clipped.mean() / torch.where(zero, 1, clipped))
    return scale


def _project(rows: Tensor, gram: Tensor, others: Tensor, include_self: bool, eps: float) -> Tensor:
    """Takes from each row i of coefficients its conflict with the original gradient ``others[i]``."""
    num_tasks = gram.shape[0]
    valid = (others >= 0) & (others < num_tasks)
    others = torch.where(valid, others, 0)
    square = gram.diagonal()[others]
    inner = torch.where(rows != 0, rows * gram[others], 0).sum(1)  # who has no part in it must not make it NaN
    applies = (inner < 0) & (square != 0)
    tasks = torch.arange(num_tasks, device=gram.device)
    if not include_self:
        applies = applies & (others != tasks)
    step = torch.where(applies, inner / torch.where(square == 0, 1, square + eps), 0)
    step = torch.where(valid, step, torch.nan)
    # Not one_hot, which torch 2.10 cannot compile inside torch.func's transforms.
    taken = (others.unsqueeze(1) == tasks) | ~valid.unsqueeze(1)
    return rows - torch.where(taken, step.unsqueeze(1), 0)


def combine(grads: Sequence[Tensor | None], num_tasks: int, coefficients: Tensor) -> list[Tensor]:
    """``sum_t coefficients_t * g_t`` for each parameter, computed in float64, in the dtype of its gradients.

    Every parameter must have at least one gradient.
    """
    results = []
    for p, column in enumerate(by_parameter(grads, num_tasks)):
        like = any_of_parameter(column, p)
        total = torch.zeros_like(like, dtype=torch.float64)
        for coefficient, grad in zip(coefficients, column, strict=True):
            if grad is not None:
                total = total + coefficient * grad.to(torch.float64)
        results.append(total.to(like.dtype, copy=True))
    return results
