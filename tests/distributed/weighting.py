"""mk.optim.GramWeighted: weights that ranks agree on, whatever their own weightings say, and failures of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import mtlkernels as mk
from tests.distributed.cases import assert_refused, assert_same_on_all_ranks, world
from tests.distributed.optimizer import Model, batches, build, mine, sharded


class Shuffled:
    """A state and a random order, as GradVac has them: other ones on other ranks, where ``own`` is set."""

    def __init__(self, *, own: bool) -> None:
        self.calls = 0
        self.generator = torch.Generator().manual_seed(8 + own * dist.get_rank())

    def __call__(self, gram: Tensor) -> Tensor:
        self.calls += 1
        order = torch.randperm(len(gram), generator=self.generator).double() + 1
        return order * gram.diagonal().rsqrt() / self.calls


def equal_norms(gram: Tensor) -> Tensor:
    return gram.diagonal().rsqrt()


def train(
    model: Model, weighting: Callable[[Tensor], Tensor], part: slice, *, with_expert: bool, **options: Any
) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = mk.optim.GramWeighted(sgd, weighting, shared=model.shared(), **options)
    for x, targets in batches():
        optimizer.zero_grad()
        outputs = model(x[part], with_expert=with_expert)
        optimizer.backward([(y - t[part]).square().mean() for y, t in zip(outputs, targets, strict=True)])
        optimizer.step()


def assert_trained_alike(model: Model, weighting: Callable[[Tensor], Tensor], *, with_expert: bool) -> None:
    alone, before = build(), build()
    train(alone, weighting, slice(None), with_expert=with_expert)
    for (name, found), want, old in zip(model.named_parameters(), alone.parameters(), before.parameters(), strict=True):
        full = found.full_tensor() if isinstance(found, DTensor) else found
        assert torch.allclose(full, want, rtol=1e-11, atol=1e-12), name
        reached = not name.startswith("unused") and (with_expert or not name.startswith("expert"))
        assert torch.equal(want, old) != reached, name


def check_data_parallel() -> None:
    first = dist.get_rank() == 0
    for own, alone in ((Shuffled(own=True), Shuffled(own=False)), (equal_norms, equal_norms)):
        model = build()
        train(model, own, mine(), with_expert=first, group=world())
        assert_trained_alike(model, alone, with_expert=True)
        assert_same_on_all_ranks(list(model.parameters()))


def check_sparse_embedding() -> None:
    model = build(sparse=True)
    train(model, Shuffled(own=True), mine(), with_expert=dist.get_rank() == 0, group=world())
    assert_trained_alike(model, Shuffled(own=False), with_expert=True)


def check_fsdp() -> None:
    size = dist.get_world_size()
    for shape in [(size,)] + [(2, 2)] * (size == 4):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
        model = sharded(mesh)
        train(model, Shuffled(own=True), mine(), with_expert=False)
        assert_trained_alike(model, Shuffled(own=False), with_expert=False)


def check_a_failing_weighting_reaches_every_rank() -> None:
    """Under data parallelism and FSDP; the last rank's alone, so that with two dimensions of a mesh it is told on."""
    size = dist.get_world_size()
    last = dist.get_rank() == size - 1
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")) if size == 4 else None
    meshes = [None, init_device_mesh("cpu", (size,))] + ([square] if square is not None else [])
    for mesh in meshes:
        for wrong, kind, words in (
            (lambda gram: gram, ValueError, "weighting must return a weight a task"),
            (lambda gram: gram[0] * torch.nan, ValueError, "weighting must return finite weights"),
            (lambda gram: gram[99], IndexError, "out of bounds"),
        ):
            model = build() if mesh is None else sharded(mesh)
            weighting = wrong if last else equal_norms
            options = {"group": world()} if mesh is None else {}
            optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), weighting, **options)
            losses = [y.square().sum() for y in model(torch.arange(6), with_expert=False)]

            def backward(optimizer: Any = optimizer, losses: Any = losses) -> None:
                optimizer.backward(losses)

            if last:
                assert_refused(backward, kind, words)
            else:
                told = ("another rank has failed", f"{kind.__name__}: ", words)
                assert_refused(backward, RuntimeError, *told)
            assert all(parameter.grad is None for parameter in model.parameters())


def check_a_matrix_that_is_not_finite() -> None:
    """Of one rank's gradients; no rank asks its weighting."""
    model = build()
    asked: list[Tensor] = []

    def weighting(gram: Tensor) -> Tensor:
        asked.append(gram)
        return gram[0]

    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), weighting, group=world())
    scale = torch.inf if dist.get_rank() == 1 else 1.0
    optimizer.backward([scale * y.sum() for y in model(torch.arange(6), with_expert=False)])
    assert not asked and all(bool(p.grad.isnan().all()) for p in model.trunk.parameters() if p.grad is not None)
    assert model.trunk[0].weight.grad is not None


def check_a_matrix_that_is_not_finite_on_one_rank_alone() -> None:
    """Plain tensors beside DTensors are nobody's to reduce: the ranks still meet, and go on."""
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    scale = nn.Parameter(torch.ones(()))
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([*model.parameters(), scale]), lambda gram: torch.ones(len(gram)))
    for factor in (torch.inf if dist.get_rank() == 1 else 1.0, 1.0):
        model.zero_grad()
        outputs = model(torch.arange(6), with_expert=False)
        gram = optimizer.backward([y.square().sum() + scale * factor for y in outputs])
        assert bool(gram.isfinite().all()) == (factor == 1.0)


def check_reductions_that_differ() -> None:
    model = build()
    reduction = "mean" if dist.get_rank() else "sum"
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters()), equal_norms, group=world(), reduction=reduction
    )
    losses = [y.sum() for y in model(torch.arange(6), with_expert=False)]
    assert_refused(lambda: optimizer.backward(losses), ValueError, "reduction must be one value on every rank")


def check_a_weighting_keeps_its_weights() -> None:
    """Where it returns a tensor of its own; the first rank's weights serve all."""
    rank, weight = dist.get_rank(), torch.ones(2, requires_grad=True)
    own = torch.tensor([1.0, 2.0], dtype=torch.float64) + rank
    optimizer = mk.optim.GramWeighted(torch.optim.SGD([weight]), lambda gram: own, group=world())
    optimizer.backward([weight.sum(), (2 * weight).sum()])
    assert own.tolist() == [1.0 + rank, 2.0 + rank]
    assert weight.grad is not None and weight.grad.tolist() == [5.0, 5.0]


def check_gram_every() -> None:
    """Every other call goes by old weights, those of the group's first rank, whatever the others' weightings say."""
    first = dist.get_rank() == 0
    for sparse in (False, True):
        model, alone = build(sparse=sparse), build()
        train(model, Shuffled(own=True), mine(), with_expert=first, group=world(), gram_every=2)
        train(alone, Shuffled(own=False), slice(None), with_expert=True, gram_every=2)
        for (name, found), want in zip(model.named_parameters(), alone.parameters(), strict=True):
            assert torch.allclose(found, want, rtol=1e-11, atol=1e-12), name
        assert_same_on_all_ranks(list(model.parameters()))


def check_ranks_that_are_not_exact_together() -> None:
    """One has another ``gram_every``, or has loaded a checkpoint: an error on all of them, and no hang."""
    last = dist.get_rank() == dist.get_world_size() - 1
    for loads in (False, True):
        model = build()
        sgd = torch.optim.SGD(model.parameters())
        every = 4 + (last and not loads)
        optimizer = mk.optim.GramWeighted(sgd, equal_norms, group=world(), gram_every=every)

        def backward(model: Model = model, optimizer: Any = optimizer) -> None:
            optimizer.backward([y.square().sum() for y in model(torch.arange(6), with_expert=False)])

        words = "gram_every must be one value on every rank"
        if loads:
            backward()
            optimizer.zero_grad()
            words = "the number of calls since the last Gram matrix, of gram_every, must be one value on every rank"
            if last:
                optimizer.load_state_dict(optimizer.state_dict())
        assert_refused(backward, ValueError, words)
        assert all(parameter.grad is None for parameter in model.parameters())
