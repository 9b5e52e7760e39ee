"""Sharded gradients: every rank holds a part of each, as FSDP2 makes them, in DTensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from mtlkernels.ops._checks import shape_of
from mtlkernels.ops._layout import first_of
from mtlkernels.ops.pcgrad.checks import check_gradients
from mtlkernels.ops.pcgrad.distributed.agreement import succeed_together
from mtlkernels.ops.pcgrad.parameters import Parameters

Result = TypeVar("Result")


class Sharded:
    """T gradients for each of P parameters, any of them DTensors; in use like :class:`Parameters`.

    Each rank takes the inner products of its local parts. Their sum over the mesh dimensions that a parameter is
    sharded over is all that travels, beside the coefficients; a dimension that it is replicated over adds nothing, and
    a plain tensor counts as replicated everywhere. Results have the placements of the gradients.

    All ranks of all meshes use the same coefficients. Those of the DTensors ``beside`` the gradients count as well: a
    plain trunk below tensor-parallel towers must stay the same on all of their ranks.

    Raises:
        TypeError: for one parameter some gradients are DTensors and others are not.
        ValueError: shapes, meshes or placements of a parameter's gradients differ, or a placement is partial.
    """

    def __init__(self, grads: Sequence[Any], num_tasks: int, beside: Sequence[Any] = ()) -> None:
        self.num_tasks = num_tasks
        starts = range(0, len(grads), num_tasks)
        self._like = [_like(p, grads[start : start + num_tasks]) for p, start in enumerate(starts)]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        check_gradients(local, num_tasks)
        self._meshes = [tensor.device_mesh for tensor in (*self._like, *beside) if isinstance(tensor, DTensor)]
        first = first_of((*local, *beside))
        self.device = torch.device("cpu") if first is None else first.device
        # The parameters by what their inner products are summed over.
        members: dict[tuple[str, ...], list[int]] = {}
        self._groups: dict[tuple[str, ...], list[dist.ProcessGroup]] = {}
        for p, like in enumerate(self._like):
            if first_of(local[p * num_tasks : (p + 1) * num_tasks]) is None:
                continue
            groups = [] if like is None else _sharding_groups(like)
            key = tuple(group.group_name for group in groups)
            members.setdefault(key, []).append(p)
            self._groups[key] = groups
        self._local = {
            key: (places, Parameters([local[p * num_tasks + t] for p in places for t in range(num_tasks)], num_tasks))
            for key, places in members.items()
        }

    @torch.no_grad()
    def gram(self) -> Tensor:
        """[T, T] in float64, over all ranks' parts."""
        total = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64, device=self.device)
        for key, (_, parameters) in self._local.items():
            gram = parameters.gram()
            for group in self._groups[key]:
                dist.all_reduce(gram, group=group)
            total += gram
        return total

    def agreed(self, coefficients: Tensor) -> Tensor:
        """The coefficients of the first rank of the mesh, whose order of projections they stand for."""
        for group in self._mesh_groups():
            dist.broadcast(coefficients, group=group, group_src=0)
        return coefficients

    def succeed_together(self, function: Callable[[], Result]) -> Result:
        """Calls what may fail on some ranks of the mesh; an exception becomes one on all of them."""
        return succeed_together(self._mesh_groups(), function)

    def _mesh_groups(self) -> list[dist.ProcessGroup]:
        """The process groups of all dimensions of all meshes."""
        groups = {group.group_name: group for mesh in self._meshes for group in mesh.get_all_groups()}
        return list(groups.values())

    @torch.no_grad()
    def combine(self, coefficients: Tensor) -> list[Tensor | None]:
        """The sum over tasks of coefficient times gradient, for each parameter, placed as its gradients are."""
        results: list[Tensor | None] = [None] * len(self._like)
        for places, parameters in self._local.values():
            for p, result in zip(places, parameters.combine(coefficients), strict=True):
                like = self._like[p]
                if like is not None and result is not None:
                    placed = (like.device_mesh, like.placements)
                    result = DTensor.from_local(
                        result, *placed, run_check=False, shape=like.shape, stride=like.stride()
                    )
                results[p] = result
        return results


def _like(parameter: int, column: Sequence[Any]) -> DTensor | None:
    """The first of a parameter's gradients if they are DTensors, checked against the others."""
    grads = [(f"grads[{t}][{parameter}]", grad) for t, grad in enumerate(column) if grad is not None]
    if not any(isinstance(grad, DTensor) for _, grad in grads):
        return None
    first = grads[0][1]
    for name, grad in grads:
        if not isinstance(grad, DTensor) or not isinstance(first, DTensor):
            kinds = f"{type(first).__name__} and {type(grad).__name__}"
            raise TypeError(f"{name} must be a DTensor if those of other tasks are, got {kinds}")
        if any(placement.is_partial() for placement in grad.placements):
            raise ValueError(f"{name} must be sharded or replicated, got {grad.placements}: redistribute it before")
        if grad.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} must not require gradients, as a sharded gradient has no derivative here, got one that does:"
                " detach() it"
            )
        if grad.shape != first.shape:
            raise ValueError(f"{name} must have shape {shape_of(first)} as other tasks have, got {shape_of(grad)}")
        if grad.device_mesh != first.device_mesh or grad.placements != first.placements:
            raise ValueError(
                f"{name} must be placed as {first.placements} on {first.device_mesh}, as other tasks are, got"
                f" {grad.placements} on {grad.device_mesh}"
            )
    assert isinstance(first, DTensor)
    return first


def _sharding_groups(like: DTensor) -> list[dist.ProcessGroup]:
    """The process groups of the mesh dimensions over which a tensor is sharded."""
    placements = enumerate(like.placements)
    return [like.device_mesh.get_group(i) for i, placement in placements if not placement.is_replicate()]
