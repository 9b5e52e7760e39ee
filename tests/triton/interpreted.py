"""Kernels against the reference, on CPU tensors; ``test_interpreter.py`` runs this under Triton's interpreter."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch

from mtlkernels import Routing, expert_mixture, use_backend
from mtlkernels._backends import interpreting
from mtlkernels.ops._triton import Kind
from mtlkernels.ops._triton_splits import Card
from mtlkernels.ops.level import triton as kernels
from mtlkernels.ops.level.spec import Groups, Layer, LevelSpec
from mtlkernels.ops.level.triton import chain_backward, chain_forward, tiles
from tests.ops import zero_widths
from tests.ops.level import gate_layers
from tests.ops.level.operator import Operands, with_norms
from tests.triton import levels, snr
from tests.triton.cases import Case, arguments, cases, check_backward, check_forward, check_gated_mixture, check_level

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")
SMALL = Case("small", 9, (8, 7, 6), activations=(3, 1), num_inputs=2)


@pytest.mark.parametrize("case", cases(), ids=str)
def test_chain(case: Case) -> None:
    check_level(case, "cpu")


# The mixture knows nothing of layers: cases that differ in these alone are left out.
@pytest.mark.parametrize("case", [case for case in cases() if len(case.activations) == 1], ids=str)
def test_gated_mixture(case: Case) -> None:
    check_gated_mixture(case, "cpu")


def one_or_all_but_one(count: int) -> list[tuple[bool, ...]]:
    """Of so many gradients each alone, and all but each; none at all."""
    alone = [tuple(i == j for i in range(count)) for j in range(count)]
    return [*alone, *(tuple(not flag for flag in flags) for flags in alone), (False,) * count]


@pytest.mark.parametrize("needs", one_or_all_but_one(4), ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, ...]) -> None:
    check_level(SMALL, "cpu", needs=needs)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)], ids=str)
def test_only_the_mixture_gradients_asked_for(needs: tuple[bool, bool]) -> None:
    check_gated_mixture(SMALL, "cpu", needs)


@pytest.mark.parametrize("case", levels.cases(), ids=str)
def test_chain_with_linear_gates(case: Case) -> None:
    check_level(case, "cpu", linear=True)


@pytest.mark.parametrize("name", ["whole_sums", "split_sums_"])
@pytest.mark.parametrize("linear", [False, True])
def test_tiles_of_a_large_card(name: str, linear: bool) -> None:
    """With one multiprocessor, for which these read least."""
    case = Case(name, 140, (256, 256, 16), 2, 2, (1, 2), dtype=torch.float16, largest_gate=2)
    kind = Kind.of(torch.float16, True)
    with (
        mock.patch.object(chain_backward, "card", lambda _: Card(1, (9, 0))),
        mock.patch.object(chain_backward, "launch", wraps=chain_backward.launch) as launch,
    ):
        check_level(case, "cpu", linear=linear)
    launched = {(call.args[2], call.kwargs["SPLIT"]) for call in launch.call_args_list}
    split = name == "split_sums_"
    assert {(tiles.LARGE_INPUT[kind.operands], split), (tiles.LARGE_WEIGHT[kind.operands], split)} <= launched


@pytest.mark.parametrize(
    ("linear", "experts", "width", "pieces"),
    [
        (True, 20, 400, (128, 64, 16)),
        (False, 2, 400, (128, 64, 16)),
        (True, 2, 144, (128, 16)),
        (False, 2, 480, None),
    ],
)
def test_programs_that_share_columns_evenly(
    linear: bool, experts: int, width: int, pieces: tuple[int, ...] | None
) -> None:
    """Of widths that large tiles do not fit; with gates of more logits than are taken at a time."""
    case = Case("whole_sums", 140, (width, 64, 16), experts, 2, (1, 2), dtype=torch.float16, largest_gate=experts)
    with (
        mock.patch.object(chain_backward, "card", lambda _: Card(1, (9, 0))),
        mock.patch.object(chain_backward, "launch", wraps=chain_backward.launch) as launch,
    ):
        check_level(case, "cpu", linear=linear)
    constants = (call.kwargs.get("PIECES") for call in launch.call_args_list)
    launched = {tuple(piece.value for piece in found) for found in constants if found}
    assert launched == ({pieces} if pieces else set())


AHEAD = {
    # A depth of two steps, of one and a part of another, and of a part of one; columns of a block and of a part of one.
    "two_steps": Case("two_steps", 70, (16, 256, 128), 5, 2, (1, 2), dtype=torch.float16, largest_gate=5),
    "part_of_a_step": Case("part_of_a_step", 70, (16, 144, 144), 3, 3, (3, 1), dtype=torch.bfloat16, largest_gate=3),
    "less_than_a_step": Case("less_than_a_step", 37, (48, 128), 4, 1, (0,), dtype=torch.float16, largest_gate=3),
    "large_gates": Case("large_gates", 40, (16, 128), 18, 2, (1,), dtype=torch.float16, largest_gate=18),
}


@pytest.mark.parametrize("name", AHEAD)
def test_one_loop_that_copies_ahead(name: str) -> None:
    """Of all experts, some of which a gate does not see; of three gates in one part, as other numbers need not be."""
    case = AHEAD[name]
    tile = tiles.AHEAD_MIXING[Kind.of(case.dtype, True).operands]
    one = mock.patch.object(chain_forward, "card", lambda _: Card(1, tiles.AHEAD))
    with one, mock.patch.object(chain_forward, "launch", wraps=chain_forward.launch) as launch:
        check_level(case, "cpu")
    launched = {
        (call.args[2], call.kwargs["FEW"], call.kwargs["KEEP"])
        for call in launch.call_args_list
        if call.kwargs.get("AHEAD")
    }
    assert launched == {(tile, case.largest_gate <= 16, keep) for keep in (True, False)}


@pytest.mark.parametrize("widths", [(0, 128), (16, 0, 128)], ids=str)
def test_no_features_where_a_loop_would_copy_ahead(widths: tuple[int, ...]) -> None:
    """Biases are all that experts have then."""
    torch.manual_seed(0)
    x, logits = torch.randn(40, widths[0]).half(), torch.randn(40, 6).half()
    weights = [torch.randn(3, *size).half() for size in zip(widths[1:], widths[:-1], strict=True)]
    biases = [torch.randn(3, width).half() for width in widths[1:]]
    found = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            found.append(expert_mixture(x, weights, biases, logits, Routing.mmoe(3, 2)))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # of what is not taken
@pytest.mark.parametrize("capability", [(8, 0), tiles.AHEAD], ids=str)
def test_an_expert_outside_a_gate_cannot_reach_it_in_one_loop(capability: tuple[int, int]) -> None:
    """Nor where the loop has no branches."""
    x, weight = torch.ones(64, 16).half(), torch.ones(128, 16).half()
    logits = [torch.zeros(64, 1).half(), torch.zeros(64, 1).half()]
    spec = LevelSpec(1, (0, 0), (0, 1), (1, 1), (Layer(0),))
    level = Operands(spec, [x, weight, weight, None, torch.full((128,), float("inf")).half(), *logits])
    with mock.patch.object(chain_forward, "card", lambda _: Card(1, capability)):
        (finite, infinite), _ = level.results(False, kernels.forward)
    assert finite.eq(16).all() and infinite.isinf().all()


@pytest.mark.parametrize("needs", one_or_all_but_one(5)[:5], ids=str)
def test_only_the_gradients_asked_for_with_linear_gates(needs: tuple[bool, ...]) -> None:
    check_level(levels.SMALL, "cpu", linear=True, needs=needs)


@pytest.mark.parametrize("grad", [False, True], ids=["serving", "training"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_gate_layers_through_the_public_function(seed: int, kind: torch.dtype, grad: bool) -> None:
    with use_backend("triton"):
        gate_layers.check(seed, kind, grad)


PARTS = {
    # Two tasks' experts and shared ones, and a gate of all: MMoE's and PLE's last and inner levels.
    "ple": Case("ple", 37, (20, 12, 9), 6, activations=(3, 1), num_inputs=3),
    "many": Case("many", 35, (16, 32), 5, 9, (4,), largest_gate=2),
}


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_part_of_a_chain(name: str, linear: bool) -> None:
    """Gradients of what some outputs depend on, of a forward pass of all."""
    a = arguments(PARTS[name], "cpu")
    level = a.level(linear)
    saved = check_forward(level)
    for used in ([0], [2], [1, 2], []):
        grads = [grad if k in used else None for k, grad in enumerate(a.grad_outputs)]
        check_backward(level, grads, saved, Groups(*[True] * 8), 1 + len(used))


def test_part_of_a_ple_level() -> None:
    """Experts of two tasks and a shared one: one task's loss reaches neither the other's experts nor its own stream."""
    routing = ((0, 0, 1, 1, 2), (0, 1, 4, 2, 3, 4, 0, 1, 2, 3, 4), (3, 3, 5))
    a = arguments(Case("ple", 37, (20, 12, 9), 5, activations=(3, 1), num_inputs=3), "cpu")
    logits = torch.randn(37, 11).split((3, 3, 5), 1)
    level = Operands(LevelSpec(3, *routing, (Layer(3), Layer(1))), [*a.inputs, *a.weights, *a.biases, *logits])
    saved = check_forward(level)
    for unused in range(3):
        grads = [None if k == unused else grad for k, grad in enumerate(a.grad_outputs)]
        check_backward(level, grads, saved, Groups(*[True] * 8), 1)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("name", PARTS)
def test_losses_of_a_chain(name: str, linear: bool) -> None:
    """Gradients of several losses, one that reaches nothing among them, as many together as there is room for."""
    a = arguments(PARTS[name], "cpu")
    level = a.level(linear)
    saved = check_forward(level)
    for losses in ([[0], [2]], [[1], [], [0, 2], [1], [0, 1, 2]]):
        grads = [
            (grad + i) if k in used else None for i, used in enumerate(losses) for k, grad in enumerate(a.grad_outputs)
        ]
        check_backward(level, grads, saved, Groups(*[True] * 8), 1)
    check_backward(level, grads, saved, Groups(*[i in (0, 2, 6) for i in range(8)]), 1)


@pytest.mark.parametrize("rows", [5, 37])
def test_losses_of_a_layerwise_level(rows: int) -> None:
    """The same draws of dropout, and the same statistics, for all losses."""
    level = with_norms(torch.float32, rows, False)
    grads = [torch.randn(rows, 5) if k in used else None for used in ([0], [1], [0, 1], [1]) for k in range(2)]
    check_backward(level, grads, check_forward(level), Groups(*[True] * 8), 1)


@pytest.mark.parametrize("rows", [1, 37])
def test_part_of_a_layerwise_level(rows: int) -> None:
    """With norms, slopes and dropout, which counts experts as the whole level does."""
    level = with_norms(torch.float32, rows, False)
    saved = check_forward(level)
    for used in ([0], [1], []):
        grads = [torch.randn(rows, 5) if k in used else None for k in range(2)]
        check_backward(level, grads, saved, Groups(*[True] * 8), 1)


def test_an_expert_outside_a_gate_cannot_reach_it() -> None:
    """Infinite outputs of an expert leave the gates that do not mix it alone: no 0 times infinity."""
    from mtlkernels.ops.level import triton as kernels

    x, weight = torch.ones(32, 4), torch.ones(32, 4)  # whole tiles: beyond them 0 times infinity is harmless
    logits = [torch.zeros(32, 1), torch.zeros(32, 1)]
    spec = LevelSpec(1, (0, 0), (0, 1), (1, 1), (Layer(0),))
    level = Operands(spec, [x, weight, weight, None, torch.full((32,), float("inf")), *logits])
    (finite, infinite), _ = level.results(False, kernels.forward)
    assert finite.eq(4).all() and infinite.isinf().all()


def test_minus_infinite_logits_mask_an_expert() -> None:
    from mtlkernels.ops.gated_mixture import reference
    from mtlkernels.ops.gated_mixture import triton as kernels

    experts = torch.randn(4, 20, 3)
    logits = torch.randn(4, 20)
    logits[0, 0] = logits[1, 3] = logits[2, 17] = float("-inf")
    logits[3, :18] = float("-inf")
    arguments = (experts, [logits], list(range(20)), [20])
    torch.testing.assert_close(kernels.forward(*arguments), reference.forward(*arguments))


def test_through_the_public_function() -> None:
    """The launcher is what ``use_backend("triton")`` runs, forward and backward."""
    routing = Routing.cgc(2, 1, 1, shared_gate=True)
    torch.manual_seed(0)
    x = [torch.randn(6, 5, requires_grad=True) for _ in range(3)]
    weight = torch.randn(3, 4, 5, requires_grad=True)
    logits = torch.randn(6, 7, requires_grad=True)
    leaves = [*x, weight, logits]

    def gradients() -> tuple[torch.Tensor, ...]:
        out = expert_mixture(x, [weight], None, logits, routing, activation="tanh")
        return torch.autograd.grad(sum(y.square().sum() for y in out), leaves)

    with use_backend("triton"):
        found = gradients()
    with use_backend("reference"):
        torch.testing.assert_close(found, gradients())


@pytest.mark.parametrize("name", snr.cases())
def test_snr(name: str) -> None:
    snr.check(name, "cpu")


def test_closed_routes_take_no_part() -> None:
    snr.check_closed_routes_take_no_part("cpu")


@pytest.mark.parametrize("rows", [0, 5])
def test_layers_of_no_features(rows: int) -> None:
    """Every fourth check, so that no kind of call is left out and the interpreter is done within a minute."""
    with use_backend("triton"):
        for _, check in itertools.islice(zero_widths.cases((torch.float32,), (rows,)), rows % 4, None, 4):
            check()
