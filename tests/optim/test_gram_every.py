"""``gram_every``: calls that go by the weights of an earlier batch, and which calls are exact."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

import mtlkernels as mk
from mtlkernels.ops.level import autograd
from mtlkernels.optim import _task_gradients
from tests.optim.model import Model, assert_close, grads_of

LOSSES = 3
ROWS = 12


class Trunk(nn.Module):
    """An embedding, a trunk and towers in float64, with a batch that changes; ``kind`` says what the trunk is.

    In float64 a level's backward pass and two of PyTorch's differ by rounding alone.
    """

    def __init__(self, kind: str, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = nn.Embedding(20, 6, sparse=sparse)
        self.trunk: Any = {
            "modules": lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
            "mmoe": lambda: mk.nn.MMoE(6, LOSSES, (8, 5), 4, activation="tanh"),
            "ple": lambda: mk.nn.PLE(6, LOSSES, (8, 5), num_specific=1, num_shared=2, activation="tanh"),
        }[kind]()
        self.towers = nn.ModuleList(nn.Linear(5, 1) for _ in range(LOSSES))
        self.double()
        self.batch = 0

    def forward(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.batch)
        ids = torch.randint(20, (ROWS,), generator=generator)
        y = torch.randn(LOSSES, ROWS, 1, generator=generator, dtype=torch.float64)
        hidden = self.trunk(self.embedding(ids))
        streams = [hidden] * LOSSES if isinstance(hidden, Tensor) else hidden
        return [(tower(h) - t).square().mean() for tower, h, t in zip(self.towers, streams, y, strict=True)]

    def gates(self) -> list[nn.Parameter]:
        return [p for name, p in self.trunk.named_parameters() if "gate" in name]


def shared_of(model: Trunk, which: str) -> list[Tensor]:
    gates = {id(gate) for gate in model.gates()}
    return {
        "all": lambda: list(model.parameters()),
        "trunk": lambda: list(model.trunk.parameters()),
        "trunk and embedding": lambda: [*model.embedding.parameters(), *model.trunk.parameters()],
        "experts and embedding": lambda: [
            p for p in (*model.embedding.parameters(), *model.trunk.parameters()) if id(p) not in gates
        ],
        "towers": lambda: list(model.towers.parameters()),
    }[which]()


def changing(gram: Tensor) -> Tensor:
    """Weights that no two matrices share, some negative."""
    return gram.diagonal().rsqrt() * gram.new_tensor([1.0, -2.0, 3.0])[: len(gram)]


def wanted(model: Trunk, weights: Tensor, shared: list[Tensor], *, reduction: str) -> dict[str, Tensor | None]:
    """By definition: the tasks' separate gradients, times the weights or added up."""
    result: dict[str, Tensor | None] = {}
    chosen = {id(p) for p in shared}
    rows = [
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True, allow_unused=True) for loss in model()
    ]
    for (name, parameter), grads in zip(model.named_parameters(), zip(*rows, strict=True), strict=True):
        plain = torch.full_like(weights, 1 / LOSSES if reduction == "mean" else 1.0)
        by = weights if id(parameter) in chosen else plain
        found = [w * g.to_dense() for w, g in zip(by, grads, strict=True) if g is not None]
        result[name] = torch.stack(found).sum(0) if found else None
    return result


def assert_grads(model: nn.Module, expected: dict[str, Tensor | None], factor: float = 1.0) -> None:
    """Two results in float64: within so many epsilons of the largest gradient of all."""
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    assert largest > 0
    for name, parameter in model.named_parameters():
        want = expected[name]
        assert (parameter.grad is None) == (want is None), name
        if parameter.grad is not None and want is not None:
            error = float((parameter.grad.to_dense() - factor * want).abs().max())
            assert error <= 64 * torch.finfo(torch.float64).eps * factor * largest, name


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call made the tasks' gradients."""
    calls: list[bool] = []
    for name in ("task_gradients", "weighted_gradients"):
        original = getattr(_task_gradients, name)

        def counted(*args: Any, name: str = name, original: Any = original, **options: Any) -> Any:
            calls.append(name == "task_gradients")
            return original(*args, **options)

        monkeypatch.setattr(f"mtlkernels.optim.gram_weighted.{name}", counted)
    return calls


@pytest.mark.parametrize("batched", [None, False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("which", ["all", "trunk", "trunk and embedding", "experts and embedding", "towers"])
@pytest.mark.parametrize("kind", ["modules", "mmoe", "ple"])
def test_old_weights(kind: str, which: str, reduction: str, batched: bool | None, exact: list[bool]) -> None:
    """Of three calls the first is exact; what the others write is what its weights make of exact gradients."""
    model = Trunk(kind)
    shared = shared_of(model, which)
    asked: list[Tensor] = []

    def weighting(gram: Tensor) -> Tensor:
        asked.append(changing(gram))
        return asked[-1]

    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters(), 0.1),
        weighting,
        shared=shared,
        reduction=reduction,
        batched=batched,
        gram_every=3,
    )
    grams = []
    for model.batch in range(5):
        optimizer.zero_grad()
        grams.append(optimizer.backward(model()))
        assert_grads(model, wanted(model, asked[-1], shared, reduction=reduction))
        optimizer.step()
    assert exact == [True, False, False, True, False] and len(asked) == 2
    assert torch.equal(grams[0], grams[1]) and torch.equal(grams[0], grams[2]) and torch.equal(grams[3], grams[4])
    assert not torch.equal(grams[0], grams[3]) and grams[0] is not grams[1]


def test_a_level_runs_once_for_both_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where gates are not shared, or an embedding below is not; it runs for one where only towers are not."""
    losses: list[int] = []
    original = autograd.level_gradients

    def counted(ctx: Any, stored: Any, grad_outputs: Any) -> Any:
        losses.append(len(grad_outputs) // ctx.num_gates)
        return original(ctx, stored, grad_outputs)

    monkeypatch.setattr(autograd, "level_gradients", counted)
    for which, runs in (("experts and embedding", 2), ("trunk", 2), ("trunk and embedding", 1), ("all", 1)):
        model = Trunk("mmoe")
        sgd = torch.optim.SGD(model.parameters())
        optimizer = mk.optim.GramWeighted(sgd, changing, shared=shared_of(model, which), gram_every=2)
        losses.clear()
        for model.batch in range(2):
            with BaseTorchFunctionMode():  # where somebody looks on, backward passes are in Python, and can be counted
                optimizer.backward(model())
        assert losses == [LOSSES, runs]


def projecting(optimizer: Any, *, max_norm: float | None = None, **options: Any) -> mk.optim.GramWeighted:
    """PCGrad's weights, of the sum of the projected gradients, which PCGrad itself makes in each call."""
    weighting = mk.optim.PCGrad(optimizer, max_norm=max_norm, reduction="sum").weighting
    return mk.optim.GramWeighted(optimizer, weighting, **options)


def test_pcgrad(exact: list[bool]) -> None:
    """The projection's weights, and one matrix for all calls that go by it."""
    model = Model()
    torch.nn.init.constant_(model.trunk[0].bias, 0.1)
    optimizer = projecting(
        torch.optim.SGD(model.parameters()), shared=model.shared(), max_norm=0.5, gram_every=2, reduction="sum"
    )
    gram = optimizer.backward(model())
    weights = optimizer.weighting(gram)
    model.y = -2 * model.y
    optimizer.zero_grad()
    assert torch.equal(optimizer.backward(model()), gram) and exact == [True, False]
    found = grads_of([*model.shared(), *model.heads.parameters()])
    a, b, c = model()
    total = weights[0] * a + weights[1] * b + weights[2] * c
    assert_close(found[:4], list(torch.autograd.grad(total, model.shared(), retain_graph=True)))
    assert_close(found[4:], list(torch.autograd.grad(a + b + c, list(model.heads.parameters()))))
    assert model.unused.weight.grad is None


def test_one_is_every_call(exact: list[bool]) -> None:
    model = Trunk("ple")
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), shared=model.trunk.parameters())
    for model.batch in range(3):
        optimizer.pc_backward(model())
    assert exact == [True] * 3


@pytest.mark.parametrize("sparse", [False, True])
def test_accumulation(sparse: bool, exact: list[bool]) -> None:
    """Calls count, not steps; sparse gradients stay sparse, and what is in ``.grad`` is no other parameter's memory."""
    model = Trunk("modules", sparse=sparse)
    shared = shared_of(model, "trunk and embedding")
    weights = torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64)
    optimizer = mk.optim.GramWeighted(
        torch.optim.SGD(model.parameters()), lambda gram: weights, shared=shared, gram_every=4
    )
    expected = wanted(model, weights, shared, reduction="mean")
    for calls in (1, 2, 3):
        optimizer.backward(model())
        assert_grads(model, expected, calls)
    assert exact == [True, False, False]
    grad = model.embedding.weight.grad
    assert grad is not None and grad.is_sparse == sparse


def test_gradients_that_autograd_hands_out_twice() -> None:
    """Of a sum, both summands' gradients are one tensor; of a parameter that is a loss it is a constant."""
    a, b, c = (torch.zeros(3, requires_grad=True) for _ in range(3))
    d = torch.zeros((), requires_grad=True)
    for shared in ([a, b], [c]):
        optimizer = mk.optim.GramWeighted(
            torch.optim.SGD([a, b, c, d]), lambda gram: gram.new_tensor([2.0, 5.0]), shared=shared, gram_every=2
        )
        for _ in range(2):
            optimizer.zero_grad()
            optimizer.backward([(a + b + c).sum() + d, d])
        for parameter in (a, b, c, d):
            assert parameter.grad is not None
            parameter.grad += 1
        wanted = [3.0, 3.0, 1.5] if shared == [a, b] else [1.5, 1.5, 3.0]
        assert [float(p.grad[0]) for p in (a, b, c)] == wanted and float(d.grad) == 2.0  # type: ignore[index, arg-type]


def test_losses_that_reach_nothing_shared() -> None:
    """Neither in the exact call nor after; such a matrix is all zeros, so that each call is exact."""
    model = Model()
    optimizer = projecting(torch.optim.SGD(model.parameters()), shared=model.unused.parameters(), gram_every=3)
    for _ in range(2):
        optimizer.zero_grad()
        assert not optimizer.backward(model()).any()
        assert model.unused.weight.grad is None and model.heads[0].weight.grad is not None
    frozen = Model().requires_grad_(False)
    frozen.heads.requires_grad_(True)
    optimizer = projecting(torch.optim.SGD(frozen.parameters()), shared=frozen.trunk.parameters(), gram_every=3)
    for _ in range(2):
        optimizer.backward(frozen())
    assert all(p.grad is not None for p in frozen.heads.parameters())


def test_other_numbers_of_losses(exact: list[bool]) -> None:
    model = Trunk("modules")
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), changing, gram_every=10)
    for count in (3, 3, 2, 2, 3, 3):
        gram = optimizer.backward(model()[:count])
        assert gram.shape == (count, count)
    assert exact == [True, False] * 3


def test_checkpoints(exact: list[bool]) -> None:
    """The weights are not in them: the next call is exact."""
    model = Trunk("modules")
    sgd = torch.optim.SGD(model.parameters())
    optimizer = mk.optim.GramWeighted(sgd, changing, gram_every=5)
    for _ in range(2):
        optimizer.backward(model())
    state = optimizer.state_dict()
    assert state.keys() == sgd.state_dict().keys()
    optimizer.load_state_dict(state)
    for _ in range(2):
        optimizer.backward(model())
    assert exact == [True, False, True, False]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(clone: Callable[[Any], Any], exact: list[bool]) -> None:
    """They go on by the same weights, for as many calls, and do not share them."""
    model = Trunk("mmoe")
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters(), 0.1), changing, gram_every=3)
    optimizer.backward(model())
    pair = clone((model, optimizer))
    for m, o in ((model, optimizer), pair):
        exact.clear()
        for m.batch in range(1, 5):
            o.zero_grad()
            o.backward(m())
            o.step()
        assert exact == [False, False, True, False]
    for a, b in zip(model.parameters(), pair[0].parameters(), strict=True):
        assert a is not b and torch.equal(a, b)


def test_scaler(exact: list[bool]) -> None:
    """``.grad`` is scaled by what the scaler has now, whatever it had when the weights were made."""
    model = Trunk("ple")
    shared = shared_of(model, "trunk")
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters(), 0.1), changing, shared=shared, gram_every=2)
    gram = optimizer.backward(model(), scaler=torch.amp.GradScaler("cpu", init_scale=64.0))
    optimizer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model.batch = 1
    torch.testing.assert_close(optimizer.backward(model(), scaler=scaler), gram)
    assert_grads(model, wanted(model, changing(gram), shared, reduction="mean"), 1024.0)
    assert exact == [True, False]


def test_overflow_is_not_kept(exact: list[bool]) -> None:
    """Weights that are not finite would spoil the calls that follow; each call is exact until they are."""
    model = Model(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizer = projecting(torch.optim.SGD(model.parameters(), 0.1), shared=model.shared(), gram_every=4)
    with torch.no_grad():
        model.y.mul_(100)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model(), scaler=scaler)
    scaler.step(optimizer)
    scaler.update(1.0)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(model(), scaler=scaler)
    assert exact == [True, True, True, False]
    assert all(bool(grad.isfinite().all()) for grad in grads_of(model.shared()) if grad is not None)


def test_a_call_that_fails_counts_for_nothing(exact: list[bool]) -> None:
    model = Trunk("modules")
    failing = [False, True, False]

    def weighting(gram: Tensor) -> Tensor:
        return gram[0] * torch.nan if failing.pop(0) else changing(gram)

    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), weighting, gram_every=2)
    optimizer.backward(model())
    with pytest.raises(TypeError, match=r"losses\[0\] must be a tensor"):
        optimizer.backward([1.0])  # type: ignore[list-item]
    optimizer.backward(model())
    before = grads_of(model.parameters())
    with pytest.raises(ValueError, match="weighting must return finite weights"):
        optimizer.backward(model())
    assert_close(grads_of(model.parameters()), before, rtol=0, atol=0)
    optimizer.backward(model())
    optimizer.backward(model())
    assert exact == [True, False, True, True, False]


def test_compiled_trunks(fresh_compiler: None) -> None:
    model = Trunk("modules")
    shared = shared_of(model, "trunk")
    model.trunk.compile(backend="aot_eager")
    optimizer = mk.optim.GramWeighted(torch.optim.SGD(model.parameters()), changing, shared=shared, gram_every=2)
    gram = optimizer.backward(model())
    optimizer.zero_grad()
    model.batch = 1
    optimizer.backward(model())
    assert_grads(model, wanted(model, changing(gram), shared, reduction="mean"))


def test_what_gram_every_may_not_be() -> None:
    sgd = torch.optim.SGD(Model().parameters())
    for wrong, kind, message in (
        (0, ValueError, "gram_every must be at least 1, got 0"),
        (-3, ValueError, "gram_every must be at least 1, got -3"),
        (2.0, TypeError, "gram_every must be an int, got float"),
        (True, TypeError, "gram_every must be an int, got bool"),
        (None, TypeError, "gram_every must be an int, got NoneType"),
    ):
        with pytest.raises(kind, match=message):
            mk.optim.GramWeighted(sgd, changing, gram_every=wrong)  # type: ignore[arg-type]
