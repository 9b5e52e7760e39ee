"""One gradient a task, or one by weights, for shared parameters; the ordinary gradient of all losses for the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mtlkernels.ops.level import sharing
from mtlkernels.ops.level.passes import cut, differentiate
from mtlkernels.optim._written import Grads, placed_as, set_grads


def task_gradients(
    losses: Sequence[Tensor], shared: Sequence[Tensor], others: Sequence[Tensor], *, mean: bool, how: str
) -> tuple[Grads, Grads, str]:
    """The gradients of ``losses``; frees their graphs, and leaves ``.grad`` of these parameters as it was.

    Args:
        losses: T scalars.
        shared: parameters, all of which require gradients.
        others: likewise.
        mean: whether ``others`` get the mean over losses instead of the sum.
        how: "grad", a call of ``torch.autograd.grad`` a loss; "levels", the same, but for levels, whose backward
            operator runs once for all losses; "batched", one call for all; or "backward", a ``loss.backward()`` a loss,
            whose gradients FSDP reduces.

    Returns:
        The gradients of ``shared``, parameter by parameter, T each, and those of ``others``, whose tensors nothing else
        refers to. None where a loss does not reach a parameter. Last how they were made: "grad" instead of "levels"
        where losses cannot share any, or gain nothing by it.
    """
    factor = 1 / len(losses) if mean else 1.0
    if how == "batched":
        return *_in_one_pass(losses, shared, others, factor), how
    by_task: list[Sequence[Tensor | None]] = []
    totals: Grads = [None] * len(others)
    count = len(losses)
    parts = cut(losses, count) if how == "levels" and count > 1 and sharing.pays(losses, count) else []
    passes: Iterable[Sequence[Tensor | None]]
    if len(parts) > 1:
        passes = differentiate([([loss], None) for loss in losses], parts, [*shared, *others])
    else:
        how = "grad" if how == "levels" else how
        passes = _one_by_one(losses, [*shared, *others], _by_backward if how == "backward" else _by_grad)
    for grads in passes:
        by_task.append(grads[: len(shared)])
        totals = [_add(total, grad, factor) for total, grad in zip(totals, grads[len(shared) :], strict=True)]
        del grads  # before the next pass takes memory
    by_parameter = [grad for column in zip(*by_task, strict=True) for grad in column]
    if how == "backward" and all(grad is None for grad in (*by_parameter, *totals)):
        raise RuntimeError(
            "loss.backward() has left no gradient: FSDP must reduce them, without set_requires_gradient_sync(False). It"
            " holds them now: a loss.backward() that reduces adds them to .grad, which zero_grad() clears"
        )
    return by_parameter, totals, how


def weighted_gradients(
    losses: Sequence[Tensor],
    weights: Sequence[float],
    shared: Sequence[Tensor],
    others: Sequence[Tensor],
    *,
    mean: bool,
    levels: bool,
) -> tuple[Grads, Grads]:
    """The gradients of one weighted sum of the losses for ``shared``, of their plain sum or mean for ``others``.

    Each is a pass that walks only what its parameters want: where the others are towers, one pass through the trunk.
    Where some of them are in or below a level, such as gates, the level would run in both passes; it then runs once for
    both. Frees the graphs.

    Args:
        losses: T scalars.
        weights: T.
        shared, others, mean: as for :func:`task_gradients`.
        levels: whether levels may run once for both passes.

    Returns:
        The gradients of ``shared``, and those of ``others``, whose tensors nothing else refers to. None where no loss
        reaches a parameter.
    """
    factor = 1 / len(losses) if mean else 1.0
    by_weights, plainly = (
        (losses, [torch.full_like(loss, float(value)) for loss, value in zip(losses, values, strict=True)])
        for values in (weights, [factor] * len(losses))
    )
    parts = cut(losses, 2) if levels and shared and others and sharing.pays(losses, 2) else []
    below = {leaf for part in parts[1:] for leaf in part.leaves | part.direct}
    if any(id(parameter) in below for parameter in others):
        grads, totals = differentiate([by_weights, plainly], parts, [*shared, *others])
        grads, totals = grads[: len(shared)], totals[len(shared) :]
    else:
        totals = _of_sum(plainly, others, retain=bool(shared))
        grads = _of_sum(by_weights, shared, retain=False)
    return grads, [_add(None, total, 1.0) for total in totals]


def _of_sum(
    summands: tuple[Sequence[Tensor], Sequence[Tensor]], parameters: Sequence[Tensor], *, retain: bool
) -> Grads:
    """Of losses, each times a factor."""
    if not parameters:
        return []
    losses, factors = summands
    return list(torch.autograd.grad(losses, parameters, factors, retain_graph=retain, allow_unused=True))


def _one_by_one(
    losses: Sequence[Tensor], parameters: Sequence[Tensor], differentiate: Callable[..., Sequence[Tensor | None]]
) -> Iterator[Sequence[Tensor | None]]:
    for i, loss in enumerate(losses):
        yield differentiate(loss, parameters, i + 1 < len(losses))


def _by_grad(loss: Tensor, parameters: Sequence[Tensor], retain: bool) -> Sequence[Tensor | None]:
    return torch.autograd.grad(loss, parameters, retain_graph=retain, allow_unused=True)


def _by_backward(loss: Tensor, parameters: Sequence[Tensor], retain: bool) -> Sequence[Tensor | None]:
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        loss.backward(retain_graph=retain)
        grads = _placed_grads(parameters)
        set_grads(parameters, before)
        return grads
    except BaseException:  # that of a signal's handler, while these are put back, too
        set_grads(parameters, before)
        raise


def _placed_grads(parameters: Sequence[Tensor]) -> Grads:
    """By itself: where a tracer raises, CPython 3.13 leaves a comprehension past the ``except`` around it."""
    return [placed_as(parameter, parameter.grad) for parameter in parameters]


def _add(total: Tensor | None, grad: Tensor | None, factor: float) -> Tensor | None:
    """``total + factor * grad``, in place where both are dense, in memory that autograd does not hand out twice."""
    if grad is None:
        return total
    if total is None:
        return grad.clone() if factor == 1 else grad * factor
    if total.is_sparse and grad.is_sparse:  # a sum of sparse tensors is their concatenation
        return torch.add(total, grad, alpha=factor).coalesce()
    if total.is_sparse:
        return torch.add(grad * factor, total)
    return total.add_(grad, alpha=factor)


def _in_one_pass(
    losses: Sequence[Tensor], shared: Sequence[Tensor], others: Sequence[Tensor], factor: float
) -> tuple[Grads, Grads]:
    num_tasks = len(losses)
    picks = []
    for i, loss in enumerate(losses):
        pick = torch.zeros((num_tasks, *loss.shape), dtype=loss.dtype, device=loss.device)
        pick[i] = 1
        picks.append(pick)
    try:
        stacked = torch.autograd.grad(losses, [*shared, *others], picks, allow_unused=True, is_grads_batched=True)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        raise RuntimeError(
            f"the batched backward pass has failed: {error}\nIf an operator cannot be batched, as those of sparse"
            " gradients and of compiled models cannot, batched must be False"
        ) from error
    by_parameter: Grads = [
        grad for grads in stacked[: len(shared)] for grad in ([None] * num_tasks if grads is None else grads.unbind())
    ]
    return by_parameter, [None if grads is None else grads.sum(0) * factor for grads in stacked[len(shared) :]]
