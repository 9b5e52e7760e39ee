"""mk.optim.PCGrad against direct projection of per-task gradients, and its promises to the code around it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.optim import pcgrad as module
from tests.ops import definition

TASKS = 3
ORDER = [[1, 2], [2, 0], [0, 1]]


class Model(nn.Module):
    """A trunk, a head a task, and a layer that no task reaches."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, sparse: bool = False) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 4, dtype=dtype))
        self.heads = nn.ModuleList(nn.Linear(4, 1, dtype=dtype) for _ in range(TASKS))
        self.unused = nn.Linear(2, 2, dtype=dtype)
        self.embedding = nn.Embedding(50, 5, sparse=True, dtype=dtype) if sparse else None
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(16, 5, generator=generator).to(dtype)
        self.ids = torch.randint(0, 50, (16,), generator=generator)
        self.y = torch.randn(TASKS, 16, 1, generator=generator).to(dtype)

    def shared(self) -> list[Tensor]:
        return [*self.trunk.parameters(), *(self.embedding.parameters() if self.embedding else ())]

    def forward(self) -> list[Tensor]:
        x = self.x if self.embedding is None else self.x + self.embedding(self.ids)
        hidden = self.trunk(x)
        return [(head(hidden) - y).square().mean() for head, y in zip(self.heads, self.y, strict=True)]


@pytest.fixture(autouse=True)
def _known_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Projections in a known order, so that the definition can follow."""
    draw = module.draw_order

    def known(order: Any, generator: Any, num_tasks: int, *rest: Any, **options: Any) -> Any:
        return draw(ORDER if num_tasks == TASKS else order, None, num_tasks, *rest, **options)

    monkeypatch.setattr(module, "draw_order", known)


def grads_of(parameters: Any) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.detach().to_dense().clone() for p in parameters]


def expected(model: Model, shared: Any, others: Any, *, reduction: str = "mean", **options: Any) -> list[Tensor | None]:
    """By the definition for ``shared``; what an ordinary backward pass gives ``others``."""
    model.zero_grad()
    rows = []
    for i in range(TASKS):
        loss = model()[i]
        rows.append(list(torch.autograd.grad(loss, shared, allow_unused=True)))
    total = sum(model())
    (total / TASKS if reduction == "mean" else total).backward()
    plain = grads_of(others)
    model.zero_grad()
    return [*definition.pcgrad(rows, ORDER, reduction=reduction, **options), *plain]


def assert_close(actual: list[Tensor | None], wanted: list[Tensor | None], **tolerance: float) -> None:
    assert [a is None for a in actual] == [w is None for w in wanted]
    for a, w in zip(actual, wanted, strict=True):
        if a is not None:
            torch.testing.assert_close(a.to(torch.float64), w.to(torch.float64), **tolerance)  # type: ignore[union-attr]


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"include_self": True},
    {"max_norm": 0.3},
    {"normalize": True, "reduction": "sum"},
    {"project": False},
    {"eps": 0.1},
]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_parameters_shared(options: dict[str, Any], batched: bool, backend: str) -> None:
    model = Model()
    parameters = list(model.parameters())
    optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters), batched=batched, **options)
    with mk.use_backend(backend):
        optimizer.pc_backward(model())
    found = grads_of(parameters)
    assert_close(found, expected(model, parameters, [], **options))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_heads_get_their_ordinary_gradients(reduction: str, batched: bool) -> None:
    model = Model()
    others = [*model.heads.parameters(), *model.unused.parameters()]
    optimizer = mk.optim.PCGrad(
        torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), reduction=reduction, batched=batched
    )
    gram = optimizer.pc_backward(model())
    found = grads_of([*model.shared(), *others])
    wanted = expected(model, model.shared(), others, reduction=reduction)
    assert_close(found, wanted)
    assert found[-1] is None
    rows = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(model()[i], model.shared())]) for i in (0, 1, 2)]
    )
    torch.testing.assert_close(gram, rows @ rows.T)
    assert (gram < 0).any(), "nothing conflicts in this test"


def test_heads_that_several_tasks_reach() -> None:
    """An other parameter that all tasks reach is added up, and nothing is projected."""
    model = Model()
    others = list(model.trunk.parameters())
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.heads.parameters())
    optimizer.pc_backward(model())
    found = grads_of([*model.heads.parameters(), *others])
    assert_close(found, expected(model, list(model.heads.parameters()), others))


@pytest.mark.parametrize("batched", [False, True])
def test_gradients_share_no_memory(batched: bool) -> None:
    """Autograd hands out one tensor for a and b here, and expanded ones."""
    a, b = (torch.zeros(3, requires_grad=True) for _ in range(2))
    optimizer = mk.optim.PCGrad(torch.optim.SGD([a, b]), shared=[torch.zeros(1)], reduction="sum", batched=batched)
    optimizer.pc_backward([(a + b).sum(), ((a + b) * 2).sum()])
    a.grad.add_(1)  # type: ignore[union-attr]
    assert b.grad.tolist() == [3, 3, 3]  # type: ignore[union-attr]
    a.grad[0] = 7  # type: ignore[union-attr,index]
    assert a.grad.tolist() == [7, 4, 4]  # type: ignore[union-attr]
    one = mk.optim.PCGrad(torch.optim.SGD([a, b]), shared=[torch.zeros(1)], reduction="sum", batched=batched)
    one.zero_grad()
    one.pc_backward([(a + b).sum()])
    a.grad[0] = 7  # type: ignore[union-attr,index]
    assert b.grad.tolist() == [1, 1, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_accumulate(sparse: bool) -> None:
    model = Model(sparse=sparse)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.shared())
    optimizer.pc_backward(model())
    once, kept = grads_of(model.parameters()), [p.grad for p in model.trunk.parameters()]
    optimizer.pc_backward(model())
    assert_close(grads_of(model.parameters()), [None if g is None else 2 * g for g in once])
    assert all(p.grad is g for p, g in zip(model.trunk.parameters(), kept, strict=True)), "added in place"


def test_sparse_and_dense_gradients_accumulate() -> None:
    weight = torch.zeros(6, 2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([weight]))
    ids = torch.tensor([1, 4, 1])

    def sparse() -> Tensor:
        return nn.functional.embedding(ids, weight, sparse=True).sum()

    wanted = torch.zeros(6, 2)
    for make, share in ((sparse, None), (weight.sum, 1), (sparse, None)):
        optimizer.pc_backward([make()])
        wanted += 1 if share else torch.tensor([0, 2, 0, 0, 1, 0.0])[:, None]
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad.to_dense(), wanted)
    weight.grad = torch.zeros(6, 2)
    optimizer.pc_backward([sparse()])
    assert not weight.grad.is_sparse


def test_sparse_embeddings_with_sparse_adam() -> None:
    model, plain = Model(sparse=True), Model(sparse=True)
    plain.load_state_dict(model.state_dict())
    assert model.embedding and plain.embedding
    dense = [p for name, p in model.named_parameters() if "embedding" not in name]
    adam = torch.optim.Adam(dense, 0.1)
    sparse_adam = torch.optim.SparseAdam(model.embedding.parameters(), 0.1)
    optimizer = mk.optim.PCGrad(adam, shared=model.shared(), beside=[sparse_adam])
    optimizer.pc_backward(model())
    assert model.embedding.weight.grad is not None and model.embedding.weight.grad.is_sparse
    assert model.embedding.weight.grad.is_coalesced()
    found = grads_of(model.shared())
    optimizer.step()
    assert torch.equal(model.embedding.weight, plain.embedding.weight), "the other optimizer's step is the caller's"
    sparse_adam.step()
    assert_close(found, expected(plain, plain.shared(), []))
    untouched = sorted(set(range(50)) - set(model.ids.tolist()))
    assert torch.equal(model.embedding.weight[untouched], plain.embedding.weight[untouched])
    assert not torch.equal(model.embedding.weight, plain.embedding.weight)


def test_sparse_adam_itself_is_wrapped() -> None:
    model = Model(sparse=True)
    assert model.embedding
    optimizer = mk.optim.PCGrad(torch.optim.SparseAdam(model.embedding.parameters(), 0.1))
    before = model.embedding.weight.clone()
    optimizer.pc_backward(model())
    optimizer.step()
    assert not torch.equal(before, model.embedding.weight)
    assert model.trunk[0].weight.grad is None


def test_sparse_others_are_added_up_sparse() -> None:
    model = Model(sparse=True)
    assert model.embedding
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward(model())
    grad = model.embedding.weight.grad
    assert grad is not None and grad.is_sparse
    assert grad._nnz() == len(model.ids.unique()), "not once a task"
    found = grads_of([model.embedding.weight])
    assert_close(found, expected(model, list(model.trunk.parameters()), [model.embedding.weight])[-1:])
    both = torch.zeros(6, 2, requires_grad=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD([both]), shared=[torch.zeros(1)])
    lookup = nn.functional.embedding(torch.tensor([1, 1]), both, sparse=True).sum()
    optimizer.pc_backward([lookup, both.sum(), lookup, both.sum()])
    assert both.grad is not None and both.grad[:, 0].tolist() == [0.5, 1.5, 0.5, 0.5, 0.5, 0.5]


def test_the_graph_is_freed_and_nothing_else_is_kept() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    losses = model()
    optimizer.pc_backward(losses)
    with pytest.raises(RuntimeError, match="second time"):
        losses[-1].backward()
    references = [weakref.ref(loss) for loss in losses]
    del losses
    gc.collect()
    assert [reference() for reference in references] == [None] * TASKS


def test_gradients_of_others_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass begins when those of all passes before are gone."""
    model, seen = Model(), []
    compute = torch.autograd.grad

    def observed(loss: Tensor, inputs: list[Tensor], **options: Any) -> Any:
        assert all(reference() is None for reference in seen)
        found = compute(loss, inputs, **options)
        seen.extend(weakref.ref(g) for g, p in zip(found, inputs, strict=True) if p.shape == (1, 4) and g is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", observed)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward(model())
    assert len(seen) == TASKS


def test_a_vector_of_losses() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    optimizer.pc_backward(torch.stack(model()))
    found = grads_of(model.parameters())
    assert_close(found, expected(model, list(model.parameters()), []))
    optimizer.zero_grad()
    optimizer.pc_backward([loss.reshape(1) for loss in model()])
    assert_close(grads_of(model.parameters()), found)


def test_frozen_parameters() -> None:
    model = Model()
    model.trunk[0].requires_grad_(False)
    optimizer = mk.optim.PCGrad(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), shared=model.trunk.parameters()
    )
    optimizer.pc_backward(model())
    assert model.trunk[0].weight.grad is None and model.trunk[2].weight.grad is not None
    model.trunk[0].requires_grad_(True)
    optimizer.add_param_group({"params": model.trunk[0].parameters()})
    optimizer.zero_grad()
    optimizer.pc_backward(model())
    found = grads_of(model.trunk.parameters())
    assert_close(found, expected(model, list(model.trunk.parameters()), []))


def test_a_loss_that_reaches_nothing_shared() -> None:
    model = Model()
    head = model.heads[0]
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    optimizer.pc_backward([*model()[1:], head(torch.ones(1, 4, dtype=torch.float64)).sum()])
    assert head.bias.grad is not None and head.bias.grad.item() == pytest.approx(1 / 3)


def test_generator_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = Model()
    with torch.no_grad():
        model.y.mul_(torch.tensor([1.0, -2.0, 3.0])[:, None, None])
    found = []
    for seed in range(8):
        for _ in range(2):
            generator = torch.Generator().manual_seed(seed)
            optimizer = mk.optim.PCGrad(
                torch.optim.SGD(model.parameters()), shared=model.trunk.parameters(), generator=generator
            )
            optimizer.zero_grad()
            optimizer.pc_backward(model())
            found.append(model.trunk[0].weight.grad)
        assert torch.equal(found[-1], found[-2])  # type: ignore[arg-type]
    assert any(not torch.equal(found[0], other) for other in found[2:])  # type: ignore[arg-type]


def test_the_example_of_the_docstring() -> None:
    text = (mk.optim.PCGrad.__doc__ or "").partition("::\n\n")[2]
    lines = itertools.takewhile(lambda line: not line or line.startswith(" " * 8), text.splitlines())
    code = textwrap.dedent("\n".join(lines))
    batches = [(torch.randn(7, 64), [torch.randn(7, 1) for _ in range(2)]) for _ in range(3)]
    names: dict[str, Any] = {"mk": mk, "torch": torch, "batches": batches}
    exec(code, names)
    assert len(names["optimizer"].state) == len(list(names["model"].parameters())) + 4


# Around the wrapper -------------------------------------------------------------------------------------------------


def test_passes_through() -> None:
    model = Model()
    adam = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = mk.optim.PCGrad(adam, shared=model.trunk.parameters())
    assert optimizer.optimizer is adam and isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is adam.param_groups and optimizer.defaults is adam.defaults
    calls: list[Any] = []
    optimizer.register_step_post_hook(lambda *args: calls.append(args[0]))
    optimizer.register_step_pre_hook(lambda *args: calls.append(args[0]))
    optimizer.register_state_dict_pre_hook(calls.append)
    optimizer.register_state_dict_post_hook(lambda who, state: calls.append(who))
    optimizer.register_load_state_dict_pre_hook(lambda who, state: calls.append(who))
    optimizer.register_load_state_dict_post_hook(calls.append)
    optimizer.pc_backward(model())
    optimizer.step()
    assert optimizer.state is adam.state and len(optimizer.state) == len(list(model.parameters())) - 2
    saved = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.Adam(model.parameters(), lr=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.1 and other.state_dict()["state"].keys() == saved["state"].keys()
    optimizer.load_state_dict(other.state_dict())
    assert calls == [adam] * 6
    optimizer.zero_grad(set_to_none=False)
    assert model.trunk[0].weight.grad is not None and not model.trunk[0].weight.grad.any()
    optimizer.zero_grad()
    assert model.trunk[0].weight.grad is None
    assert repr(optimizer).startswith("PCGrad(Adam (")


def test_closure() -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.LBFGS(model.parameters(), max_iter=3), shared=model.trunk.parameters())
    calls = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        losses = model()
        optimizer.pc_backward(losses)
        calls.append(1)
        return sum(losses).detach()  # type: ignore[union-attr]

    first = optimizer.step(closure)
    assert isinstance(first, Tensor) and len(calls) > 1
    with torch.no_grad():
        assert sum(model()) < first


@pytest.mark.parametrize("where", ["wrapper", "wrapped"])
def test_schedulers(where: str) -> None:
    """On the wrapper or on what it wraps, without a warning about the order of calls."""
    model = Model()
    sgd = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    optimizer = mk.optim.PCGrad(sgd)
    on: torch.optim.Optimizer = optimizer if where == "wrapper" else sgd
    schedulers = [torch.optim.lr_scheduler.StepLR(on, 1), torch.optim.lr_scheduler.OneCycleLR(on, 0.5, 10)]
    before = sgd.param_groups[0]["lr"]
    optimizer.pc_backward(model())
    optimizer.step()
    for scheduler in schedulers:
        scheduler.step()
    assert sgd.param_groups[0]["lr"] != before
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        own, kept = again.param_groups[0]["params"][0], model.trunk[0].weight.clone()
        again.zero_grad()
        again.pc_backward([own.sum(), (2 * own).sum()])
        again.step()
        assert not torch.equal(own, kept) and torch.equal(model.trunk[0].weight, kept), "a copy steps on its own"


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(clone: Callable[[Any], Any]) -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(
        torch.optim.Adam(model.parameters()),
        shared=model.trunk.parameters(),
        generator=torch.Generator().manual_seed(5),
        max_norm=0.1,
    )
    optimizer.pc_backward(model())
    optimizer.step()
    other_model, other = clone((model, optimizer))
    assert other.generator is not optimizer.generator
    assert torch.equal(other.generator.get_state(), optimizer.generator.get_state())  # type: ignore[union-attr]
    for m, o in ((model, optimizer), (other_model, other)):
        o.zero_grad()
        o.pc_backward(m())
        o.step()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


@pytest.mark.parametrize("where", ["trunk and heads", "whole"])
def test_compiled_models(where: str, fresh_compiler: None) -> None:
    """Several backward passes go through one compiled graph."""
    model = Model()
    wanted = expected(model, list(model.trunk.parameters()), list(model.heads.parameters()))
    if where == "whole":
        compiled: Callable[[], list[Tensor]] = torch.compile(model, backend="aot_eager")
    else:
        model.trunk.compile(backend="aot_eager")
        compiled = model
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.pc_backward(compiled())
        assert_close(grads_of([*model.trunk.parameters(), *model.heads.parameters()]), wanted)


# Gradient scaling ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_norm": 0.3, "eps": 0.01, "normalize": True}], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_scaler(options: dict[str, Any], batched: bool) -> None:
    """``.grad`` is scaled while clipping, as it was asked for, is not."""
    model, plain = Model(torch.float32), Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizers = [
        mk.optim.PCGrad(torch.optim.SGD(m.parameters(), 0.1), shared=m.trunk.parameters(), batched=batched, **options)
        for m in (model, plain)
    ]
    gram = optimizers[0].pc_backward(model(), scaler=scaler)
    torch.testing.assert_close(optimizers[1].pc_backward(plain()), gram)
    for a, b in zip(grads_of(model.parameters()), grads_of(plain.parameters()), strict=True):
        if a is not None:
            torch.testing.assert_close(a / 1024, b)
    scaler.step(optimizers[0])
    scaler.update()
    optimizers[1].step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("how", ["wrapper", "wrapped", "fused"])
def test_scaled_losses(how: str) -> None:
    """The pattern of torch.amp's documentation, with unscale_ before clipping."""
    model, plain = Model(torch.float32), Model(torch.float32)
    plain.load_state_dict(model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=512.0)
    inner = [torch.optim.Adam(m.parameters(), 0.1, fused=how == "fused") for m in (model, plain)]
    optimizer, reference = (
        mk.optim.PCGrad(o, shared=m.trunk.parameters()) for o, m in zip(inner, (model, plain), strict=True)
    )
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.pc_backward([scaler.scale(loss) for loss in model()])
        at = inner[0] if how == "wrapped" else optimizer
        if how != "fused":
            scaler.unscale_(at)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        scaler.step(at)
        scaler.update()
        reference.zero_grad()
        reference.pc_backward(plain())
        if how != "fused":
            nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        reference.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_norm": 1.0}, {"normalize": True}], ids=str)
def test_overflow_skips_the_step(options: dict[str, Any], sparse: bool) -> None:
    model = Model(torch.float32, sparse=sparse)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters(), 0.1), shared=model.shared(), **options)
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.y.mul_(100)
    optimizer.pc_backward(model(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert scaler.get_scale() == 2.0**126


# Mistakes -----------------------------------------------------------------------------------------------------------


def mistakes() -> list[tuple[str, Callable[[Model], Any], type[Exception], str]]:
    return [
        ("none", lambda m: [], ValueError, "losses must hold the loss of at least one task, got none"),
        ("kind", lambda m: 3.0, TypeError, "losses must be a sequence of tensors, one a task, got float"),
        ("generator", lambda m: iter(m()), TypeError, "losses must be a sequence .*, got list_iterator"),
        ("scalar", lambda m: sum(m()), ValueError, r"losses must be a sequence .*\[T\], got shape \[\]"),
        ("entry", lambda m: [m()[0], 1.0], TypeError, r"losses\[1\] must be a tensor, got float"),
        ("shape", lambda m: [m()[0], m.trunk(m.x)], ValueError, r"losses\[1\] must be a scalar, got shape \[16, 4\]"),
        ("detached", lambda m: [*m()[:2], m()[2].detach()], ValueError, r"losses\[2\] must require gradients"),
        ("vector", lambda m: torch.stack(m()).detach(), ValueError, "losses must require gradients"),
    ]


@pytest.mark.parametrize(("losses", "kind", "message"), [m[1:] for m in mistakes()], ids=[m[0] for m in mistakes()])
def test_wrong_losses(losses: Callable[[Model], Any], kind: type[Exception], message: str) -> None:
    model = Model()
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    optimizer.pc_backward(model())
    before = grads_of(model.parameters())
    with pytest.raises(kind, match=message):
        optimizer.pc_backward(losses(model))
    assert_close(grads_of(model.parameters()), before, rtol=0, atol=0)


def test_wrong_constructor_arguments() -> None:
    model = Model()
    sgd = torch.optim.SGD(model.trunk.parameters())
    used = iter(model.trunk.parameters())
    list(used)
    for arguments, kind, message in (
        ({"optimizer": model}, TypeError, "optimizer must be a torch.optim.Optimizer, got Model"),
        ({"optimizer": mk.optim.PCGrad(sgd)}, TypeError, "optimizer must be one that is not wrapped yet, got PCGrad"),
        ({"beside": sgd}, TypeError, "beside must be a sequence of optimizers, got SGD"),
        ({"beside": [sgd, model]}, TypeError, r"beside\[1\] must be a torch.optim.Optimizer, got Model"),
        ({"shared": model.trunk}, TypeError, "shared must be an iterable of parameters or None, got Sequential"),
        ({"shared": model.trunk[0].weight}, TypeError, "shared must be an iterable of parameters .*, got Parameter"),
        ({"shared": 3}, TypeError, "shared must be an iterable of parameters or None, got int"),
        ({"shared": model.trunk.named_parameters()}, TypeError, r"shared\[0\] must be a parameter, got tuple"),
        ({"shared": model.heads.parameters()}, ValueError, r"shared\[0\] must be a parameter of the optimizer"),
        ({"shared": used}, ValueError, "shared must hold at least one parameter, got none"),
        ({"reduction": "max"}, ValueError, "reduction must be 'sum' or 'mean', got 'max'"),
        ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got int"),
        ({"batched": 1}, TypeError, "batched must be True or False, got int"),
        ({"max_norm": -1.0}, ValueError, "max_norm must be positive and finite"),
        ({"normalize": 1}, TypeError, "normalize must be True or False, got int"),
    ):
        with pytest.raises(kind, match=message):
            mk.optim.PCGrad(**{"optimizer": sgd, **arguments})


def test_what_cannot_be_trained() -> None:
    frozen = torch.zeros(2)
    wanted = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="optimizer must hold a parameter that requires gradients, got none"):
        mk.optim.PCGrad(torch.optim.SGD([frozen])).pc_backward([wanted.sum()])
    odd = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    with pytest.raises(TypeError, match="shared parameter 1 must be float32, .*, got torch.complex64"):
        mk.optim.PCGrad(torch.optim.SGD([wanted, odd])).pc_backward([wanted.sum()])
    elsewhere = torch.zeros(2, device="meta", requires_grad=True)
    with pytest.raises(ValueError, match="shared parameter 1 must be on cpu as the first one is, got meta"):
        mk.optim.PCGrad(torch.optim.SGD([wanted, elsewhere])).pc_backward([wanted.sum()])
    with pytest.raises(TypeError, match="scaler must be a torch.amp.GradScaler or None, got float"):
        mk.optim.PCGrad(torch.optim.SGD([wanted])).pc_backward([wanted.sum()], scaler=2.0)  # type: ignore[arg-type]
    assert wanted.grad is None


def test_what_cannot_be_batched() -> None:
    model = Model(sparse=True)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), batched=True)
    with pytest.raises(RuntimeError, match="batched must be False for these losses: .* sparse gradients"):
        optimizer.pc_backward(model())
    assert all(p.grad is None for p in model.parameters())
