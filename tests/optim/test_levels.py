"""mk.optim.PCGrad on models with fused levels: the gradients of the same model's modules, whatever lies around them."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import mtlkernels as mk
from mtlkernels.ops.level import passes
from mtlkernels.optim import _task_gradients
from mtlkernels.testing import assert_within_budget
from tests.convert.models import by_name, features, mmoe, ple, rechub_mmoe, rechub_ple
from tests.ops.level.test_norms_pytorch import COMPILING

ROWS = 24
LIBRARIES: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Any]]] = {
    "rechub PLE": (rechub_ple, by_name),
    "rechub MMOE": (rechub_mmoe, by_name),
    "deepctr PLE": (ple, lambda x: x),
    "deepctr MMOE": (mmoe, lambda x: x),
    "deepctr PLE, batch norm": (lambda: ple(dnn_use_bn=True), lambda x: x),
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Into how many parts the graph of each call was cut."""
    found: list[int] = []

    def cut(losses: Any, count: int) -> Any:
        parts = passes.cut(losses, count)
        found.append(len(parts))
        return parts

    monkeypatch.setattr(_task_gradients, "cut", cut)
    return found


def surgery(model: nn.Module, losses: Callable[[], list[Tensor]], **options: Any) -> dict[str, Tensor | None]:
    """What a call leaves in ``.grad``; every parameter is shared."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(3)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()), generator=generator, **options)
    optimizer.pc_backward(losses())
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """In float64, where what is exactly zero is rounding: within so many epsilons of the largest gradient of all."""
    assert {name for name, g in found.items() if g is None} == {name for name, g in expected.items() if g is None}
    pairs = [(g.to_dense(), expected[name].to_dense()) for name, g in found.items() if g is not None]  # type: ignore[union-attr]
    largest = max(float(wanted.abs().max()) for _, wanted in pairs)
    assert largest > 0
    for grad, wanted in pairs:
        assert float((grad - wanted).abs().max()) <= 64 * torch.finfo(torch.float64).eps * largest


class Tied(nn.Module):
    """Two levels of the same experts."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ParameterList(torch.randn(6, 6) / 2 for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, x: Tensor) -> list[Tensor]:
        first, second = mk.Routing.mmoe(3, 2), mk.Routing((0, 1, 0), ((0, 1, 2), (0, 1, 2)))
        streams = mk.expert_mixture(x, [list(self.experts)], None, self.gates[0](x), first, activation="tanh")
        streams = mk.expert_mixture(streams, [list(self.experts)], None, self.gates[1](x), second, activation="tanh")
        return [streams[0].square().mean(), streams[1].mean()]


def test_weights_of_two_levels(runs: list[int]) -> None:
    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(ROWS, 6, dtype=torch.float64)
    assert_same(surgery(model, lambda: model(x)), surgery(model, lambda: model(x), batched=False))
    assert runs == [3]  # the losses, and what is below each level


@pytest.mark.parametrize("hook", [False, True])
def test_weights_that_a_loss_reaches_past_their_level(hook: bool, runs: list[int]) -> None:
    """As a penalty on them does: a pass that is after them would run the level, so that nothing is cut."""
    torch.manual_seed(0)
    model, x = Tied().double(), torch.randn(ROWS, 6, dtype=torch.float64)
    if hook:
        model.experts[0].register_hook(lambda grad: grad.clamp(-0.01, 0.01))

    def losses() -> list[Tensor]:
        first, second = model(x)
        return [first, second, model.experts[0].square().sum() + first.sqrt()]

    assert_same(surgery(model, losses), surgery(model, losses, batched=False))
    assert runs == [1]


@pytest.mark.parametrize("name", LIBRARIES)
def test_converted_models(name: str, runs: list[int]) -> None:
    """Three passes of a library's PLE and one of its MMOE meet their levels together."""
    make, arguments = LIBRARIES[name]
    original = make().double()
    model = copy.deepcopy(original)
    mk.convert(model)
    x, y = features(ROWS).double(), torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(1)).round().double()

    def losses(of: nn.Module) -> list[Tensor]:
        outputs = of(arguments(x))
        return [F.binary_cross_entropy(outputs[:, t], y[:, t]) for t in range(outputs.shape[1])]

    found = surgery(model, lambda: losses(model))
    expected = surgery(original, lambda: losses(original), batched=False)
    assert runs and runs[0] > 1
    assert_same(found, expected)


class Model(nn.Module):
    """An embedding, PLE of two levels and towers."""

    def __init__(self, dtype: torch.dtype = torch.float64, *, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(30, 6, sparse=sparse)
        self.trunk = mk.nn.PLE(6, 3, num_specific=2, num_shared=2, expert_units=(8, 5), dropout=0.0)
        self.towers = nn.ModuleList(nn.Linear(5, 1) for _ in range(3))
        self.to(dtype)
        self.ids = torch.randint(30, (ROWS,))
        self.y = torch.randn(3, ROWS, 1).to(dtype)
        self.way: list[Callable[[Tensor], Any]] = [self.trunk]  # in a list, so that it is not a module's child

    def forward(self) -> list[Tensor]:
        streams = self.way[0](self.embedding(self.ids))
        outputs = [tower(h) for tower, h in zip(self.towers, streams, strict=True)]
        return [
            F.mse_loss(out.float() if out.dtype != y.dtype else out, y) for out, y in zip(outputs, self.y, strict=True)
        ]


def test_sparse_embeddings(runs: list[int]) -> None:
    found = surgery(model := Model(sparse=True), model)
    assert runs == [3]
    assert found["embedding.weight"].is_sparse  # type: ignore[union-attr]
    assert_same(found, surgery(model := Model(), model, batched=False))


def test_heads_of_their_own_and_accumulation(runs: list[int]) -> None:
    results = []
    for batched in (None, False):
        model = Model()
        sgd = torch.optim.SGD(model.parameters())
        optimizer = mk.optim.PCGrad(
            sgd, shared=model.trunk.parameters(), batched=batched, generator=torch.Generator().manual_seed(2)
        )
        for _ in range(2):
            optimizer.pc_backward(model())
        results.append({name: p.grad for name, p in model.named_parameters()})
    assert runs == [3, 3]
    assert_same(*results)


def test_scaler_and_autocast(runs: list[int]) -> None:
    results = []
    for batched in (None, False):
        model = Model(torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        optimizer = mk.optim.PCGrad(
            torch.optim.SGD(model.parameters()), batched=batched, generator=torch.Generator().manual_seed(2)
        )
        with torch.autocast("cpu", torch.bfloat16):
            losses = model()
        gram = optimizer.pc_backward(losses, scaler=scaler)
        results.append([gram, *(p.grad for p in model.parameters())])
    assert runs == [3]
    for found, expected in zip(*results, strict=True):  # the same products of the same numbers
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_checkpointing(runs: list[int]) -> None:
    model = Model()
    model.way = [lambda x: checkpoint(model.trunk, x, use_reentrant=False)]
    found = surgery(model, model)
    assert runs == [3]
    assert_same(found, surgery(model := Model(), model, batched=False))


@pytest.mark.parametrize("options", [{}, {"batch_norm": True}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("inside", ["trunk", "trunk and towers", "a checkpoint of the trunk, and towers"])
def test_checkpoints_are_computed_no_more_often(inside: str, levels: int, options: dict[str, Any]) -> None:
    """Than by a pass a loss, each of which brings running statistics up to date once more; less often where levels
    alone are in one, without what drops, whose gates are outside of them."""
    found = []
    for batched in (None, False):
        torch.manual_seed(0)
        trunk = mk.nn.PLE(6, num_tasks=3, expert_units=(5, 4), num_specific=1, num_levels=levels, **options).double()
        front = nn.Linear(6, 6, dtype=torch.float64)
        towers = nn.ModuleList(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1)) for _ in range(3)).double()
        model = nn.ModuleList([front, trunk, towers])
        calls: list[int] = []

        def ends(hidden: Any, towers: Any = towers) -> Any:
            return [tower(h) for tower, h in zip(towers, hidden, strict=True)]

        def within(x: Tensor, trunk: Any = trunk, front: Any = front, calls: Any = calls, ends: Any = ends) -> Any:
            calls.append(1)
            if inside == "trunk":
                return trunk(x)
            return ends(checkpoint(trunk, front(x), use_reentrant=False) if inside[0] == "a" else trunk(front(x)))

        x = torch.randn(ROWS, 6, dtype=torch.float64)
        outputs = checkpoint(within, front(x) if inside == "trunk" else x, use_reentrant=False)
        losses = [y.square().mean() for y in (ends(outputs) if inside == "trunk" else outputs)]
        gradients = surgery(model, lambda losses=losses: losses, batched=batched)  # type: ignore[misc]
        found.append((gradients, dict(model.named_buffers()), len(calls)))
    assert_same(found[0][0], found[1][0])
    for name, value in found[1][1].items():
        torch.testing.assert_close(found[0][1][name], value, msg=name)
    assert [calls for *_, calls in found] == [4 if inside != "trunk" or options else 1 + levels, 4]


def test_two_passes_by_kept_weights_share_no_checkpoint_of_three_levels() -> None:
    """Which would be computed again for each of them."""
    trunk = mk.nn.PLE(6, num_tasks=4, expert_units=(5, 4), num_specific=1, num_levels=3)
    losses = [y.square().mean() for y in checkpoint(trunk, torch.randn(ROWS, 6), use_reentrant=False)]
    assert len(passes.cut(losses)) == 4
    assert len(passes.cut(losses, 2)) == 1


def test_a_node_does_not_hold_what_goes_into_a_checkpoint() -> None:
    trunk = mk.nn.MMoE(6, num_tasks=3, expert_units=(5, 4), num_experts=3)
    seen: list[Any] = []

    def within(x: Tensor) -> Any:
        seen.append(trunk(x))  # as a module does that keeps its outputs to be looked at
        return seen[-1]

    x = torch.randn(ROWS, 6)
    sum(y.sum() for y in checkpoint(within, x, use_reentrant=False)).backward()
    reference = weakref.ref(x)
    del x
    assert reference() is None


@pytest.mark.parametrize("more", [False, True])
def test_what_is_saved_beside_a_level_is_counted(more: bool, backend: str) -> None:
    """One tensor more, beside the seed of what drops."""
    weights = [torch.randn(3, 5, 6, requires_grad=True)]

    def within(x: Tensor, logits: Tensor) -> Any:
        outputs = mk.expert_mixture(x, [weights[0].unbind()], None, logits, mk.Routing.mmoe(3, 2), dropout=0.3)
        return [outputs[0].sin() if more else outputs[0], outputs[1]]

    x, logits = torch.randn(ROWS, 6, requires_grad=True), torch.randn(ROWS, 6, requires_grad=True)
    with mk.use_backend(backend):
        losses = [y.sum() for y in checkpoint(within, x, logits, use_reentrant=False)]
        assert len(passes.cut(losses)) == (1 if more else 2)


@pytest.mark.parametrize("place", ["alone", "around a checkpoint", "in a checkpoint"])
def test_hooks_on_what_is_saved(place: str, runs: list[int]) -> None:
    """Which are no checkpoint; in one, or around one, how often it is computed again is not known."""
    model = Model()

    def way(x: Tensor) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return checkpoint(model.trunk, x, use_reentrant=False) if "around" in place else model.trunk(x)

    model.way = [way if place[0] == "a" else lambda x: checkpoint(way, x, use_reentrant=False)]
    found = surgery(model, model)
    assert runs == [3 if place == "alone" else 1]
    assert_same(found, surgery(model := Model(), model, batched=False))


def test_a_checkpoint_that_is_gone_is_refused_as_by_pytorch() -> None:
    model = mk.nn.MMoE(6, num_tasks=2, expert_units=(4,), num_experts=2)
    optimizer = mk.optim.PCGrad(torch.optim.SGD(model.parameters()))
    losses = [y.sum() for y in checkpoint(model, torch.randn(ROWS, 6), use_reentrant=False)]
    optimizer.pc_backward(losses)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        optimizer.pc_backward(losses)


def test_losses_that_reach_some_tasks() -> None:
    """Two losses of one task, one of two tasks, one that the trunk has no part in, and tasks that no loss reads."""
    for chosen in ([[0], [0], [2]], [[0, 2], [1]], [[1], []], [[2]]):

        def losses(model: Model, chosen: list[list[int]] = chosen) -> list[Tensor]:
            all_losses = model()
            weight = model.towers[0].weight
            return [sum((all_losses[t] for t in tasks), weight.square().sum() * 1e-3) for tasks in chosen]

        model, plain = Model(), Model()
        found = surgery(model, lambda model=model: losses(model))  # type: ignore[misc]
        assert_same(found, surgery(plain, lambda plain=plain: losses(plain), batched=False))  # type: ignore[misc]


def test_past_a_level_passes_have_nothing_in_common(runs: list[int]) -> None:
    """Something adds what a level reads to what it gives: the graph is not cut, and the gradients are right."""
    models = Model(), Model()
    for model in models:
        adapter = nn.Linear(6, 5, dtype=torch.float64)
        nn.init.ones_(adapter.weight)
        nn.init.zeros_(adapter.bias)
        model.way = [lambda x, trunk=model.trunk, adapter=adapter: [h + adapter(x) for h in trunk(x)]]
    found, expected = (surgery(m, m, batched=b) for m, b in zip(models, (None, False), strict=True))
    assert runs == [1]
    assert_same(found, expected)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
class TestCompiled:
    pytestmark = [
        *COMPILING,
        # PyTorch looks at .grad of all that goes into compiled code.
        pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    ]

    @pytest.mark.parametrize("trained_before", [False, True])
    def test_a_compiled_trunk(self, compiler: str, trained_before: bool) -> None:
        """Inductor's buffers can be walked through once unless it is told otherwise, which PyTorch then says.

        Its cache, which is not told, may hand out the same code.
        """
        torch.compiler.reset()
        model = Model(torch.float32)
        model.way = [torch.compile(model.trunk, backend=compiler)]
        if trained_before:
            sum(model()).backward()  # type: ignore[union-attr]
        with contextlib.ExitStack() as stack:
            found: dict[str, Tensor | None] = {}
            try:
                found = surgery(model, model)
            except RuntimeError as error:
                assert "torch._functorch.config.donated_buffer" in str(error)
                assert all(p.grad is None for p in model.parameters())
                torch.compiler.reset()
                stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
                stack.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
                model.way = [torch.compile(model.trunk, backend=compiler)]
                found = surgery(model, model)
        exact = Model()
        expected = surgery(exact, exact, batched=False)
        usual = surgery(model := Model(torch.float32), model, batched=False)
        names = [name for name, grad in expected.items() if grad is not None]
        assert {name for name, grad in found.items() if grad is not None} == set(names)
        assert_within_budget(*({name: [grads[name]] for name in names} for grads in (found, expected, usual)))


@pytest.mark.filterwarnings("ignore:Anomaly Detection", "ignore:Error detected")
@pytest.mark.parametrize("gram_every", [None, 2])
def test_anomalies_are_found_in_the_level(gram_every: int | None) -> None:
    """A row that no loss reads makes the level's own gradients NaN, by kept weights of tasks too."""
    trunk = mk.nn.MMoE(8, 2, (6, 4), num_experts=3)
    inner = torch.optim.SGD(trunk.parameters(), 0.1)
    optimizer: Any = mk.optim.PCGrad(inner)
    if gram_every is not None:
        optimizer = mk.optim.GramWeighted(inner, lambda gram: gram.new_ones(len(gram)), gram_every=gram_every)
    x = torch.randn(ROWS, 8)

    def step() -> None:
        optimizer.backward([y[4:].square().mean() for y in trunk(x)])

    with torch.autograd.set_detect_anomaly(True):
        step()
        x[3] = torch.nan
        with pytest.raises(RuntimeError, match=r"Function '.*(ExpertMixture|Level).*' returned nan"):
            step()
