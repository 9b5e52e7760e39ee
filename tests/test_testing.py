"""The helpers that the other tests rely on catch what they are there to catch."""

from __future__ import annotations

import contextlib
import random

import pytest
import torch

import mtlkernels as mk
from mtlkernels.testing import (
    LAYOUTS,
    CaseFactory,
    assert_within_budget,
    evaluate,
    laid_out,
    over_budget,
    poisoned_outputs,
    random_expert_mixture,
    random_routing,
)
from tests import requires
from tests.ops.level.definition import formula


@pytest.fixture(name="results")
def _results():
    case = CaseFactory(0, torch.bfloat16).expert_mixture(40, [8, 9], mk.Routing.mmoe(3, 2), activation="tanh")
    exact = evaluate(formula, case.to(torch.float64))
    return evaluate(mk.expert_mixture, case), exact, evaluate(formula, case)


def test_a_right_result_is_within_budget(results) -> None:
    assert_within_budget(*results)


@pytest.mark.parametrize("group", ["outputs", "inputs", "weights[0]", "biases[0]", "gate_logits"])
def test_one_wrong_value_is_over_budget(results, group: str) -> None:
    actual, exact, usual = results
    actual[group] = [t.clone() for t in actual[group]]
    value = actual[group][-1].view(-1)
    value[3] += 0.2 * max(float(t.abs().max()) for t in exact[group])
    with pytest.raises(AssertionError, match="over the budget"):
        assert_within_budget(actual, exact, usual)


def test_values_that_are_not_finite_dtypes_and_shapes(results) -> None:
    actual, exact, usual = results
    for wrong, message in (
        (actual["outputs"][0].float(), "dtype"),
        (actual["outputs"][0][:-1], "shape"),
        (actual["outputs"][0] * float("nan"), "40 values|not finite"),
    ):
        with pytest.raises(AssertionError, match=message):
            assert_within_budget({**actual, "outputs": [wrong, actual["outputs"][1]]}, exact, usual)


def test_other_groups_and_slack(results) -> None:
    actual, exact, usual = results
    assert "results are of" in (over_budget({**actual, "others": []}, exact, usual) or "")
    far = {"outputs": [torch.ones(2)]}
    near = {"outputs": [torch.zeros(2)]}
    assert "over the budget" in (over_budget(far, near, near) or "")
    assert over_budget(far, near, near, slack=far) is None


def test_poisoning_leaves_settings_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    for fill in (False, True):
        monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)
        with poisoned_outputs():
            assert torch.empty(2).isnan().all()
        assert torch.utils.deterministic.fill_uninitialized_memory is fill


def test_memory_is_poisoned_in_python_and_for_operators() -> None:
    with poisoned_outputs():
        assert torch.empty(50).isnan().all()
        assert torch.empty(50, dtype=torch.bfloat16).isnan().all()
        assert torch.empty_like(torch.zeros(3, 4)).isnan().all()
        assert torch.zeros(3).new_empty((5,)).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


@requires.cpp_kernels
@pytest.mark.parametrize("rows", [1, 64])
def test_results_of_the_pool_are_poisoned(rows: int) -> None:
    """Large ones do not come from PyTorch's allocator; kernels write them all, so that only the fill itself shows."""
    experts, logits = torch.ones(rows, 1, 1024), torch.zeros(rows, 1)
    for poison, fills in ((contextlib.nullcontext, 0), (poisoned_outputs, 1)):
        with torch.no_grad(), poison(), torch.autograd.profiler.profile() as profile:
            mk.gated_mixture(experts, logits, mk.Routing.mmoe(1, 1))
        assert sum(event.name == "aten::fill_" for event in profile.function_events) == fills


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_keep_shape_and_values(layout: str) -> None:
    tensor = torch.randn(5, 6)
    other = laid_out(tensor, layout)
    assert other.shape == tensor.shape
    assert torch.equal(other, tensor[:1].expand(5, 6) if layout == "expanded" else tensor)
    assert other.is_contiguous() == (layout in ("contiguous", "offset"))


def test_cases_of_a_seed_have_the_same_values_in_every_dtype() -> None:
    wide, narrow = random_expert_mixture(3, torch.float32), random_expert_mixture(3, torch.bfloat16)
    for name, leaves in wide.leaves().items():
        for a, b in zip(leaves, narrow.leaves()[name], strict=True):
            assert torch.equal(a.to(torch.bfloat16), b)


def test_routings_are_varied() -> None:
    rng = random.Random(0)
    routings = [random_routing(rng) for _ in range(100)]
    assert any(r.wiring.idle for r in routings)
    assert any(len({len(gate) for gate in r.gate_experts}) > 1 for r in routings)
    assert any(set(range(r.num_inputs)) - set(r.expert_inputs) for r in routings)


def test_a_leaf_in_several_places_stays_one() -> None:
    make = CaseFactory(0, torch.float32)
    case = make.gated_mixture(4, 3, mk.Routing.mmoe(2, 2))
    case.arguments["gate_logits"][1] = case.arguments["gate_logits"][0]
    again = case.to(torch.float64)
    assert again.arguments["gate_logits"][0] is again.arguments["gate_logits"][1]
    assert len(again.leaves()["gate_logits"]) == 1
