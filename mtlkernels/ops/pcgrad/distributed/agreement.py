"""What ranks tell each other before they exchange gradients, so that a difference is an error and not a hang."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.parameters import Parameters

Result = TypeVar("Result")


@dataclass(frozen=True)
class ColumnFacts:
    """One parameter: ``kinds`` has for each task None, 0 for a dense gradient, or the number of sparse dimensions."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    kinds: tuple[int | None, ...]


@dataclass(frozen=True)
class Facts:
    """What must be the same on all ranks, but for gradients that some of them do not have."""

    options: tuple[tuple[str, Any], ...]
    num_tasks: int
    device: str | None
    columns: tuple[ColumnFacts, ...]


def facts_of(parameters: Parameters, options: dict[str, Any]) -> Facts:
    """The facts of a rank's own gradients."""
    columns = tuple(_facts(parameters.column(p)) for p in range(len(parameters.grads) // parameters.num_tasks))
    empty = all(column.shape is None for column in columns)
    return Facts(tuple(options.items()), parameters.num_tasks, None if empty else parameters.device.type, columns)


def _facts(column: Sequence[Tensor | None]) -> ColumnFacts:
    kinds = tuple(None if grad is None else 0 if grad.layout == torch.strided else grad.sparse_dim() for grad in column)
    like = first_of(column)
    return ColumnFacts(None, None, kinds) if like is None else ColumnFacts(tuple(like.shape), like.dtype, kinds)


def agree(group: dist.ProcessGroup, mine: Facts) -> Facts:
    """The facts of all ranks together: a gradient is there if any rank has it.

    Ranks of one mind exchange 16 bytes each; otherwise they exchange all their facts.

    Raises:
        ValueError: on every rank, if the ranks' facts do not go together.
        RuntimeError: another rank has failed, and says why.
    """
    ranks = _exchange(group, mine, None)
    return mine if ranks is None else _merged(ranks)


def fail_together(group: dist.ProcessGroup, function: Callable[[], Result]) -> Result:
    """Calls what comes before :func:`agree`; an exception becomes one on every rank, at the others' :func:`agree`."""
    try:
        return function()
    except Exception as error:
        _exchange(group, None, f"{type(error).__name__}: {error}")
        raise


def succeed_together(groups: Sequence[dist.ProcessGroup], function: Callable[[], Result]) -> Result:
    """Calls what ranks do between two collectives; an exception on one of them becomes one on all ranks of the groups.

    The groups are those of a mesh's dimensions, or one; what one has told is told on in the next.
    """
    try:
        result = function()
    except Exception as error:
        _told(groups, f"{type(error).__name__}: {error}")
        raise
    failure = _told(groups, None)
    if failure is not None:
        raise RuntimeError(f"another rank has failed: {failure}")
    return result


def _told(groups: Sequence[dist.ProcessGroup], failure: str | None) -> str | None:
    """A failure of any rank, this one's first."""
    for group in groups:
        failure = next((other for other in (failure, *_gathered(group, failure)) if other is not None), None)
    return failure


def _exchange(group: dist.ProcessGroup, mine: Facts | None, failure: str | None) -> list[Facts] | None:
    """Every rank's facts, or None if they are all the same."""
    digest = hashlib.blake2b(repr((mine, failure)).encode(), digest_size=16).digest()
    if len(set(_gathered(group, digest))) == 1 and failure is None:
        return None
    ranks = _gathered(group, (mine, failure))
    if failure is None:
        for rank, (_, message) in enumerate(ranks):
            if message is not None:
                raise RuntimeError(f"rank {rank} of the group has failed: {message}")
    return [facts for facts, _ in ranks]


def _gathered(group: dist.ProcessGroup, item: Any) -> list[Any]:
    items = [None] * group.size()
    dist.all_gather_object(items, item, group=group)
    return items


def _merged(ranks: list[Facts]) -> Facts:
    first = ranks[0]
    _same("the call must have one set of options", [[name for name, _ in facts.options] for facts in ranks])
    for i, (name, _) in enumerate(first.options):
        _same(f"{name} must be one value", [repr(facts.options[i][1]) for facts in ranks])
    _same("grads must hold one number of tasks", [facts.num_tasks for facts in ranks])
    _same("grads must hold one number of parameters", [len(facts.columns) for facts in ranks])
    device = _same("gradients must be on devices of one type", [facts.device for facts in ranks])
    columns = []
    for p, column in enumerate(zip(*(facts.columns for facts in ranks), strict=True)):
        shape = _same(f"gradients of parameter {p} must have one shape", [facts.shape for facts in column])
        dtype = _same(f"gradients of parameter {p} must have one dtype", [facts.dtype for facts in column])
        kinds = [
            _same(f"grads[{t}][{p}] must have one number of sparse dimensions (0: dense)", list(sparse_dims))
            for t, sparse_dims in enumerate(zip(*(facts.kinds for facts in column), strict=True))
        ]
        columns.append(ColumnFacts(shape, dtype, tuple(kinds)))
    return Facts(first.options, first.num_tasks, device, tuple(columns))


def _same(expected: str, values: list[Any]) -> Any:
    """The value that is not None, of which there must be one at most."""
    known = [(rank, value) for rank, value in enumerate(values) if value is not None]
    for rank, value in known:
        if value != known[0][1]:
            of = f"{known[0][1]} on rank {known[0][0]} and {value} on rank {rank} of the group"
            raise ValueError(f"{expected} on every rank, got {of}")
    return known[0][1] if known else None
