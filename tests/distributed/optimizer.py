"""mk.optim.PCGrad: steps on several ranks against the same steps of one process that has the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import mtlkernels as mk
from mtlkernels.ops.level import sharing
from mtlkernels.optim import _scaling
from tests.distributed.cases import assert_refused, assert_same_on_all_ranks, world

STEPS = 3
ROWS = 6  # a rank


class Model(nn.Module):
    """A trunk, which may be of fused levels, a head a task, and an expert that only rows of rank 0 reach."""

    def __init__(self, *, sparse: bool = False, fused: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, sparse=sparse)
        self.trunk: nn.Module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh())
        if fused:
            self.trunk = mk.nn.PLE(5, 3, num_specific=1, num_shared=1, expert_units=(7, 3), activation="tanh")
        self.expert = nn.Linear(5, 3)
        self.heads = nn.ModuleList(nn.Linear(3, 1) for _ in range(3))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, with_expert: bool) -> list[Tensor]:
        embedded = self.table(x).double()
        streams = self.trunk(embedded)
        if isinstance(streams, Tensor):
            streams = [streams] * 3
        if with_expert:
            streams = [torch.cat([h[:ROWS] + self.expert(embedded[:ROWS]), h[ROWS:]]) for h in streams]
        return [head(h) for head, h in zip(self.heads, streams, strict=True)]

    def shared(self) -> list[nn.Parameter]:
        return [*self.table.parameters(), *self.trunk.parameters(), *self.expert.parameters()]


def build(**options: Any) -> Model:
    torch.manual_seed(3)
    return Model(**options).double()


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    rows = ROWS * dist.get_world_size()
    for _ in range(STEPS):
        yield (
            torch.randint(0, 11, (rows,), generator=generator),
            torch.randn(3, rows, 1, generator=generator, dtype=torch.float64),
        )


def train(
    model: Model,
    forward: Callable[..., list[Tensor]],
    *,
    part: slice,
    with_expert: bool,
    shared: bool = True,
    scale: float | None = None,
    **options: Any,
) -> list[Tensor]:
    """Steps of SGD; returns the Gram matrices. The first step's gradients come in two calls."""
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    generator = torch.Generator().manual_seed(8 + dist.get_rank() * ("group" in options))
    chosen = model.shared() if shared else None
    optimizer = mk.optim.PCGrad(sgd, shared=chosen, generator=generator, **options)
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    grams = []
    for step, (x, targets) in enumerate(batches()):
        optimizer.zero_grad()
        for _ in range(1 + (step == 0)):
            outputs = forward(x[part], with_expert=with_expert)
            losses = [(y - target[part]).square().mean() for y, target in zip(outputs, targets, strict=True)]
            grams.append(optimizer.pc_backward(losses, scaler=scaler))
        assert model.unused.weight.grad is None
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return grams


def mine() -> slice:
    return slice(dist.get_rank() * ROWS, (dist.get_rank() + 1) * ROWS)


def assert_trains_alike(
    model: Model, grams: list[Tensor], *, fused: bool = False, with_expert: bool = True, **options: Any
) -> None:
    alone = build(fused=fused)
    expected = train(alone, alone, part=slice(None), with_expert=with_expert, **options)
    assert any(bool((gram < 0).any()) for gram in expected)  # tasks conflict
    for found, want in zip(grams, expected, strict=True):
        assert float((found - want).abs().max()) < 1e-12 * float(want.abs().max())
    for (name, found), want in zip(model.named_parameters(), alone.parameters(), strict=True):
        full = found.full_tensor() if isinstance(found, DTensor) else found
        assert torch.allclose(full, want, rtol=1e-11, atol=1e-12), name


def check_data_parallel() -> None:
    for options in ({}, {"reduction": "sum", "max_norm": 0.1}, {"shared": False}):
        model = build()
        grams = train(model, model, part=mine(), with_expert=dist.get_rank() == 0, group=world(), **options)
        assert_trains_alike(model, grams, **options)
        assert_same_on_all_ranks(list(model.parameters()))


def check_fused_levels() -> None:
    """Their backward passes run once for all losses; all ranks' losses come together as before."""
    for batched in (None, False):
        model = build(fused=True)
        with mock.patch.multiple(sharing, SHARED_ROWS=0, SHARED_WEIGHTS=0):
            grams = train(model, model, part=mine(), with_expert=False, group=world(), batched=batched)
        assert_trains_alike(model, grams, fused=True, with_expert=False)


def check_sparse_embedding() -> None:
    model = build(sparse=True)
    grams = train(model, model, part=mine(), with_expert=dist.get_rank() == 0, group=world())
    assert_trains_alike(model, grams)


def check_scaler() -> None:
    model = build()
    with_expert = dist.get_rank() == 0
    grams = train(model, model, part=mine(), with_expert=with_expert, group=world(), scale=1024.0, max_norm=0.1)
    assert_trains_alike(model, grams, max_norm=0.1)


def check_model_wrapped_in_ddp() -> None:
    """Its reducer does not run, whether it is told to wait for it or not."""
    for options in ({}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}):
        for synchronized in (True, False):
            model = build()
            wrapped = DistributedDataParallel(model, **options)
            with nullcontext() if synchronized else wrapped.no_sync():
                grams = train(model, wrapped, part=mine(), with_expert=dist.get_rank() == 0, group=world())
            assert_trains_alike(model, grams)


def check_a_failing_backward_reaches_every_rank() -> None:
    rank = dist.get_rank()
    model = build()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), group=world())

    def backward() -> None:
        losses = [y.sum() for y in model(torch.arange(6), with_expert=False)]
        if rank == 1:
            losses[1].register_hook(fail)
        optimizer.pc_backward(losses)

    if rank == 1:
        assert_refused(backward, ArithmeticError, "no such gradient")
    else:
        assert_refused(backward, RuntimeError, "rank 1 of the group has failed", "ArithmeticError: no such gradient")
    assert all(parameter.grad is None for parameter in model.parameters())


def fail(_: Tensor) -> None:
    raise ArithmeticError("no such gradient")


def check_models_that_differ() -> None:
    rank = dist.get_rank()
    model = build()
    shared = model.shared()[: -1 if rank else None]
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=shared, group=world())
    losses = [y.sum() for y in model(torch.arange(6), with_expert=False)]
    assert_refused(
        lambda: optimizer.pc_backward(losses), ValueError, "parameters that are not shared must be one value"
    )


def check_options_that_differ() -> None:
    last = dist.get_rank() == dist.get_world_size() - 1
    weight = torch.ones(2, requires_grad=True)
    options: dict[str, Any] = {"eps": 0.5, "max_norm": 2.0, "normalize": True, "reduction": "sum"}
    for name, value in options.items():
        own = {name: value} if last else {}
        optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]), group=world(), **own)

        def backward(optimizer: mk.optim.PCGrad = optimizer) -> None:
            optimizer.pc_backward([weight.sum(), -weight.square().sum()])

        assert_refused(backward, ValueError, f"{name} must be one value on every rank")


def with_scaler(scale: float | None, **options: Any) -> tuple[Model, Any, Callable[[], Tensor]]:
    """A model, its scaler, which is off without a scale, and a call of its optimizer."""
    model = build()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    sgd = torch.optim.SGD(model.parameters())
    optimizer = mk.optim.GramWeighted(sgd, lambda gram: gram[0], shared=model.shared(), group=world(), **options)

    def backward() -> Tensor:
        model.zero_grad()
        losses = [y.square().mean() for y in model(torch.arange(6), with_expert=False)]
        return optimizer.backward(losses, scaler=scaler)

    return model, scaler, backward


def check_scalers_that_differ() -> None:
    first = dist.get_rank() == 0
    for scale, words in (
        (None, "whether a scaler is on must be one value on every rank, got False on rank 0 and True on rank 1"),
        (64.0, "the scale of scaler must be one value on every rank, got 64.0 on rank 0 and 8.0 on rank 1"),
    ):
        model, _, backward = with_scaler(scale if first else 8.0)
        assert_refused(backward, ValueError, words)
        assert all(parameter.grad is None for parameter in model.parameters())


def check_scales_that_nobody_waits_for() -> None:
    """As on a GPU: where they differ all ranks get NaN, in calls by weights that were kept, too."""
    read, _, backward = with_scaler(8.0)
    expected = backward()
    for every in (1, 2):
        model, scaler, backward = with_scaler(8.0, gram_every=every)
        with mock.patch.object(_scaling, "is_readable", return_value=False):
            assert torch.equal(backward(), expected)
            for parameter, like in zip(model.parameters(), read.parameters(), strict=True):
                assert parameter.grad is like.grad is None or torch.equal(parameter.grad, like.grad)
            if dist.get_rank() == 0:
                scaler.update(4.0)
            gram = backward()
        assert bool(gram.isnan().all()) == (every == 1)
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert grads and all(bool(grad.isnan().all()) for grad in grads)


def sharded(mesh: Any, **options: Any) -> Model:
    model = build()
    for part in (model.trunk[0], model.trunk[2], *model.heads):
        fully_shard(part, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


def check_fsdp() -> None:
    """Shards of odd sizes; replicas of shards with four ranks; parameters dropped after the forward pass, or kept."""
    size = dist.get_world_size()
    shapes = [(size,)] + [(2, 2)] * (size == 4)
    for shape in shapes:
        for reshard in (True, False):
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :])
            model = sharded(mesh, reshard_after_forward=reshard)
            # FSDP waits for all ranks to reach the same parameters.
            grams = train(model, model, part=mine(), with_expert=False)
            alone = build()
            expected = train(alone, alone, part=slice(None), with_expert=False)
            for found, want in zip(grams, expected, strict=True):
                assert float((found - want).abs().max()) < 1e-12 * float(want.abs().max())
            for found, want in zip(model.parameters(), alone.parameters(), strict=True):
                assert isinstance(found, DTensor)
                assert torch.allclose(found.full_tensor(), want, rtol=1e-11, atol=1e-12)


def check_fsdp_bad_input() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def backward(*, synchronized: bool = True, **options: Any) -> None:
        model = sharded(mesh)
        model.set_requires_gradient_sync(synchronized)
        sgd, weighting = torch.optim.SGD(model.parameters()), lambda gram: gram[0]
        wrap = mk.optim.GramWeighted if "gram_every" in options else mk.optim.PCGrad
        optimizer = wrap(sgd, *[weighting] * ("gram_every" in options), **options)
        optimizer.backward([y.sum() for y in model(torch.arange(6), with_expert=False)])

    assert_refused(lambda: backward(group=world()), ValueError, "group must be None where parameters are DTensors")
    assert_refused(lambda: backward(batched=True), ValueError, "batched must be False where parameters are DTensors")
    assert_refused(lambda: backward(gram_every=3), ValueError, "gram_every must be 1 where parameters are DTensors")
    assert_refused(lambda: backward(synchronized=False), RuntimeError, "FSDP must reduce the gradients of every")
