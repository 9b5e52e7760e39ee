"""The gradients of a call, on one machine or spread over several.

``parameters.py`` has those of one machine, ``distributed`` builds on it, and this picks: it is imported by neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from mtlkernels import _decisions
from mtlkernels._dtensors import has_dtensor
from mtlkernels.ops._checks import as_sequence, shape_of
from mtlkernels.ops.pcgrad.parameters import Parameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from mtlkernels.ops.pcgrad.distributed.data_parallel import DataParallel
    from mtlkernels.ops.pcgrad.distributed.sharded import Sharded

Gradients: TypeAlias = "Parameters | Sharded | DataParallel"
Result = TypeVar("Result")


def flattened(grads: Any) -> tuple[list[Any], int]:
    """The gradients in the order in which operators take them, from ``grads`` as users give it; the number of tasks.

    Parameter by parameter: that of task t for parameter p stands at ``p * T + t``, or is None. Looks at the structure
    alone; the gradients' own checks come with :class:`Parameters`.
    """
    if has_dtensor([grads]) and any(placement.is_shard(0) for placement in grads.placements):
        raise ValueError(
            f"grads must not be sharded over its dimension of tasks, got {grads.placements}: redistribute it before"
        )
    if isinstance(grads, Tensor):
        if grads.is_nested:
            raise TypeError("grads must be a dense matrix or a sequence of sequences, got a nested one")
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
    return [grad for column in zip(*rows, strict=True) for grad in column], len(rows)


def gradients_of(
    grads: Sequence[Any], num_tasks: int, group: ProcessGroup | None, beside: Sequence[Tensor] = ()
) -> Gradients:
    """This rank's gradients, checked. Those of a group go on to :func:`mean_over_ranks`.

    The ranks of DTensors in ``beside``, such as a model's other parameters, agree on coefficients, too.
    """
    if has_dtensor((*grads, *beside)):
        if group is not None:
            raise ValueError("group must be None where gradients are DTensors, which know their ranks, got a group")
        from mtlkernels.ops.pcgrad.distributed.sharded import Sharded

        _decisions.note("pcgrad", "shards where they are", "gradients or parameters are DTensors")
        return Sharded(grads, num_tasks, beside)
    parameters = Parameters(grads, num_tasks, at_once=group is not None)
    if group is not None and torch.is_grad_enabled() and any(grad.requires_grad for grad in grads if grad is not None):
        raise ValueError(
            "grads must not require gradients where group is given, as their mean has no derivative here, got some that"
            " do: detach() them"
        )
    return parameters


def mean_over_ranks(group: ProcessGroup | None, gradients: Gradients, **alike: Any) -> Gradients:
    """The mean over the ranks of a group, all of which must have the same values by the names in ``alike``."""
    if group is None or group.size() == 1:
        return gradients
    from mtlkernels.ops.pcgrad.distributed.data_parallel import DataParallel

    _decisions.note("pcgrad", "gradients reduced and scattered", f"a group of {group.size()} ranks is given")
    assert isinstance(gradients, Parameters)
    return DataParallel(gradients, group, alike)


def fail_together(group: ProcessGroup | None, function: Callable[[], Result]) -> Result:
    """Calls what comes before :func:`mean_over_ranks`; with a group, an exception becomes one on every rank of it."""
    if group is None or group.size() == 1:
        return function()
    from mtlkernels.ops.pcgrad.distributed import agreement

    return agreement.fail_together(group, function)
