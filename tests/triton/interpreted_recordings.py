"""Calls that were made before, with other inputs: what is recorded serves them, and nothing else.

``test_interpreter.py`` runs this.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._backends import interpreting
from mtlkernels.ops import _recording
from mtlkernels.ops._recording import Recording
from mtlkernels.testing import assert_within_budget

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set"),
    pytest.mark.skipif(not _extension.loaded(), reason="the C++ kernels are not built"),
]
WIDTHS = (16, 32, 16)


@dataclass
class Level:
    """Parameters of a level with linear gates, or with gates whose logits come from outside."""

    routing: mk.Routing = field(default_factory=lambda: mk.Routing.cgc(2, 2, 1, single_input=True))
    linear: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        experts, shapes = self.routing.num_experts, list(zip(WIDTHS[1:], WIDTHS, strict=False))
        self.weights = [[self.random(*shape) / 4 for _ in range(experts)] for shape in shapes]
        self.biases = [[self.random(shape[0]) for _ in range(experts)] for shape in shapes]
        self.sizes = [len(gate) for gate in self.routing.gate_experts]
        self.gates = [self.random(size, WIDTHS[0]) for size in self.sizes]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=self.dtype)

    def inputs(self, rows: int) -> list[Tensor]:
        """New ones: the streams, then logits where those are given."""
        streams = [self.random(rows, WIDTHS[0]) for _ in range(self.routing.num_inputs)]
        return streams + ([] if self.linear else [self.random(rows, size) for size in self.sizes])

    def parameters(self) -> list[Tensor]:
        return [t for layer in self.weights + self.biases for t in layer] + (self.gates if self.linear else [])

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        count = self.routing.num_inputs
        gates: Any = (
            {"gate_logits": None, "gate_weights": self.gates} if self.linear else {"gate_logits": inputs[count:]}
        )
        return mk.expert_mixture(inputs[:count], self.weights, self.biases, routing=self.routing, **gates)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recording]]:
    """The recordings, in the order in which they are replayed."""
    found: list[Recording] = []
    replay = Recording.replay

    def noted(self: Recording, moving: Any) -> Any:
        found.append(self)
        return replay(self, moving)

    monkeypatch.setattr(Recording, "replay", noted)
    yield found


def outputs(level: Level, inputs: list[Tensor]) -> list[Tensor]:
    return list(level(inputs))


def gradients(level: Level, inputs: list[Tensor]) -> list[Tensor]:
    """Of all that there is; outputs too."""
    leaves = [*inputs, *level.parameters()]
    for leaf in leaves:
        leaf.requires_grad_()
    results = level(inputs)
    torch.manual_seed(1)
    grads = [torch.randn_like(y) for y in results]
    found = torch.autograd.grad(results, leaves, grads)
    for leaf in leaves:
        leaf.requires_grad_(False)
    return [*(y.detach() for y in results), *found]


Run = Callable[[Level, list[Tensor]], list[Tensor]]


def check(level: Level, run: Run, inputs: list[Tensor]) -> None:
    """Against the reference, in the same dtype and in float64."""
    with mk.use_backend("triton"):
        found = run(level, inputs)
    with mk.use_backend("reference"):
        expected = run(level, inputs)
        wide = Level(level.routing, level.linear, torch.float64)
        for name in ("weights", "biases"):
            setattr(wide, name, [[t.double() for t in layer] for layer in getattr(level, name)])
        wide.gates = [gate.double() for gate in level.gates]
        exact = run(wide, [x.double() for x in inputs])
    assert_within_budget({"all": found}, {"all": exact}, {"all": expected})


@pytest.mark.parametrize("linear", [True, False], ids=["linear gates", "logits"])
@pytest.mark.parametrize("run, counts", [(outputs, (0, 0, 1, 2)), (gradients, (0, 0, 1, 2, 4))])
def test_other_inputs(linear: bool, run: Run, counts: tuple[int, ...], replayed: list[Recording]) -> None:
    """The second call is recorded.

    The backward pass of a call that was checked is not that of one that was replayed, and has its own recording.
    """
    level = Level(mk.Routing.cgc(2, 1, 1), linear)
    for count in counts:
        check(level, run, level.inputs(5))
        assert len(replayed) == count


def test_rows_take_turns(replayed: list[Recording]) -> None:
    level = Level()
    for rows in (3, 40) * 5:
        check(level, gradients, level.inputs(rows))
    assert len(replayed) == 8 and len(set(map(id, replayed))) == 4


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_and_one(rows: int) -> None:
    level = Level()
    for _ in range(2):
        check(level, gradients, level.inputs(rows))


def test_parameters_that_change_in_place(replayed: list[Recording]) -> None:
    level = Level()
    for _ in range(5):
        check(level, gradients, level.inputs(4))
        for parameter in level.parameters():
            parameter.mul_(-1.5)
    assert len(replayed) == 4


def test_a_parameter_that_moves(replayed: list[Recording]) -> None:
    """Also where the tensor is the same object, and where another parameter has taken its place in memory."""
    level = Level()
    for _ in range(2):
        check(level, gradients, level.inputs(4))
    level.weights[0][1].data = level.weights[0][1].clone() * 2
    check(level, gradients, level.inputs(4))
    first, second = level.weights[0][:2]
    first.data, second.data = second.data, first.data
    check(level, gradients, level.inputs(4))
    level.biases[1] = list(reversed(level.biases[1]))
    check(level, gradients, level.inputs(4))
    assert not replayed


def test_a_parameter_of_another_layout(replayed: list[Recording]) -> None:
    level = Level()
    for _ in range(2):
        check(level, outputs, level.inputs(4))
    level.gates[0].data = level.random(WIDTHS[0], level.sizes[0]).t()
    for _ in range(3):
        check(level, outputs, level.inputs(4))
    assert not replayed


def test_inputs_of_another_layout_and_alignment(replayed: list[Recording]) -> None:
    level = Level()
    for _ in range(2):
        check(level, outputs, level.inputs(4))
    for _ in range(3):
        check(level, outputs, [level.random(WIDTHS[0], 4).t()])
    assert not replayed
    for count in (0, 0, 1):
        check(level, outputs, [level.random(4 * WIDTHS[0] + 1)[1:].view(4, WIDTHS[0])])
        assert len(replayed) == count


def test_tensors_that_share_memory(replayed: list[Recording]) -> None:
    """An input and a parameter, one tensor for two streams, one parameter for two experts; and then no longer."""
    level = Level(mk.Routing.cgc(2, 1, 1))
    for _ in range(3):
        check(level, outputs, [level.weights[0][0][:4], *level.inputs(4)[1:]])
    assert len(replayed) == 1
    x, others = level.random(5, WIDTHS[0]), level.inputs(5)
    for _ in range(3):
        check(level, outputs, [x, x, others[2]])
    assert len(replayed) == 2
    check(level, outputs, level.inputs(5))
    check(level, outputs, [x, x, x])
    assert len(replayed) == 4 and len({*map(id, replayed)}) == 2
    level.weights[0][2] = level.weights[0][0]
    for _ in range(3):
        check(level, outputs, level.inputs(5))
    assert len(replayed) == 5
    level.weights[0][2] = level.weights[0][0].clone() * 2
    check(level, outputs, level.inputs(5))


def test_what_cannot_be_recorded_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    level, tried = Level(), []
    level.gates[0] = level.random(WIDTHS[0], level.sizes[0]).t()
    keep = _recording.Recordings.keep
    monkeypatch.setattr(_recording.Recordings, "keep", lambda *args: (tried.append(args), keep(*args)))
    for _ in range(4):
        check(level, outputs, level.inputs(4))
    assert len(tried) == 1


def test_one_gradient_for_several_outputs(replayed: list[Recording]) -> None:
    level = Level()

    def same_first(level: Level, inputs: list[Tensor], same: bool) -> list[Tensor]:
        for parameter in level.parameters():
            parameter.requires_grad_()
        results = level(inputs)
        grads = (
            [torch.ones_like(results[0])] * 2 if same else [torch.ones_like(y) * (i + 1) for i, y in enumerate(results)]
        )
        found = torch.autograd.grad(results, level.parameters(), grads)
        for parameter in level.parameters():
            parameter.requires_grad_(False)
        return list(found)

    inputs = level.inputs(4)
    with mk.use_backend("triton"):
        for _ in range(3):
            same_first(level, inputs, True)
        assert len(replayed) == 1
        for _ in range(2):
            found = same_first(level, inputs, False)
        assert len(replayed) == 4
    with mk.use_backend("reference"):
        expected = same_first(level, inputs, False)
    for pair in zip(found, expected, strict=True):
        torch.testing.assert_close(*pair)


def test_which_gradients_are_wanted(replayed: list[Recording]) -> None:
    level = Level()
    inputs = level.inputs(4)
    for wanted in ("weights", "biases", "inputs") * 4:
        leaves = {"weights": level.weights[1], "biases": level.biases[0], "inputs": inputs}[wanted]
        found = []
        for backend in ("triton", "reference"):
            for leaf in leaves:
                leaf.grad = None
                leaf.requires_grad_()
            with mk.use_backend(backend):
                sum(y.square().sum() for y in level(inputs)).backward()  # type: ignore[union-attr]
            others = [t for t in (*inputs, *level.parameters()) if not any(t is leaf for leaf in leaves)]
            assert all(t.grad is None for t in others)
            found.append([leaf.grad for leaf in leaves])
        for leaf in leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
        for pair in zip(*found, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-4)


def test_gradients_are_tensors_of_their_own() -> None:
    """Those of one kind share an allocation, but none is a view, and each may be changed in place."""
    level = Level()
    for _ in range(2):
        with mk.use_backend("triton"):
            found = gradients(level, level.inputs(4))[len(level.sizes) + 1 :]
        before = [grad.clone() for grad in found]
        assert not any(grad._is_view() for grad in found)
        found[0].fill_(7.0)
        assert all(torch.equal(*pair) for pair in zip(found[1:], before[1:], strict=True))
        assert all(grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in found)


def test_losses_one_by_one_and_together(replayed: list[Recording]) -> None:
    """Those of a step under PCGrad, which reach a gate each."""
    level = Level(mk.Routing.cgc(2, 1, 1, single_input=True))
    found: dict[str, list[list[Tensor]]] = {"triton": [], "reference": []}
    for backend, steps in found.items():
        torch.manual_seed(3)
        with mk.use_backend(backend):
            for batched in (False, False, False, True, True, True, False):
                parameters = [torch.nn.Parameter(t) for t in level.parameters()]
                own = Level(level.routing)
                own.weights = [
                    parameters[: len(own.weights[0])],
                    parameters[len(own.weights[0]) : 2 * len(own.weights[0])],
                ]
                own.biases = [parameters[2 * len(own.weights[0]) :][: len(own.biases[0])]] + [
                    parameters[2 * len(own.weights[0]) + len(own.biases[0]) : -len(own.gates)]
                ]
                own.gates = parameters[-len(own.gates) :]
                optimizer = mk.optim.PCGrad(torch.optim.SGD(parameters, lr=0.0), batched=batched)
                torch.manual_seed(4)
                results = own(own.inputs(4))
                optimizer.backward([y.square().mean() for y in results])
                steps.append([p.grad for p in parameters])  # type: ignore[misc]
    for pair in zip(*found.values(), strict=True):
        for grads in zip(*pair, strict=True):
            torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-4)


def test_second_derivatives_after_a_recording(replayed: list[Recording]) -> None:
    level = Level()
    for _ in range(4):
        check(level, gradients, level.inputs(3))
    found = []
    inputs = level.inputs(3)
    for backend in ("triton", "reference"):
        with mk.use_backend(backend):
            weight = level.weights[0][0].requires_grad_()
            (grad,) = torch.autograd.grad(sum(y.square().sum() for y in level(inputs)), weight, create_graph=True)  # type: ignore[arg-type]
            found.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-4)


def test_products_in_tf32_have_recordings_of_their_own(replayed: list[Recording]) -> None:
    level, before = Level(), torch.backends.cuda.matmul.fp32_precision
    try:
        with mk.use_backend("triton"):
            for precision in ("ieee", "tf32") * 3:
                torch.backends.cuda.matmul.fp32_precision = precision
                level(level.inputs(4))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(replayed) == 2 and replayed[0] is not replayed[1]


@pytest.mark.parametrize("own, other", [(torch.float32, torch.float16), (torch.bfloat16, torch.float16)])
def test_bad_input_is_refused_as_before(own: torch.dtype, other: torch.dtype) -> None:
    level = Level(dtype=own)
    with mk.use_backend("triton"):
        for _ in range(3):
            level(level.inputs(4))
        with pytest.raises(ValueError, match=r"weights\[0\]"):
            level([level.random(4, WIDTHS[0] + 1)])
        with pytest.raises(TypeError, match=r"weights\[0\]\[0\].*float16"):
            level([level.random(4, WIDTHS[0]).to(other)])


def test_how_many_are_kept(monkeypatch: pytest.MonkeyPatch, replayed: list[Recording]) -> None:
    monkeypatch.setattr(_recording, "_MAX_RECORDINGS", 3)
    level = Level()
    with mk.use_backend("triton"):
        for rows in (1, 1, 2, 2, 3, 3, 4, 4, 1, 4):
            level(level.inputs(rows))
    assert len(replayed) == 1


def test_parameters_made_anew_are_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """As norms by running statistics are folded into parameters for each call."""
    monkeypatch.setattr(_recording.Recordings, "keep", lambda *_: pytest.fail("recorded"))
    level, kept = Level(), []
    with mk.use_backend("triton"):
        for _ in range(3):
            level.weights = [[t.clone() for t in layer] for layer in level.weights]
            kept.append(level.weights)
            level(level.inputs(4))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_of_a_model_have_recordings_of_their_own(copied: Any, replayed: list[Recording]) -> None:
    model = mk.nn.MMoE(in_features=12, num_experts=2, num_tasks=2, expert_units=(8,))
    x = torch.randn(4, 12)
    with mk.use_backend("triton"), torch.no_grad():
        for _ in range(3):
            expected = model(x)
        assert len(replayed) == 1
        other = copied(model)
        for _ in range(3):
            assert all(torch.equal(*pair) for pair in zip(other(x), expected, strict=True))
    assert len(replayed) == 2 and replayed[0] is not replayed[1]


def test_autocast_goes_another_way(replayed: list[Recording]) -> None:
    level = Level()
    with mk.use_backend("triton"):
        for _ in range(3):
            level(level.inputs(4))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert all(y.dtype == torch.bfloat16 for y in level(level.inputs(4)))
    assert len(replayed) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_norm": True, "dropout": 0.3},
        {"activation": "prelu"},
    ],
    ids=str,
)
def test_norms_dropout_and_slopes(settings: dict[str, Any], replayed: list[Recording]) -> None:
    torch.manual_seed(0)
    model = mk.nn.PLE(
        in_features=12, num_tasks=2, expert_units=(16, 8), num_specific=1, num_shared=1, num_levels=1, **settings
    )
    found: dict[str, list[list[Tensor]]] = {"triton": [], "reference": []}
    for backend, steps in found.items():
        own = copy.deepcopy(model)
        torch.manual_seed(1)
        with mk.use_backend(backend):
            for _ in range(4):
                own.zero_grad()
                results = own(torch.randn(9, 12))
                sum(y.square().sum() for y in results).backward()  # type: ignore[union-attr]
                grads = [p.grad.clone() for p in own.parameters() if p.grad is not None]
                steps.append([*(y.detach() for y in results), *grads, *(b.clone().float() for b in own.buffers())])
    assert len(replayed) == 4
    for pair in zip(*found.values(), strict=True):
        for tensors in zip(*pair, strict=True):
            torch.testing.assert_close(*tensors, rtol=1e-4, atol=1e-4)
