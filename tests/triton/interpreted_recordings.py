"""Calls that were made before, with other inputs: what is recorded serves them, and nothing else.

``test_interpreter.py`` runs this.
"""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels._backends import interpreting
from mtlkernels.ops import _recording
from mtlkernels.ops._recording import Recording
from tests.triton.recorded import WIDTHS, Level, Run, agree, check, cotangents, gradients, noted, outputs

pytestmark = [
    pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set"),
    pytest.mark.skipif(not _extension.loaded(), reason="the C++ kernels are not built"),
]


@pytest.fixture
def replayed() -> Iterator[list[Recording]]:
    """The recordings, in the order in which they are replayed."""
    with noted() as found:
        yield found


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
    """And then one for each, by the same recording."""
    level = Level()

    def step(level: Level, inputs: list[Tensor], same: bool) -> list[Tensor]:
        for parameter in level.parameters():
            parameter.requires_grad_()
        results = level(inputs)
        grads = cotangents(results[:1]) * 2 if same else cotangents(results)
        found = torch.autograd.grad(results, level.parameters(), grads)
        for parameter in level.parameters():
            parameter.requires_grad_(False)
        return list(found)

    for same, count in ((True, 0), (True, 0), (True, 1), (True, 2), (True, 4), (False, 6)):
        check(level, partial(step, same=same), level.inputs(4))
        assert len(replayed) == count


def test_which_gradients_are_wanted(replayed: list[Recording]) -> None:
    """They take turns; what nobody wants has none."""
    level = Level()

    def step(level: Level, inputs: list[Tensor], wanted: str) -> list[Tensor]:
        leaves = {"weights": level.weights[1], "biases": level.biases[0], "inputs": inputs}[wanted]
        for leaf in leaves:
            leaf.requires_grad_()
        results = level(inputs)
        torch.autograd.backward(results, cotangents(results))
        others = [t for t in (*inputs, *level.parameters()) if not any(t is leaf for leaf in leaves)]
        assert all(t.grad is None for t in others)
        found = [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.requires_grad_(False)
            leaf.grad = None
        return found  # type: ignore[return-value]

    for wanted in ("weights", "biases", "inputs") * 4:
        check(level, partial(step, wanted=wanted), level.inputs(4))
    assert len({*map(id, replayed)}) == 4  # one forward, and a backward pass each


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

    def step(level: Level, inputs: list[Tensor], batched: bool) -> list[Tensor]:
        own = level.mapped(torch.nn.Parameter)  # in the same memory
        optimizer = mk.optim.PCGrad(torch.optim.SGD(own.parameters(), lr=0.0), batched=batched)
        torch.manual_seed(0)
        optimizer.backward([y.square().mean() for y in own(inputs)])
        return [parameter.grad for parameter in own.parameters()]  # type: ignore[misc]

    for batched in (False, False, False, False, True, True, True, False):
        check(level, partial(step, batched=batched), level.inputs(4))
    assert len({*map(id, replayed)}) >= 4


def test_second_derivatives_after_a_recording(replayed: list[Recording]) -> None:
    level = Level()

    def twice(level: Level, inputs: list[Tensor]) -> list[Tensor]:
        weight = level.weights[0][0].requires_grad_()
        total = torch.stack([y.square().sum() for y in level(inputs)]).sum()
        (grad,) = torch.autograd.grad(total, weight, create_graph=True)
        found = torch.autograd.grad(grad.square().sum(), weight)
        weight.requires_grad_(False)
        return list(found)

    for count in (0, 0, 2, 4):
        check(level, twice, level.inputs(3))
        assert len(replayed) == count


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


def served(level: Level, calls: list[int], replayed: list[Recording]) -> int:
    """How many of the calls, each of so many rows, are replayed."""
    before = len(replayed)
    with mk.use_backend("triton"):
        for rows in calls:
            level(level.inputs(rows))
    return len(replayed) - before


def test_the_one_unused_for_longest_goes(monkeypatch: pytest.MonkeyPatch, replayed: list[Recording]) -> None:
    monkeypatch.setattr(_recording, "_MAX_RECORDINGS", 2)
    level = Level(mk.Routing.mmoe(1, 1))
    counts = [served(level, calls, replayed) for calls in ([1, 1, 2, 2], [1], [3, 3], [1])]
    assert counts == [0, 1, 0, 1]


def test_one_that_had_to_go_is_recorded_again(monkeypatch: pytest.MonkeyPatch, replayed: list[Recording]) -> None:
    monkeypatch.setattr(_recording, "_MAX_RECORDINGS", 1)
    level = Level(mk.Routing.mmoe(1, 1))
    assert [served(level, calls, replayed) for calls in ([1, 1, 2, 2], [1, 1], [1])] == [0, 0, 1]


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
    runs, names = [], []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        own = copy.deepcopy(model).to(dtype)
        torch.manual_seed(1)
        steps: list[Tensor] = []
        names = []
        with mk.use_backend(backend):
            for step in range(4):
                own.zero_grad()
                results = own(torch.randn(9, 12).to(dtype))
                torch.autograd.backward(results, cotangents(results))
                values = [("output", y.detach()) for y in results]
                values += [(name, p.grad.clone()) for name, p in own.named_parameters() if p.grad is not None]
                values += [(name, b.clone()) for name, b in own.named_buffers() if b.is_floating_point()]
                steps += [value for _, value in values]
                names += [f"step {step}: {re.sub('[0-9]+', '*', name)}" for name, _ in values]
        runs.append(steps)
    assert len(replayed) == 4
    agree(*runs, names)


def test_a_converted_model_under_pcgrad(replayed: list[Recording], monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole step of a library's PLE with embeddings, norms and Adam is the same to the bit without recordings."""
    features = pytest.importorskip("torch_rechub.basic.features")
    from torch_rechub.models.multi_task import PLE

    torch.manual_seed(0)
    columns = [*(features.DenseFeature(f"d{i}") for i in range(4)), features.SparseFeature("s", 10, 8)]
    parts = {"expert_params": {"dims": [8], "dropout": 0.0}, "tower_params_list": [{"dims": [4]}] * 2}
    source = PLE(columns, ["classification"] * 2, n_level=1, n_expert_specific=1, n_expert_shared=1, **parts)

    def train() -> list[Tensor]:
        model = copy.deepcopy(source)
        mk.convert(model, force=True)
        optimizer = mk.optim.PCGrad(torch.optim.Adam(model.parameters(), lr=0.01))
        torch.manual_seed(1)
        for _ in range(5):
            optimizer.zero_grad()
            given = {f"d{i}": torch.randn(17) for i in range(4)} | {"s": torch.randint(0, 10, (17,))}
            with mk.use_backend("triton"):
                y = model(given)
                optimizer.backward([y[:, 0].square().mean(), (1 - y[:, 1]).square().mean()])
            optimizer.step()
        return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]

    recorded = train()
    count = len(replayed)
    assert count == 6  # of three steps the forward pass, and the backward pass of both losses
    monkeypatch.setattr(_recording.Recordings, "wants", lambda *_: False)
    assert all(torch.equal(*pair) for pair in zip(recorded, train(), strict=True))
    assert len(replayed) == count
