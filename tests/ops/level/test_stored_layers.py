"""Levels with norms by the batch, dropout and slopes go past the checks in Python, and give what these would give."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtlkernels as mk
from mtlkernels.ops import level as level_op
from mtlkernels.ops.level.node import level_of
from tests import requires
from tests.seeding import seed

pytestmark = requires.cpp_kernels
ROUTING = mk.Routing.cgc(2, 2, 1, single_input=True)
EXPERTS, ROWS, WIDTHS = ROUTING.num_experts, 9, (6, 5, 4)
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def batch_norm(**options: Any) -> Callable[[int], nn.Module]:
    return lambda width: nn.BatchNorm1d(width, **options)


NORMS: dict[str, Callable[[int], nn.Module] | None] = {
    "batch norm": batch_norm(),
    "a large momentum": batch_norm(momentum=0.7, eps=0.1),
    "all batches": batch_norm(momentum=None),
    "without affine": batch_norm(affine=False),
    "without statistics": batch_norm(track_running_stats=False),
    "layer norm": nn.LayerNorm,
    "layer norm without shifts": lambda width: nn.LayerNorm(width, bias=False),
    "none": None,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "relu": {},
    "dropped": {"dropout": [0.0, 0.4]},
    "dropped alike": {"dropout": 0.3},
    "prelu": {"activation": "prelu"},
    "dice, dropped": {"activation": ["dice", "relu"], "dropout": 0.2},
}


class Level(nn.Module):
    """A level whose layers have norms of a kind, all of one dtype but for what stays in float32."""

    def __init__(self, norm: str = "batch norm", options: str = "relu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        seed(0)
        make, pairs = NORMS[norm], list(zip(WIDTHS, WIDTHS[1:], strict=False))
        self.linears = nn.ModuleList(nn.ModuleList(nn.Linear(a, b) for _ in range(EXPERTS)) for a, b in pairs)
        self.norms = (
            None
            if make is None
            else nn.ModuleList(nn.ModuleList(make(width) for _ in range(EXPERTS)) for width in WIDTHS[1:])
        )
        self.gates = nn.ModuleList(nn.Linear(WIDTHS[0], len(gate)) for gate in ROUTING.gate_experts)
        self.options = OPTIONS[options]
        names = self.options.get("activation", "relu")
        names = [names] * 2 if isinstance(names, str) else names
        self.slopes = nn.ParameterList(
            nn.Parameter(torch.rand(width))
            for width, name in zip(WIDTHS[1:], names, strict=True)
            for _ in range(EXPERTS)
        )
        self.sloped = [name in ("prelu", "dice") for name in names]
        self.to(dtype)
        self.x = torch.randn(ROWS, WIDTHS[0]).to(dtype).requires_grad_()

    def forward(self, linear: bool = True) -> tuple[Tensor, ...]:
        layers: Any = self.linears
        gates: Any = self.gates
        given: dict[str, Any] = dict(self.options)
        if any(self.sloped):
            slopes = [list(self.slopes[i * EXPERTS : (i + 1) * EXPERTS]) for i in range(2)]
            given["slopes"] = [own if sloped else None for own, sloped in zip(slopes, self.sloped, strict=True)]
        if linear:
            given["gate_weights"] = [gate.weight for gate in gates]
            given["gate_biases"] = [gate.bias for gate in gates]
        return mk.expert_mixture(
            self.x,
            [[linear.weight for linear in layer] for layer in layers],
            [[linear.bias for linear in layer] for layer in layers],
            None if linear else [gate(self.x) for gate in gates],
            ROUTING,
            norms=self.norms,
            **given,
        )

    def loss(self, linear: bool = True) -> Tensor:
        return torch.stack([y.float().sin().sum() for y in self(linear)]).sum()

    def tensors(self) -> list[Tensor]:
        own = [p for name, p in self.named_parameters() if not name.startswith("slopes") or any(self.sloped)]
        return [self.x, *own]

    def versions(self) -> list[int]:
        return [buffer._version for buffer in self.buffers()]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Callable[[], Any]], Any]]:
    """Runs something where every call goes through the checks in Python."""

    def run(what: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(level_op, "direct", lambda *_: "a test wants the checks")
            return what()

    yield run


def goes_past_checks(what: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    def refuse(*_: Any) -> Any:
        raise AssertionError("the checks in Python were asked")

    with monkeypatch.context() as patch:
        patch.setattr(level_op, "check_arguments", refuse)
        return what()


def everything(level: Level, linear: bool) -> Any:
    """Outputs, gradients, running statistics, versions, and where the generator of random numbers is."""
    torch.manual_seed(3)
    before = level.versions()
    ys = level(linear)
    grads = torch.autograd.grad([y.float().square().sum() for y in ys], level.tensors(), allow_unused=True)
    moved = [now - old for now, old in zip(level.versions(), before, strict=True)]
    return [*ys], grads, [*level.buffers()], moved, torch.get_rng_state()


@pytest.mark.parametrize("linear", [True, False], ids=["linear gates", "logits"])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("norm", NORMS)
def test_as_by_the_checks(norm: str, options: str, name: str, linear: bool, checked: Any, monkeypatch: Any) -> None:
    if norm == "none" and options == "relu":
        pytest.skip("nothing is stored of such a level")
    level = Level(norm, options, DTYPES[name])
    if name == "bfloat16":
        for module in level.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.float()
    other = copy.deepcopy(level)
    other.x = level.x.detach().clone().requires_grad_()
    for _ in range(2):
        expected = checked(lambda: everything(other, linear))
        found = goes_past_checks(lambda: everything(level, linear), monkeypatch)
        assert found[3] == expected[3]
        assert torch.equal(found[4], expected[4])
        # Gates of one product or of several add in another order.
        tolerances = {"rtol": 1e-2, "atol": 1e-2} if name == "bfloat16" else {"rtol": 2e-5, "atol": 2e-5}
        for part in range(3):
            torch.testing.assert_close(list(found[part]), list(expected[part]), **tolerances)


@pytest.mark.parametrize("norm", ["batch norm", "all batches", "layer norm"])
def test_without_gradients(norm: str, checked: Any, monkeypatch: Any) -> None:
    """Statistics move all the same, as when they are computed anew after training."""
    level = Level(norm)
    other = copy.deepcopy(level)
    with torch.no_grad():
        expected, found = checked(other.forward), goes_past_checks(level.forward, monkeypatch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close([*level.buffers()], [*other.buffers()])
    assert not any(y.requires_grad for y in found)


def test_the_node_is_of_cpp() -> None:
    level = Level("batch norm", "dice, dropped")
    node = level()[0].grad_fn
    assert not hasattr(node, "saved_tensors")
    own = level_of(node)
    spec = own.plan.spec
    assert [layer.dropout for layer in spec.layers] == [0.2, 0.2] and [layer.norm for layer in spec.layers] == [1, 1]
    assert spec.layers[0].dice_eps == 1e-3 and spec.layers[0].eps == 1e-5
    tensors = own.saved_tensors
    assert tensors[spec.num_tensors].dtype == torch.int64  # the seed
    assert len(tensors) == spec.num_tensors + 1 + own.num_saved


@pytest.mark.parametrize("options", ["relu", "dropped", "dice, dropped"])
def test_what_python_takes_over(options: str, checked: Any) -> None:
    """Derivatives of gradients, batched gradients, several losses at once."""
    level = Level("batch norm", options, torch.float64)
    for norm in level.modules():
        if isinstance(norm, nn.BatchNorm1d):
            norm.track_running_stats = False

    def twice() -> Any:
        torch.manual_seed(1)
        grads = torch.autograd.grad(level.loss(), level.tensors(), create_graph=True, allow_unused=True)
        of_grads = torch.stack([grad.square().sum() for grad in grads if grad is not None]).sum()
        return torch.autograd.grad(of_grads, level.tensors(), allow_unused=True)

    def batched() -> Any:
        torch.manual_seed(1)
        cotangents = torch.arange(3 * ROWS * WIDTHS[-1], dtype=torch.float64).view(3, ROWS, WIDTHS[-1]).cos()
        return torch.autograd.grad(level()[0], [level.x], cotangents, is_grads_batched=True)

    for run in (twice, batched):
        torch.testing.assert_close(run(), checked(run))


@pytest.mark.parametrize("options", ["relu", "dropped"])
def test_several_losses(options: str, checked: Any) -> None:
    level = Level("batch norm", options)
    level.x.requires_grad_(False)

    def step() -> Any:
        torch.manual_seed(2)
        optimizer = mk.optim.PCGrad(
            torch.optim.SGD(level.parameters(), lr=0.0), generator=torch.Generator().manual_seed(0)
        )
        optimizer.zero_grad()
        optimizer.pc_backward([y.square().sum() for y in level()])
        return [p.grad for p in level.parameters() if p.grad is not None]

    torch.testing.assert_close(step(), checked(step))


MISTAKES: dict[str, tuple[Callable[[Level], Any], str]] = {
    "one batch norm twice": (lambda level: level.norms[0].__setitem__(1, level.norms[0][0]), "each BatchNorm1d once"),
    "two eps": (lambda level: setattr(level.norms[1][2], "eps", 0.5), r"norms\[1\]\[2\] must have the eps"),
    "two modes": (lambda level: level.norms[0][1].eval(), r"norms\[0\] must all use the batch's statistics"),
    "a width": (lambda level: setattr(level.norms[0][1], "num_features", 7), "must normalize the 5 features"),
    "a scale": (
        lambda level: setattr(level.norms[0][1], "weight", nn.Parameter(torch.ones(3))),
        r"norms\[0\]\[1\].weight must have shape \[5\]",
    ),
    "one row": (lambda level: setattr(level, "x", level.x[:1]), "more than 1 value per channel"),
    "a missing norm": (lambda level: level.norms[1].pop(2), "must hold a module for each"),
    "a missing layer": (lambda level: level.norms.pop(1), "norms must hold an entry for each of 2 layers"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_found_before_statistics_move(name: str) -> None:
    level = Level()
    change, message = MISTAKES[name]
    change(level)
    before, random = copy.deepcopy(level.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        level()
    assert torch.equal(torch.get_rng_state(), random)
    for key, value in level.state_dict().items():
        assert torch.equal(value, before[key])


LEFT: dict[str, Callable[[Level], Any]] = {
    "statistics that want gradients": lambda level: level.norms[0][1].running_mean.requires_grad_(),
    "strided statistics": lambda level: setattr(level.norms[0][1], "running_mean", torch.zeros(10)[::2]),
    "a count of another dtype": lambda level: setattr(level.norms[0][1], "num_batches_tracked", torch.tensor(0.0)),
    "no count": lambda level: setattr(level.norms[0][1], "num_batches_tracked", None),
    "norms of two kinds of affine": lambda level: setattr(level.norms[0][1], "weight", None),
}


@pytest.mark.parametrize("name", LEFT)
def test_rare_norms_are_as_by_the_checks(name: str, checked: Any) -> None:
    level, other = Level(), Level()
    for one in (level, other):
        LEFT[name](one)
    expected, found = checked(other.forward), level()
    torch.testing.assert_close(found, expected)
    for a, b in zip(level.buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(a, b)
        assert a._version == b._version


@pytest.mark.parametrize("options", ["relu", "dropped", "dice, dropped"])
@pytest.mark.parametrize("norm", ["batch norm", "layer norm", "none"])
def test_compiled_autograd(norm: str, options: str) -> None:
    """It makes words of what a node keeps, numbers included."""
    if norm == "none" and options == "relu":
        pytest.skip("nothing is stored of such a level")
    level = Level(norm, options, torch.float64)
    torch.manual_seed(0)
    expected = torch.autograd.grad(level.loss(), level.tensors(), allow_unused=True)
    torch.manual_seed(0)
    loss = level.loss()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss.backward()
    torch.testing.assert_close([tensor.grad for tensor in level.tensors()], list(expected))


@pytest.mark.parametrize("wrong", ["weights", "logits", "slopes"])
def test_mistakes_leave_the_random_generator_alone(wrong: str) -> None:
    """Also those that C++ sees when it has drawn a seed already."""
    weights: Any = [torch.randn(3, 5, 3 if wrong == "weights" else 4)]
    logits = [torch.randn(8, 3, dtype=torch.float64 if wrong == "logits" else torch.float32)]
    slopes: Any = [torch.ones(3, 2 if wrong == "slopes" else 5)]
    x = torch.randn(8, 4)
    before = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError)):
        mk.expert_mixture(
            x,
            weights,
            None,
            logits,
            mk.Routing.mmoe(3, 1),
            activation="prelu",
            slopes=[list(slopes[0])],
            dropout=0.5,
        )
    assert torch.equal(torch.get_rng_state(), before)


def test_statistics_of_narrow_dtypes(checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of ``model.bfloat16()``, whose running statistics are bfloat16 too."""
    level = Level("batch norm", "relu", torch.bfloat16)
    other = copy.deepcopy(level)
    for _ in range(3):
        checked(other.forward)
        goes_past_checks(level.forward, monkeypatch)
    for a, b in zip(level.buffers(), other.buffers(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("kind", ["prelu", "batch norm", "dropped"])
def test_linear_gates(
    kind: str, streams: int, joined: bool, biased: bool, checked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads its own stream; those in one matrix, as trunks have them, go past the checks as well."""
    routing = mk.Routing((0, streams - 1, 0), ((0, 1), (0, 1, 2)))
    seed(0)
    xs = [torch.randn(ROWS, 5, requires_grad=True) for _ in range(streams)]
    weights, gates = [torch.randn(3, 4, 5)], [torch.randn(n, 5, requires_grad=True) for n in (2, 3)]
    biases = [torch.randn(n, requires_grad=True) for n in (2, 3)] if biased else []
    options: Any = {
        "prelu": {"activation": "prelu", "slopes": [[torch.full((1,), 0.3)] * 3]},
        "batch norm": {"norms": [[nn.BatchNorm1d(4) for _ in range(3)]]},
        "dropped": {"dropout": 0.3},
    }[kind]

    def run() -> list[Tensor]:
        torch.manual_seed(3)
        of_gates: Any = [gates, biases or None]
        if joined:
            of_gates = [own and torch.cat(own) for own in of_gates]
        given = {"gate_weights": of_gates[0], "gate_biases": of_gates[1], **options}
        ys = mk.expert_mixture(xs if streams > 1 else xs[0], weights, None, None, routing, **given)
        return [*ys, *torch.autograd.grad([y.square().sum() for y in ys], [*xs, *gates, *biases])]

    torch.testing.assert_close(goes_past_checks(run, monkeypatch), checked(run))


@pytest.mark.parametrize("wants", [False, True])
def test_a_list_of_one_stream(wants: bool, checked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    routing, x = mk.Routing((0, 0), ((0, 1), (0, 1))), torch.randn(ROWS, 5)
    gates, norms = [torch.randn(2, 5) for _ in range(2)], [[nn.BatchNorm1d(4) for _ in range(2)]]

    def run() -> Any:
        with torch.set_grad_enabled(wants):
            return mk.expert_mixture([x], [[x[:4], x[1:5]]], None, None, routing, norms=norms, gate_weights=gates)

    torch.testing.assert_close(goes_past_checks(run, monkeypatch), checked(run))


@pytest.mark.parametrize("joined", [False, True])
def test_linear_gates_with_norms(joined: bool, checked: Any) -> None:
    seed(0)
    x, gates = torch.randn(ROWS, 5), [torch.randn(n, 5) for n in (2, 3)]
    norms, of_gates = [[nn.BatchNorm1d(4) for _ in range(3)]], [nn.BatchNorm1d(n).eval() for n in (2, 3)]
    nn.init.normal_(of_gates[1].weight)
    routing = mk.Routing((0, 0, 0), ((0, 1), (0, 1, 2)))
    options: Any = {"norms": norms, "gate_weights": torch.cat(gates) if joined else gates, "gate_norms": of_gates}

    def run() -> Any:
        return mk.expert_mixture(x, [[x[:4], x[1:5], x[2:6]]], None, None, routing, **options)

    torch.testing.assert_close(run(), checked(run))


def test_joined_gates_that_do_not_fit() -> None:
    norms, x = [[nn.BatchNorm1d(4) for _ in range(2)]], torch.randn(ROWS, 5)
    for weights, biases in ((torch.randn(3, 5), None), (torch.randn(2, 4), None), (torch.randn(2, 5), torch.randn(3))):
        with pytest.raises(ValueError, match="gate_(weights|biases)"):
            gates = {"gate_weights": weights, "gate_biases": biases}
            mk.expert_mixture(x, [torch.randn(2, 4, 5)], None, None, mk.Routing.mmoe(2, 1), norms=norms, **gates)
    for odd in (torch.randn(2, 5).to_sparse(), torch.randn(2, 5).to_mkldnn()):
        with pytest.raises(TypeError, match="gate_weights must be a dense tensor"):
            mk.expert_mixture(
                x, [torch.randn(2, 4, 5)], None, None, mk.Routing.mmoe(2, 1), norms=norms, gate_weights=odd
            )
    assert all(int(norm.num_batches_tracked) == 0 for norm in norms[0])
