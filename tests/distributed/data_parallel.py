"""mk.pcgrad and mk.gram over a process group, against one process that has the mean gradients."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

import mtlkernels as mk
from mtlkernels.ops.pcgrad.distributed import buckets, collectives
from tests.distributed.cases import (
    Grads,
    assert_refused,
    assert_same_on_all_ranks,
    mean_gradients,
    random_rank_gradients,
    world,
)
from tests.ops.pcgrad.definition import OPTIONS, PROMISED, assert_right


def assert_agrees(ranks: list[Grads], order: Tensor, **options: Any) -> list[Tensor | None]:
    found = mk.pcgrad(ranks[dist.get_rank()], order=order, group=world(), **options)
    assert_right(found, mean_gradients(ranks), order, **options)
    assert_same_on_all_ranks(found)
    return found


def check_random_cases() -> None:
    for seed in range(3000, 3018):
        ranks, order = random_rank_gradients(seed, dist.get_world_size())
        assert_agrees(ranks, order, **OPTIONS[seed % len(OPTIONS)])


def check_gram() -> None:
    for seed in range(3100, 3105):
        ranks, _ = random_rank_gradients(seed, dist.get_world_size())
        found = mk.gram(ranks[dist.get_rank()], group=world())
        expected = mk.gram(mean_gradients(ranks))
        size = expected.diagonal().sqrt()
        assert float(((found - expected).abs() - 2 * PROMISED * size[:, None] * size).max()) <= 0
        assert_same_on_all_ranks([found])


def check_several_buckets() -> None:
    """Of many sizes, smaller and larger than parameters; the last one padded."""
    for limit, largest in ((1, 20), (1000, 400), (100_000, 50_000)):
        with mock.patch.object(buckets, "BUCKET_BYTES", limit):
            for seed in range(3200, 3203):
                ranks, order = random_rank_gradients(seed, dist.get_world_size())
                assert_agrees([without_large(rows, largest) for rows in ranks], order)


def without_large(rows: Grads, largest: int) -> Grads:
    return [[None if grad is None or grad.numel() > largest else grad for grad in row] for row in rows]


def check_reduce_scatter_as_on_gpus() -> None:
    """The way of the other backends, which gloo has too; its mean is rounded more often, but not for float64."""
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    generator = torch.Generator().manual_seed(1)
    shapes = ((5, 3), (1000,), (1,))
    ranks: list[Grads] = [
        [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(3)]
        for _ in range(dist.get_world_size())
    ]
    with mock.patch.object(collectives, "exchanges", return_value=False):
        assert_agrees(ranks, order)


def check_matrix() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    for columns in (0, 1, 3, 1001):
        matrices = torch.randn(size, 3, columns, generator=torch.Generator().manual_seed(columns))
        found = mk.pcgrad(matrices[rank], order=order, group=world())
        rows = [[[row] for row in matrix] for matrix in matrices]
        assert found.shape == (columns,)
        assert_right([found], mean_gradients(rows), order)
        assert_same_on_all_ranks([found])


def check_nothing_to_do() -> None:
    assert mk.pcgrad([[], []], group=world()) == []
    assert mk.pcgrad([[None, None]] * 3, group=world()) == [None, None]
    (empty,) = mk.pcgrad([[torch.ones(0, 3)], [torch.ones(0, 3)]], group=world())
    assert empty is not None and empty.shape == (0, 3)
    assert torch.equal(mk.gram([[None], [None]], group=world()), torch.zeros(2, 2, dtype=torch.float64))


def check_one_rank_has_gradients() -> None:
    """As where an expert got no rows elsewhere: zeros there count in the mean."""
    rank, size = dist.get_rank(), dist.get_world_size()
    grads = [torch.randn(7, 2), torch.randn(7, 2)]
    mine: Grads = [[grad, None] if rank == size - 1 else [None, None] for grad in grads]
    order = torch.tensor([[1], [0]])
    found, none = mk.pcgrad(mine, order=order, group=world())
    assert none is None
    assert_right([found], [[grad / size] for grad in grads], order)


def check_first_rank_draws() -> None:
    """Another order, generator or seed on the other ranks changes nothing."""
    rank = dist.get_rank()
    grads = [[torch.randn(50, generator=torch.Generator().manual_seed(t))] for t in range(6)]
    orders = [
        torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(r)) for _ in range(6)]) for r in (0, 1)
    ]
    (given,) = mk.pcgrad(grads, order=orders[min(rank, 1)], group=world())
    (expected,), (other,) = (mk.pcgrad(grads, order=order) for order in orders)
    # One rounding to float32 apart, as the sums are in float64.
    assert torch.allclose(given, expected, rtol=1e-6) and not torch.allclose(given, other, rtol=1e-6)
    (drawn,) = mk.pcgrad(grads, generator=torch.Generator().manual_seed(5 + rank), group=world())
    (expected,) = mk.pcgrad(grads, generator=torch.Generator().manual_seed(5))
    assert torch.allclose(drawn, expected, rtol=1e-6)
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    assert_same_on_all_ranks(mk.pcgrad(grads, group=world()))
    assert not torch.equal(torch.get_rng_state(), before)  # so that ranks that draw alike go on to do so


def check_subgroup() -> None:
    size = dist.get_world_size()
    group = dist.new_group(list(range(1, size)))
    if dist.get_rank() == 0:
        assert_refused(lambda: mk.pcgrad([[torch.ones(2)]], group=group), TypeError, "group must be")
        return
    ranks, order = random_rank_gradients(7, size)
    found = mk.pcgrad(ranks[dist.get_rank()], order=order, group=group)
    assert_right(found, mean_gradients(ranks[1:]), order)
    assert_same_on_all_ranks(found, group)


def check_memory_format_stays() -> None:
    images = [[torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)] for _ in range(2)]
    (found,) = mk.pcgrad(images, group=world())
    assert found.is_contiguous(memory_format=torch.channels_last)


def check_sparse_gradients() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        ranks: list[Grads] = []
        for r in range(size):
            rows: Grads = []
            for t in range(4):
                count = (5, 0, 30)[(r + t + seed) % 3]
                at = torch.randint(0, 20, (1, count), generator=generator)
                values = torch.randn(count, 3, generator=generator, dtype=torch.float64)
                table = torch.sparse_coo_tensor(at, values, (20, 3), check_invariants=True)
                dense = torch.randn(20, 3, generator=generator, dtype=torch.float64)
                if (seed + r) % 2:  # the gradient of a transposed weight, on this rank
                    dense = dense.t().contiguous().t()
                mixed = dense if t == 1 else table
                rows.append([None if seed % 4 == r else table, dense, None if (seed + r) % 3 == t else mixed])
            ranks.append(rows)
        order = torch.stack([torch.randperm(4, generator=generator) for _ in range(4)])
        found = mk.pcgrad(ranks[rank], order=order, group=world())
        assert found[0] is not None and found[0].is_sparse and found[0].is_coalesced()
        assert_right(found, mean_gradients(ranks), order)
        assert_same_on_all_ranks(found)


def check_sparse_gradients_in_a_subgroup() -> None:
    """All of its ranks have them after the exchange, and they count once."""
    group = dist.new_group(list(range(1, dist.get_world_size())))
    if dist.get_rank() == 0:
        return
    tables: Grads = [[torch.diag(torch.tensor(values)).to_sparse()] for values in ([1.0, 1.0, 1.0], [0.0, 1.0, 1.0])]
    assert mk.gram(tables, group=group).tolist() == [[3.0, 2.0], [2.0, 2.0]]


def check_sparse_half_precision() -> None:
    """Sums are in float64, and each is rounded once: that of a rank's duplicates, and the mean of the ranks."""
    size = dist.get_world_size()
    tables = []
    for rank in range(size):
        generator = torch.Generator().manual_seed(rank)
        at = torch.randint(0, 4, (1, 40), generator=generator)
        values = torch.randn(40, 3, generator=generator).bfloat16()
        tables.append(torch.sparse_coo_tensor(at, values, (4, 3), check_invariants=True))
    sums = torch.stack([table.double().coalesce().to_dense().bfloat16() for table in tables])
    (found,) = mk.pcgrad([[tables[dist.get_rank()]]], group=world())
    assert found is not None and torch.equal(found.to_dense(), sums.double().mean(0).bfloat16())


def check_differences_are_refused_on_every_rank() -> None:
    rank, group = dist.get_rank(), world()
    last = rank == dist.get_world_size() - 1
    one, two = torch.ones(3), torch.ones(2, 2)

    def refused(mine: Any, theirs: Any, *parts: str, **options: Any) -> None:
        assert_refused(lambda: mk.pcgrad(theirs if last else mine, group=group, **options), ValueError, *parts)

    refused([[one]], [[one], [one]], "grads must hold one number of tasks on every rank, got 1 on rank 0 and 2 on rank")
    refused([[one]], [[one, two]], "grads must hold one number of parameters")
    refused([[one, two]], [[one, one]], "gradients of parameter 1 must have one shape", "(2, 2)", "(3,)")
    refused([[one]], [[one.double()]], "one dtype", "torch.float64")
    refused([[one]], [[one.to_sparse()]], "grads[0][0] must have one number of sparse dimensions")
    for name, value in (("reduction", "mean"), ("eps", 0.5), ("max_norm", 2.0), ("include_self", True)):
        refused([[one]], [[one]], f"{name} must be one value", str(value), **({name: value} if last else {}))
    for other in (0, 1):  # another function on rank 1, or on rank 0
        function = mk.gram if min(rank, 1) == other else mk.pcgrad
        assert_refused(lambda f=function: f([[one]], group=group), ValueError, "the call must have one set of options")
    mk.pcgrad([[one]], group=group)  # and they go on


def check_a_refusal_reaches_every_rank() -> None:
    rank, group = dist.get_rank(), world()
    size = dist.get_world_size()
    bad: Any = [[torch.ones(2, dtype=torch.int64)]]
    good = [[torch.ones(2)]]
    if rank == 1:
        assert_refused(lambda: mk.pcgrad(bad, group=group), TypeError, "got torch.int64")
        assert_refused(lambda: mk.pcgrad(good, group=group, max_norm=-1.0), ValueError, "max_norm must be positive")
        assert_refused(lambda: mk.gram(bad, group=group), TypeError, "got torch.int64")
    else:
        for _ in range(3):
            told = ("rank 1 of the group has failed", "Error: ")
            assert_refused(lambda: mk.pcgrad(good, group=group), RuntimeError, *told)
    for _ in range(2):  # all of them at once
        assert_refused(lambda: mk.pcgrad(bad, group=group), TypeError, "got torch.int64")
    wants = [[torch.ones(2, requires_grad=True)]]
    assert_refused(lambda: mk.pcgrad(wants, group=group), ValueError, "must not require gradients")
    with torch.no_grad():
        mk.pcgrad(wants, group=group)
    assert_refused(lambda: mk.pcgrad(good, group=size), TypeError, "group must be a torch.distributed.ProcessGroup")  # type: ignore[arg-type]
