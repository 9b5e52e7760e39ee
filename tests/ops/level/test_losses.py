"""Several losses whose backward passes run each level once: the gradients of passes on their own."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from mtlkernels.ops.level.node import level_of
from mtlkernels.ops.level.passes import cut, differentiate
from mtlkernels.testing import assert_within_budget
from tests.ops.level.test_derivatives import NoGradient
from tests.ops.level.test_partial import KINDS, ROUTINGS, Kind, Model, by_kind, gradients

# The outputs that each loss reads: one, several, all, the same as another's.
LOSSES = [(0,), (1,), (0, 2), (0,), (0, 1, 2)]


def together(losses: list[Tensor], tensors: dict[str, Tensor], num_parts: int) -> list[dict[str, Tensor | None]]:
    parts = cut(losses)
    assert len(parts) == num_parts
    found = differentiate([([loss], None) for loss in losses], parts, list(tensors.values()))
    return [dict(zip(tensors, grads, strict=True)) for grads in found]


def apart(losses: list[Tensor], tensors: dict[str, Tensor]) -> list[dict[str, Tensor | None]]:
    found = [torch.autograd.grad(y, list(tensors.values()), allow_unused=True, retain_graph=True) for y in losses]
    return [dict(zip(tensors, grads, strict=True)) for grads in found]


def assert_same(found: Any, expected: Any, usual: Any) -> None:
    """None for the same tensors; and each loss's gradients within the budget that ``usual``, one by one, sets."""
    for own, exact, baseline in zip(found, expected, usual, strict=True):
        assert {n for n, g in own.items() if g is None} == {n for n, g in exact.items() if g is None}
        assert_within_budget(*map(by_kind, (own, exact, baseline)))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_a_level(routing: mk.Routing, kind: Kind, backend: str) -> None:
    for rows, dtype in ((9, torch.float64), (3, torch.float32), (70, torch.float32), (20, torch.bfloat16)):
        if dtype == torch.bfloat16 and kind.norm is not None:
            continue  # modules round between their steps
        make = functools.partial(Model, routing, kind, rows)
        exact, baseline, tested = make(torch.float64), make(dtype), make(dtype)
        chosen = [used for used in LOSSES if max(used) < routing.num_gates]
        with mk.use_backend(backend):
            outputs = tested.fused()
            losses = [sum(outputs[k].pow(3).sum() for k in used) for used in chosen]
            found = together(losses, tested.tensors, 2)  # type: ignore[arg-type]
        expected, usual = ([gradients(m.plain(), used, m.tensors) for used in chosen] for m in (exact, baseline))
        assert_same(found, expected, usual)


@pytest.mark.parametrize("kind", ["logits", "linear gates"])
@pytest.mark.parametrize("rows", [0, 3, 70])
def test_frozen_experts(rows: int, kind: str, backend: str) -> None:
    """Only the gates want gradients."""
    routing, losses = ROUTINGS["cgc"], [(0,), (0, 1), (1,)]
    exact, baseline, tested = (
        Model(routing, KINDS[kind], rows, dtype) for dtype in (torch.float64, torch.float32, torch.float32)
    )
    for model in (exact, baseline, tested):
        for name, tensor in model.tensors.items():
            tensor.requires_grad_(name.startswith("gates"))
    gates = [{n: t for n, t in m.tensors.items() if t.requires_grad} for m in (exact, baseline, tested)]
    with mk.use_backend(backend):
        outputs = tested.fused()
        found = together([sum(outputs[k].pow(3).sum() for k in used) for used in losses], gates[2], 2)  # type: ignore[misc]
    expected, usual = (
        [gradients(m.plain(), used, own) for used in losses]
        for m, own in zip((exact, baseline), gates[:2], strict=True)
    )
    assert_same(found, expected, usual)


@pytest.mark.parametrize("rows", [4, 300, 700])
def test_threads_and_blocks_of_rows(rows: int, backend: str) -> None:
    torch.set_num_threads(2)
    make = functools.partial(Model, ROUTINGS["cgc"], KINDS["linear gates"], rows)
    exact, baseline, tested = make(torch.float64), make(torch.float32), make(torch.float32)
    with mk.use_backend(backend):
        outputs = tested.fused()
        found = together([outputs[k].pow(3).sum() for k in (0, 1, 0)], tested.tensors, 2)
    expected, usual = ([gradients(m.plain(), (k,), m.tensors) for k in (0, 1, 0)] for m in (exact, baseline))
    assert_same(found, expected, usual)


class Tower(nn.Module):
    """PLE or MMoE with gate layers or without, towers, and an embedding below."""

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(rng.randrange(1000))
        self.tasks = rng.randint(2, 4)
        options: dict[str, Any] = {"expert_units": (6, 4), "gate_units": rng.choice([(), (5,)])}
        options |= {"batch_norm": rng.random() < 0.3, "activation": rng.choice(["relu", "gelu", "prelu"])}
        if rng.random() < 0.7:
            shape = {
                "num_specific": rng.randint(1, 2),
                "num_shared": rng.randint(1, 2),
                "num_levels": rng.randint(1, 3),
            }
            self.trunk: nn.Module = mk.nn.PLE(5, self.tasks, **shape, **options)
        else:
            self.trunk = mk.nn.MMoE(5, self.tasks, num_experts=3, **options)
        self.embedding = nn.Embedding(20, 5)
        self.towers = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)) for _ in range(self.tasks)
        )
        self.to(dtype)
        self.ids = torch.randint(20, (13,))
        # Losses that read one task's output, several, or one of two losses for one output.
        self.read = [[t] for t in range(self.tasks)] + [rng.sample(range(self.tasks), 2), [0]]

    def forward(self) -> list[Tensor]:
        streams = self.trunk(self.embedding(self.ids))
        outputs = [tower(stream) for tower, stream in zip(self.towers, streams, strict=True)]
        return [torch.cat([outputs[t] for t in read]).square().mean() for read in self.read]


@pytest.mark.parametrize("seed", range(20))
def test_models(seed: int, backend: str) -> None:
    """Levels one above the other, with what lies between, above and below them."""
    with mk.use_backend(backend):
        exact, model = (Tower(random.Random(seed), dtype) for dtype in (torch.float64, torch.float32))
        found = together(model(), dict(model.named_parameters()), 1 + getattr(model.trunk, "num_levels", 1))
        usual = apart(model(), dict(model.named_parameters()))
    with mk.use_backend("reference"):
        expected = apart(exact(), dict(exact.named_parameters()))
    for own, true, baseline in zip(found, expected, usual, strict=True):
        assert {n for n, g in own.items() if g is None} == {n for n, g in baseline.items() if g is None}
        names = [name for name, grad in own.items() if grad is not None]
        assert_within_budget(*({name: [grads[name]] for name in names} for grads in (own, true, baseline)))


def ple() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return mk.nn.PLE(5, 2, num_specific=1, num_shared=1, expert_units=(6, 4)), torch.randn(7, 5)


def test_losses_that_no_level_reaches() -> None:
    model, x = ple()
    other = torch.ones(3, requires_grad=True)
    leaf = torch.ones((), requires_grad=True)
    losses = [model(x)[0].sum(), (2 * other).sum(), leaf]
    tensors = {**dict(model.named_parameters()), "other": other, "leaf": leaf}
    found = together(losses, tensors, 3)
    assert [name for name, grad in found[1].items() if grad is not None] == ["other"]
    assert [name for name, grad in found[2].items() if grad is not None] == ["leaf"]
    assert found[1]["other"].tolist() == [2, 2, 2] and found[2]["leaf"] == 1  # type: ignore[union-attr]


def test_no_gradient_comes_to_a_level() -> None:
    """Who uses its outputs sends nothing back."""
    trunk, heads = mk.nn.MMoE(5, 2, (6, 4), num_experts=2), [nn.Linear(4, 1), nn.Linear(4, 1)]
    outputs = trunk(torch.randn(7, 5))
    losses = [head(NoGradient.apply(y)).square().sum() for head, y in zip(heads, outputs, strict=True)]
    tensors = {"head": heads[0].weight, **dict(trunk.named_parameters())}
    found = [[name for name, grad in own.items() if grad is not None] for own in together(losses, tensors, 2)]
    assert found == [["head"], []]


def test_a_graph_that_goes_past_a_level_is_not_cut() -> None:
    """What is below would get its gradient in two pieces, and a hook would see both."""
    model, x = ple()
    stem = nn.Linear(5, 5)
    hidden = stem(x)
    assert len(cut([y.sum() + hidden.sum() for y in model(hidden)])) == 1
    assert len(cut([y.sum() + stem(x).sum() for y in model(hidden)])) == 1  # the stem's weight has two users
    assert len(cut([y.sum() for y in model(hidden)])) == 3


def test_hooks_see_whole_gradients() -> None:
    """Of parameters, of the trunk's outputs and of its input; they may change gradients."""
    seen: dict[str, list[Tensor | None]] = {}

    def watch(name: str, tensor: Tensor) -> None:
        def hook(grad: Tensor | None) -> Tensor | None:
            seen.setdefault(name, []).append(grad)
            return None if grad is None else 2 * grad

        tensor.register_hook(hook)

    results = []
    for run in (together, lambda losses, tensors, _: apart(losses, tensors)):
        seen.clear()
        model, x = ple()
        stem = nn.Linear(5, 5)
        hidden = stem(x)
        outputs = model(hidden)
        tensors = dict(stem.named_parameters()) | dict(model.named_parameters())
        for name, tensor in {"input": hidden, "output": outputs[0], "weight": next(model.parameters())}.items():
            watch(name, tensor)
        found = run([y.square().sum() for y in outputs], tensors, 3)
        results.append(([list(grads.values()) for grads in found], {name: len(grads) for name, grads in seen.items()}))
    assert results[0][1] == results[1][1]
    for own, wanted in zip(*(grads for grads, _ in results), strict=True):
        torch.testing.assert_close(own, wanted)


def test_no_pass_ends_at_a_hook() -> None:
    """Which would be called in it, though the gradient is not whole; then each loss has a pass of its own."""
    weights, gates = ([torch.randn(n, 5, requires_grad=True) for _ in range(2)] for n in (4, 2))
    routing = mk.Routing((0, 0), ((0, 1), (0, 1)))
    leaves = [*weights, *gates]
    for hooked in range(len(leaves) + 1):
        outputs = mk.expert_mixture(torch.randn(7, 5), [weights], None, None, routing, gate_weights=gates)
        assert len(cut([y.square().sum() for y in outputs])) == (2 if hooked < len(leaves) else 1)
        if hooked < len(leaves):
            leaves[hooked].register_hook(lambda grad: grad)


def watched_stem(stem: nn.Module, x: Tensor) -> Tensor:
    hidden: Tensor = stem(x)
    hidden.register_hook(lambda grad: 0.1 * grad)  # whoever gives it None fails
    return hidden


def test_a_hook_on_the_stem_under_autocast() -> None:
    """Where a pass may end at no parameter, as the level reads copies of these; the hook never gets None."""
    modules, x = nn.ModuleList([nn.Linear(5, 5), mk.nn.MMoE(5, 2, (6, 4), num_experts=2)]), torch.randn(7, 5)

    def losses(modules: nn.ModuleList, x: Tensor) -> list[Tensor]:
        stem, trunk = modules
        return [y.to(x.dtype).square().sum() for y in trunk(watched_stem(stem, x))]

    exact = copy.deepcopy(modules).double()
    expected = apart(losses(exact, x.double()), dict(exact.named_parameters()))
    runs = []
    for run in (lambda losses, tensors: together(losses, tensors, 2), apart):
        with torch.autocast("cpu", torch.bfloat16):
            own = losses(modules, x)
        runs.append(run(own, dict(modules.named_parameters())))
    assert_same(runs[0], expected, runs[1])


def in_another_thread(stem: nn.Module, x: Tensor) -> Tensor:
    """Where autograd counts nodes anew."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: torch.tanh(stem(x))).result()


@pytest.mark.parametrize("below", [watched_stem, in_another_thread])
def test_a_pass_ends_at_a_leaf_of_the_level(below: Callable[[nn.Module, Tensor], Tensor]) -> None:
    """One of its own: no tensor between it and the stems, which are what was made last."""
    stems, x = [nn.Linear(5, 5), nn.Linear(5, 5)], torch.randn(7, 5)
    weights, gates = ([torch.randn(n, 5, requires_grad=True) for _ in range(2)] for n in (4, 2))
    routing = mk.Routing((0, 1), ((0, 1), (0, 1)))
    for _ in range(20):
        stems[0](x)

    def losses() -> list[Tensor]:
        hidden = torch.tanh(stems[0](x))
        streams = [hidden, below(stems[1], hidden)]
        return [
            y.square().sum() for y in mk.expert_mixture(streams, [weights], None, None, routing, gate_weights=gates)
        ]

    named = [*weights, *gates, *stems[0].parameters(), *stems[1].parameters()]
    tensors = {str(i): tensor for i, tensor in enumerate(named)}
    for own, wanted in zip(together(losses(), tensors, 2), apart(losses(), tensors), strict=True):
        torch.testing.assert_close(own, wanted)


def test_a_trunk_that_is_its_own_stem_is_not_cut() -> None:
    """Each of its leaves is that of two levels: a pass that ended there would run both."""
    routing = mk.Routing.mmoe(2, 2)
    weights, gates = ([torch.randn(n, 5, requires_grad=True) for _ in range(2)] for n in (5, 2))

    def level(x: Tensor) -> Any:
        return mk.expert_mixture(x, [weights], None, None, routing, gate_weights=gates)

    user, item = level(torch.randn(4, 5)), level(level(torch.randn(4, 5))[0])
    losses = [(a.square().sum() + b.square().sum()) for a, b in zip(user, item, strict=True)]
    assert len(cut(losses)) == 1


def test_hooks_on_a_module_see_one_loss_after_another() -> None:
    """They keep what they see at its outputs until they come to its inputs."""
    trunk, stem, x = mk.nn.MMoE(5, 2, (6, 4), num_experts=2), nn.Linear(5, 5), torch.randn(7, 5)
    parameters = [*trunk.parameters(), *stem.parameters()]
    seen: list[int] = []

    def hook(module: nn.Module, grad_input: Any, grad_output: Any) -> Any:
        seen.append(1)
        return tuple(None if grad is None else 3 * grad for grad in grad_input)

    trunk.register_full_backward_hook(hook)
    assert len(cut([y.square().sum() for y in trunk(stem(x))])) == 1
    results = []
    for batched in (False, None):
        seen.clear()
        optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters, lr=0.1), batched=batched)
        optimizer.zero_grad()
        optimizer.pc_backward([y.square().sum() for y in trunk(stem(x))])
        assert len(seen) == 2
        results.append([p.grad for p in parameters])
    torch.testing.assert_close(*results)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this PyTorch has no dtypes of gradients")
def test_gradients_have_the_dtype_that_their_leaf_wants() -> None:
    trunk, x = mk.nn.MMoE(5, 2, (6, 4), num_experts=2).to(torch.bfloat16), torch.randn(7, 5, dtype=torch.bfloat16)
    tensors = dict(trunk.named_parameters())
    for tensor in tensors.values():
        tensor.grad_dtype = torch.float32  # type: ignore[attr-defined]
    for grads in together([y.square().sum() for y in trunk(x)], tensors, 2):
        assert {grad.dtype for grad in grads.values() if grad is not None} == {torch.float32}


def test_what_is_saved_is_freed() -> None:
    model, x = ple()
    losses = [y.sum() for y in model(x)]
    together(losses, dict(model.named_parameters()), 3)
    for loss in losses:
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)


def test_checkpointing_recomputes_a_level_once() -> None:
    model, x = ple()
    calls = []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    tensors = dict(model.named_parameters())
    expected = apart([y.square().sum() for y in model(x)], tensors)
    calls.clear()
    outputs = checkpoint(model, x, use_reentrant=False)
    found = together([y.square().sum() for y in outputs], tensors, 3)
    assert len(calls) <= 3  # forward, and again for each of its two levels
    for own, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(own, wanted)


def test_an_error_leaves_the_levels_as_they_were() -> None:
    model, x = ple()
    x.requires_grad_()
    outputs = model(x)
    x.register_hook(lambda _: 1 / 0)
    losses = [y.sum() for y in outputs]
    parts = cut(losses)
    with pytest.raises(ZeroDivisionError):
        differentiate([([loss], None) for loss in losses], parts, [x])
    assert all(level_of(part.level).losses is None for part in parts[1:])
