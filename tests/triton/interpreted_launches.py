"""How many launches a level takes, what each has to do, and that the order of programs does not matter.

``test_interpreter.py`` runs this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import triton_work
from benchmarks.peers.fused import fused_launches, fused_trunk
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from benchmarks.peers.triton_work import Shape, Work
from mtlkernels import use_backend
from mtlkernels._backends import interpreting
from mtlkernels.ops._triton_splits import card
from mtlkernels.ops.level.spec import Groups
from mtlkernels.testing import evaluate
from tests.ops.level import normalized
from tests.triton import norms
from tests.triton.cases import Case, arguments, poisoned, split_into
from tests.triton.launches import Launch, last_program_first, launched

pytestmark = pytest.mark.skipif(not interpreting(), reason="TRITON_INTERPRET is not set")
WIDTHS = (24, 20, 16, 12)
SPLIT = Case("split", 70, (24, 20, 16), 5, 3, (1, 3), num_inputs=2)


def step(case: Case, *needs: bool, linear: bool = False) -> list[Tensor]:
    """Outputs and gradients of a case, with needs as ``check_level`` has them; ``linear``: its gates are layers."""
    from mtlkernels.ops.level import triton as kernels

    a = arguments(case, "cpu")
    level = a.level(linear)
    wanted = needs or (True,) * 5
    kinds = Groups(*wanted[:3], False, False, False, *wanted[3:], *[False] * (5 - len(wanted)))
    outputs, saved = level.results(True, kernels.forward)
    gradients = kernels.backward(*level.backward(a.grad_outputs, saved, kinds))
    return [*outputs, *(saved[-1:] if linear else ()), *gradients]


level_step = partial(step, linear=True)


@pytest.mark.parametrize("gates", [1, 3, 8])
@pytest.mark.parametrize("layers", [1, 3])
def test_launches_of_a_step(layers: int, gates: int) -> None:
    """One a layer forward; backward one for the mixture, one a layer, and one for all weights and biases."""
    case = Case("launches", 20, WIDTHS[: layers + 1], 3, gates, (1,) * layers)
    with launched(run=False) as found:
        step(case)
    forward = ["layer_forward"] * (layers - 1) + ["last_forward"]
    assert [launch.kernel for launch in found] == forward + ["mix_backward"] + ["input_gradient"] * layers + [
        "weight_gradient"
    ]


@pytest.mark.parametrize("inputs", [1, 8])
@pytest.mark.parametrize("gates", [1, 8])
@pytest.mark.parametrize("layers", [1, 3])
def test_linear_gates_take_no_launch_of_their_own(layers: int, gates: int, inputs: int) -> None:
    """But for experts of one layer, which mix at once: there the gates are in front."""
    case = Case("level", 20, WIDTHS[: layers + 1], 3, gates, (1,) * layers, num_inputs=inputs)
    with launched(run=False) as found:
        level_step(case)
    forward = ["layer_forward"] * max(layers - 1, 1) + ["last_forward"]
    assert [launch.kernel for launch in found] == forward + ["mix_backward"] + ["input_gradient"] * layers + [
        "weight_gradient"
    ]


@pytest.mark.parametrize("layers", [1, 2])
def test_many_linear_gates_take_no_launch_either(layers: int) -> None:
    with launched(run=False) as found:
        level_step(Case("level", 20, WIDTHS[: layers + 1], 3, 9, (1,) * layers))
    assert [launch.kernel for launch in found[: layers + 1]] == ["layer_forward"] * layers + ["mix_forward"]


def test_launches_of_norms() -> None:
    """Two launches a layer forward, and what the last layer gives; backward two or three a layer for its norm."""
    case = norms.cases()["aligned_dropout"]("cpu")
    with use_backend("triton"), launched(run=False) as found:
        evaluate(normalized.fused, case)
    forward = [
        "layerwise_product",
        "layer_statistics",
        "layerwise_product",
        "batch_statistics",
        "normalize",
        "mix_forward",
    ]
    backward = ["normalize", "normalize", "mix_backward"]
    backward += ["norm_sums", "norm_totals", "preactivation_gradient", "input_gradient"]
    backward += ["norm_sums", "norm_totals", "layer_norm_gradient", "input_gradient", "weight_gradient"]
    assert [launch.kernel for launch in found] == forward + backward


def test_launches_of_dice() -> None:
    """One a layer more in either direction for what it knows of rows, which the last layer's outputs come along with.

    And one for all slopes that the channels of an expert share.
    """
    case = norms.cases()["dice_alone"]("cpu")
    with use_backend("triton"), launched(run=False) as found:
        evaluate(normalized.fused, case)
    forward = ["layerwise_product", "dice_rows", "layerwise_product", "dice_rows", "mix_forward"]
    backward = ["dice_rows", "dice_rows", "mix_backward"]
    layer = ["dice_gradient_rows", "norm_sums", "norm_totals", "preactivation_gradient"]
    backward += [*layer, "input_gradient", *layer, "slope_totals", "input_gradient", "weight_gradient"]
    assert [launch.kernel for launch in found] == forward + backward


def test_launches_of_prelu() -> None:
    """Those of an activation without slopes, and sums for the gradients of these."""
    case = norms.cases()["prelu_alone"]("cpu")
    with use_backend("triton"), launched(run=False) as found:
        evaluate(normalized.fused, case)
    forward = ["layerwise_product", "layerwise_product", "normalize", "mix_forward"]
    backward = ["normalize", "normalize", "mix_backward"]
    layer = ["norm_sums", "norm_totals", "preactivation_gradient"]
    backward += [*layer, "input_gradient", *layer, "slope_totals", "input_gradient", "weight_gradient"]
    assert [launch.kernel for launch in found] == forward + backward


def test_a_part_takes_the_same_launches_and_no_memory_for_the_rest() -> None:
    """One gate of three, of two of five experts: what is written is what those want."""
    from mtlkernels.ops.level import triton as kernels

    case = Case("part", 16, (16, 16), 5, 3, (1,), largest_gate=2)
    a = arguments(case, "cpu")
    level = a.level(False)
    _, saved = level.results(True, kernels.forward)
    grads = [a.grad_outputs[0], None, None]
    with launched() as found:
        gradients = kernels.backward(*level.backward(grads, saved, Groups(*[True] * 8)))
    assert [launch.kernel for launch in found] == ["mix_backward", "input_gradient", "weight_gradient"]
    assert [tuple(grad.shape) for grad in gradients] == [(16, 16)] * 3 + [(16,)] * 2 + [(16, 2)]
    assert found[-1].written == 2 * (16 * 16 + 16) * 4


def test_more_gates_take_one_launch_more() -> None:
    with launched(run=False) as found:
        step(Case("many_gates", 20, WIDTHS[:3], 3, 9, (1, 1)))
    assert [launch.kernel for launch in found[:3]] == ["layer_forward", "layer_forward", "mix_forward"]


def test_inputs_that_want_no_gradient_save_a_launch() -> None:
    with launched(run=False) as found:
        step(Case("frozen", 20, WIDTHS[:3], 3, 2, (1, 1)), False, True, True, True)
    assert [launch.kernel for launch in found[2:]] == ["mix_backward", "input_gradient", "weight_gradient"]


@pytest.mark.parametrize("run", [step, level_step], ids=["logits", "linear"])
def test_order_of_arrival_does_not_matter(run: Callable[..., list[Tensor]]) -> None:
    """Whichever of the programs that share a block comes last, the result has the same bits."""
    case = replace(SPLIT, num_inputs=3)
    with poisoned():
        with split_into(4):
            usual = run(case)
            with last_program_first():
                reverse = run(case)
        with split_into(1):
            whole = run(case)
    assert all(torch.equal(a, b) for a, b in zip(usual, reverse, strict=True))
    # The sums were split indeed: added in another order they differ in the last bits.
    assert not all(torch.equal(a, b) for a, b in zip(usual, whole, strict=True))


# Sizes are whole tiles in the last case, so that its products count no padding.
WORKS = [
    Case("one_layer", 19, (7, 5), 3, 2, (3,)),
    SPLIT,
    Case("three_layers", 21, (16, 32, 48, 16), 4, 5, (4, 0, 1), biases=(True, False, True)),
    Case("many_gates", 33, (20, 12, 24), 3, 9, (3, 1)),
    Case("half", 40, (48, 32, 16), 3, 2, (1, 4), dtype=torch.float16, logits_dtype=torch.float32),
    Case("whole_tiles", 32, (64, 64, 64), 2, 3, (1, 1)),
]


def works(case: Case, *needs: bool, linear: bool = False) -> list[Work]:
    """What a step of a case should take; ``linear``: with gates that are linear layers."""
    a = arguments(case, "cpu")
    shape = Shape(
        rows=case.rows,
        widths=case.widths,
        expert_inputs=tuple(a.expert_inputs),
        gate_experts=tuple(a.gate_experts),
        gate_sizes=tuple(a.gate_sizes),
        activations=case.activations,
        biases=tuple(case.num_experts * has for has in case.biases[: len(case.activations)]),
        dtype=case.dtype,
        logits_dtype=case.dtype if linear else case.logits_dtype or case.dtype,
        precision="ieee",
        aligned=all(width % 16 == 0 for width in case.widths),
        num_inputs=case.num_inputs,
        gate_inputs=tuple(a.gate_inputs) if linear else (),
        card=card(torch.device("cpu")),
        gate_biases=sum(bias.numel() for bias in a.gate_biases if bias is not None),
    )
    return [*triton_work.forward(shape, save=True), *triton_work.backward(shape, *needs)]


def check_work(expected: Sequence[Any], found: list[Launch], whole_tiles: bool) -> None:
    """Bytes and arithmetic as counted while the kernels ran; products of tiles that are not whole count more."""
    for work, launch in zip(expected, found, strict=True):
        assert work.kernel == launch.kernel
        assert (launch.read, launch.written) == (work.read + work.scratch, work.written + work.scratch), work
        assert launch.flop == work.flop if whole_tiles else launch.flop >= work.flop, work


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", WORKS, ids=str)
def test_work(case: Case, splits: int) -> None:
    with split_into(splits):
        expected = works(case)
        with launched() as found:
            step(case)
    check_work(expected, found, case.name == "whole_tiles")
    assert any(work.scratch for work in expected if work.kernel != "mix_backward") == (splits > 1)


# No expert reads some of the inputs, several gates read one.
LEVEL_WORKS = [
    *(case for case in WORKS if case is not SPLIT and case.name != "whole_tiles"),
    replace(SPLIT, name="inputs", num_inputs=4),
    Case("one_layer_inputs", 40, (32, 16), 2, 4, (3,), num_inputs=5),
    Case("whole_tiles", 32, (64, 64, 64), 2, 64, (1, 1), largest_gate=1),
]


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("case", LEVEL_WORKS, ids=str)
def test_work_with_linear_gates(case: Case, splits: int) -> None:
    with split_into(splits):
        expected = works(case, linear=True)
        with launched() as found:
            level_step(case)
    check_work(expected, found, case.name == "whole_tiles")


# The logits want a gradient. Every fifth, among which each of the five is asked for and not.
LEVEL_NEEDS = [needs for needs in product((False, True), repeat=5) if needs[0] or needs[3] or needs[4]][::5]


@pytest.mark.parametrize("needs", LEVEL_NEEDS, ids=str)
def test_work_for_some_gradients_with_linear_gates(needs: tuple[bool, ...]) -> None:
    case = replace(SPLIT, num_inputs=3)
    with split_into(2):
        expected = works(case, *needs, linear=True)
        with launched() as found:
            level_step(case, *needs)
    check_work(expected, found, whole_tiles=False)


@pytest.mark.parametrize("needs", list(product((False, True), repeat=3)), ids=str)
def test_work_for_some_gradients(needs: tuple[bool, bool, bool]) -> None:
    with split_into(2):
        expected = works(SPLIT, *needs)
        with launched() as found:
            step(SPLIT, *needs, True)
    check_work(expected, found, whole_tiles=False)


@pytest.mark.parametrize("training", [False, True])
def test_work_of_a_trunk(training: bool) -> None:
    """What the benchmark says of two levels, of which the second reads what the first has computed."""
    trunk_shape = TrunkShape(32, num_tasks=2, num_specific=1, num_shared=1, units=(16, 16), num_levels=2)
    trunk = fused_trunk(trunk_shape, PerExpertTrunk(trunk_shape))
    x = torch.randn(20, 32, requires_grad=training)
    expected = fused_launches(trunk_shape, 20, torch.float32, training, x.device)
    with launched() as found, torch.set_grad_enabled(training), use_backend("triton"):
        outputs = trunk(x)
        if training:
            sum(y.sum() for y in outputs).backward()
    check_work(expected, found, whole_tiles=False)
