"""mk.pcgrad and mk.gram of DTensors, against one process that has the whole tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

import mtlkernels as mk
from mtlkernels.ops.pcgrad.gradients import gradients_of
from mtlkernels.testing import random_task_gradients
from tests.distributed.cases import Grads, assert_refused, assert_same_on_all_ranks, world
from tests.ops.pcgrad.definition import OPTIONS, PROMISED, assert_right

ORDER = torch.tensor([[1, 2], [2, 0], [0, 1]])


def meshes() -> list[tuple[DeviceMesh, list[Placement]]]:
    """One dimension; with four ranks two as well: replicas of shards, as HSDP has them, and shards of shards."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    found: list[tuple[DeviceMesh, list[Placement]]] = [(line, [Shard(0)]), (line, [Replicate()])]
    if size == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
        found += [(square, [Replicate(), Shard(0)]), (square, [Shard(0), Shard(0)]), (square, [Shard(0), Replicate()])]
    return found


def spread(grads: Grads, mesh: DeviceMesh, placements: Sequence[Placement], plain: Sequence[int] = ()) -> Grads:
    """Each gradient distributed, but those of the parameters in ``plain``, and of parameters that are scalars."""

    def one(p: int, grad: Tensor | None) -> Tensor | None:
        if grad is None or p in plain or grad.dim() == 0:
            return grad
        return distribute_tensor(grad, mesh, placements)

    return [[one(p, grad) for p, grad in enumerate(row)] for row in grads]


def whole(results: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [result.full_tensor() if isinstance(result, DTensor) else result for result in results]


def check_random_cases() -> None:
    """Sizes that ranks do not divide, shards that are empty, replicated parameters, None."""
    for mesh, placements in meshes():
        for seed in range(4000, 4003):
            case = random_task_gradients(seed, max_tasks=6)
            grads = spread(case.grads, mesh, placements, plain=[1])
            options = OPTIONS[seed % len(OPTIONS)]
            found = mk.pcgrad(grads, order=case.order, **options)
            for result, column in zip(found, zip(*grads, strict=True), strict=True):
                like = next((grad for grad in column if grad is not None), None)
                assert isinstance(result, DTensor) == isinstance(like, DTensor)
                if isinstance(result, DTensor) and isinstance(like, DTensor):
                    assert result.placements == like.placements and result.device_mesh == mesh
                    assert result.to_local().shape == like.to_local().shape and result.stride() == like.stride()
            assert_right(whole(found), case.grads, case.order, **options)
            assert_same_on_all_ranks(whole(found))


def check_gram() -> None:
    for mesh, placements in meshes():
        case = random_task_gradients(4100)
        found = mk.gram(spread(case.grads, mesh, placements))
        expected = mk.gram(case.grads)
        size = expected.diagonal().sqrt()
        assert float(((found - expected).abs() - 2 * PROMISED * size[:, None] * size).max()) <= 0
        assert_same_on_all_ranks([found])


def check_other_dimensions_and_meshes() -> None:
    """Parameters that are sharded over different dimensions and over different meshes."""
    size = dist.get_world_size()
    line = init_device_mesh("cpu", (size,))
    square = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("data", "model"))
    grads = [[torch.randn(5, 7), torch.randn(3, 4), torch.randn(6), torch.randn(4, 2)] for _ in range(3)]
    placed: Grads = [
        [
            distribute_tensor(a, line, [Shard(1)]),
            distribute_tensor(b, square, [Shard(0), Shard(1)]),
            distribute_tensor(c, square["data"], [Shard(0)]),
            d,
        ]
        for a, b, c, d in grads
    ]
    found = whole(mk.pcgrad(placed, order=ORDER))
    assert_right(found, grads, ORDER)
    assert_same_on_all_ranks(found)


def check_only_small_tensors_travel() -> None:
    sizes: list[int] = []

    def record(function: Any) -> Any:
        def run(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            sizes.append(tensor.numel())
            return function(tensor, *args, **kwargs)

        return run

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    grads = spread([[torch.randn(100, 10), torch.randn(50)] for _ in range(3)], mesh, [Shard(0)])
    calls = {name: record(getattr(dist, name)) for name in ("all_reduce", "broadcast")}
    with mock.patch.multiple(dist, **calls):
        mk.pcgrad(grads)
    assert sizes == [9, 3]  # the Gram matrix, and the coefficients


def check_first_rank_draws() -> None:
    rank = dist.get_rank()
    for mesh, placements in meshes():
        grads = [[torch.randn(40, generator=torch.Generator().manual_seed(t))] for t in range(6)]
        generator = torch.Generator().manual_seed(5 + rank)
        (found,) = whole(mk.pcgrad(spread(grads, mesh, placements), generator=generator))
        (expected,) = mk.pcgrad(grads, generator=torch.Generator().manual_seed(5))
        assert found is not None and torch.allclose(found, expected, rtol=1e-6)
        torch.manual_seed(rank)
        assert_same_on_all_ranks(whole(mk.pcgrad(spread(grads, mesh, placements))))


def check_matrix() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for columns in (0, 1, 3, 101):
        matrix = torch.randn(3, columns)
        found = mk.pcgrad(distribute_tensor(matrix, mesh, [Shard(1)]), order=ORDER)
        assert isinstance(found, DTensor) and found.placements == (Shard(0),) and found.shape == (columns,)
        assert_right(whole([found]), [[row] for row in matrix], ORDER)
    by_task = distribute_tensor(torch.randn(4, 5), mesh, [Shard(0)])
    assert_refused(lambda: mk.pcgrad(by_task), ValueError, "must not be sharded over its dimension of tasks")


def check_bad_input() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    a = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)])
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])

    def refused(kind: type[Exception], other: Any, *parts: str, **options: Any) -> None:
        assert_refused(lambda: mk.pcgrad([[a], [other]], **options), kind, *parts)

    refused(ValueError, partial, "grads[1][0] must be sharded or replicated", "Partial")
    refused(TypeError, torch.ones(4, 4), "grads[1][0] must be a DTensor")
    refused(ValueError, distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)]), "grads[1][0] must be placed as")
    refused(ValueError, distribute_tensor(torch.ones(4, 5), mesh, [Shard(0)]), "grads[1][0] must have shape [4, 4]")
    refused(TypeError, distribute_tensor(torch.ones(4, 4).double(), mesh, [Shard(0)]), "grads[1][0] must have dtype")
    refused(ValueError, a, "group must be None where gradients are DTensors", group=world())
    refused(ValueError, a.detach().requires_grad_(), "grads[1][0] must not require gradients")


def check_a_failure_reaches_ranks_of_other_rows() -> None:
    """Ranks that share no group with the one that fails hear of it from those that do."""
    if dist.get_world_size() < 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    grad = distribute_tensor(torch.ones(4, 4), mesh, [Shard(0), Shard(1)])
    gradients, fails = gradients_of([grad, grad], 2, None), dist.get_rank() == 0

    def together() -> None:
        gradients.succeed_together(weights)

    def weights() -> None:
        if fails:
            raise ArithmeticError("no such weight")

    if fails:
        assert_refused(together, ArithmeticError, "no such weight")
    else:
        assert_refused(together, RuntimeError, "another rank has failed: ArithmeticError: no such weight")
