"""The suite pcgrad-step at tiny sizes: everybody leaves the gradients that are due, and who does not is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import readme
from benchmarks.harness import machine, plots, timing
from benchmarks.harness import report as reports
from benchmarks.harness.case import OURS, Bench
from benchmarks.harness.limits import Limits
from benchmarks.harness.runner import check, run_case
from benchmarks.peers import exact_step, step_model
from benchmarks.peers.exact_step import ExactStep
from benchmarks.peers.pcgrad_steps import SummedStep, UsualStep, WrappedStep
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from benchmarks.peers.step_model import StepModel
from benchmarks.suites import pcgrad_step

CPU = torch.device("cpu")
BUDGET = timing.Budget(seconds=0.02, warmup=0.0, min_rounds=2)
LIMITS = Limits(CPU, {"float32": 1e11}, {}, 1e10, 2e10, 1e10)
LIBRARIES = {pcgrad_step.OPTIMIZER: "pytorch_optimizer", pcgrad_step.TORCHJD: "torchjd"}
SURGERY = (pcgrad_step.USUAL, *LIBRARIES, pcgrad_step.MODULES, OURS)
FLOORS = (pcgrad_step.SUM, pcgrad_step.FUSED_SUM)


def shape(num_tasks: int = 4, levels: int = 2) -> TrunkShape:
    return TrunkShape(12, num_tasks, num_specific=2, num_shared=1, units=(16, 8), num_levels=levels)


def made(precision: torch.dtype = torch.float32, num_tasks: int = 4, levels: int = 2, rows: int = 33) -> Bench:
    return pcgrad_step.build(shape(num_tasks, levels), rows, precision, CPU)


def workload(num_tasks: int = 4) -> tuple[StepModel, Tensor, Tensor]:
    """A model, inputs and labels in float32."""
    torch.manual_seed(0)
    sizes = shape(num_tasks)
    model = StepModel(PerExpertTrunk(sizes), sizes)
    x = step_model.draw(model, sizes, 33, torch.float32, CPU)
    return model, x, step_model.draw_labels(sizes, 33, torch.float32, CPU)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("num_tasks", [2, 4, 8])
def test_every_contender_agrees_with_float64(num_tasks: int, levels: int, precision: torch.dtype) -> None:
    for library in LIBRARIES.values():
        pytest.importorskip(library)
    bench = made(precision, num_tasks, levels)
    outcomes, steps = check(bench, precision)
    assert {name: outcome.reason for name, outcome in outcomes.items()} == dict.fromkeys((*SURGERY, *FLOORS), "")
    assert steps.keys() == outcomes.keys()
    expected = bench.expected()
    assert expected["outputs: losses"].shape == (num_tasks,) and f"gradients: tower {num_tasks - 1}" in expected


def test_float64_agrees_with_the_definition() -> None:
    """Without Gram matrix and coefficients: backward passes, and a walk over the projections."""
    model, x, labels = workload()
    exact = ExactStep(model, x, labels)
    double = copy.deepcopy(model).double()
    by_task = []
    for loss in double.losses(double.trunk(x.double()), labels.double()):
        double.zero_grad()
        loss.backward(retain_graph=True)
        by_task.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in double.parameters()])
    trunk = list(double.trunk.parameters())
    flat = [torch.cat([grad.flatten() for grad in grads[: len(trunk)]]) for grads in by_task]
    update = torch.zeros_like(flat[0])
    conflicts = 0
    for i, row in enumerate(exact.order):
        mine = flat[i].clone()
        for other in (flat[j] for j in row if j != i):
            if (inner := mine.dot(other)) < 0:
                conflicts += 1
                mine -= inner / other.dot(other) * other
        update += mine
    assert conflicts >= 4
    for parameter, *grads in zip(double.parameters(), *by_task, strict=True):
        parameter.grad = torch.stack(grads).sum(0)
    assert_same(exact.plain_sum(), double)
    for parameter, grad in zip(trunk, update.split([p.numel() for p in trunk]), strict=True):
        parameter.grad = grad.view_as(parameter)
    assert_same(exact.surgery(), double)
    plain, name = exact.plain_sum(), "gradients: level 0 layer 0 weight"
    assert (plain[name] - exact.surgery()[name]).norm() > 0.05 * plain[name].norm()


def assert_same(found: Mapping[str, Tensor], model: StepModel) -> None:
    """What was found is the model's gradients."""
    assert found.keys() == {"outputs: losses", *model.gradients()}
    for name, gradient in model.gradients().items():
        torch.testing.assert_close(found[name], gradient)


class Unprojected(WrappedStep):
    """Forgets the projection."""

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        torch.stack(losses).sum().backward()


class OtherOrder(WrappedStep):
    """Draws another order."""

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__(model, x, labels, seed + 1)


class HalvedTower(WrappedStep):
    """Loses a part of one tower's gradient."""

    def differentiate(self, features: Sequence[Tensor], losses: list[Tensor]) -> None:
        super().differentiate(features, losses)
        bias: Any = list(self.model.towers[-1].parameters())[-1]
        bias.grad /= 2


class Moving(WrappedStep):
    """Trains for real, so that the second step is one on other weights."""

    def __init__(self, model: StepModel, x: Tensor, labels: Tensor, seed: int) -> None:
        super().__init__(model, x, labels, seed)
        self.adam.param_groups[0]["lr"] = 0.1


@pytest.mark.parametrize(
    ("wrong", "precision", "what"),
    [
        (Unprojected, torch.float32, "gradients: level"),
        (Unprojected, torch.bfloat16, "gradients: level"),
        (OtherOrder, torch.float32, "gradients: level"),  # in bfloat16 rounding hides it at this size
        (HalvedTower, torch.float32, "gradients: tower 3"),
        (HalvedTower, torch.bfloat16, "gradients: tower 3"),
        (Moving, torch.float32, "is off"),
        (Moving, torch.bfloat16, "is off"),
    ],
)
def test_a_wrong_contender_is_refused(
    wrong: type[WrappedStep], precision: torch.dtype, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pcgrad_step, "WrappedStep", wrong)
    case = replace(pcgrad_step.case(shape(), 33, precision), memory=False)
    row = run_case(case, CPU, BUDGET)
    assert row.baseline == pcgrad_step.USUAL and row.timing(pcgrad_step.USUAL) is not None
    for name in (OURS, pcgrad_step.MODULES):
        assert row.outcomes[name].status == reports.FAILED and row.timing(name) is None
        assert what in row.outcomes[name].reason
    assert all(row.timing(name) is not None for name in FLOORS)


def test_a_floor_that_projects_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    order = ExactStep(*workload()).order
    monkeypatch.setattr(pcgrad_step, "SummedStep", lambda *given: UsualStep(*given, order))
    outcomes, steps = check(made(), torch.float32)
    assert all(outcomes[name].status == reports.FAILED and name not in steps for name in FLOORS)


def test_a_step_ends_with_adam_and_moves_nothing() -> None:
    model, x, labels = workload()
    before = [p.detach().clone() for p in model.parameters()]
    step = SummedStep(model, x, labels)
    step()
    step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert all(int(state["step"]) == 2 and bool(state["exp_avg"].any()) for state in step.adam.state.values())
    assert len(step.adam.state) == len(before)
    step.forget()
    assert not step.outputs and all(p.grad is None for p in model.parameters())


def test_rows_at_a_corner_are_not_drawn() -> None:
    """Neither those at a corner of the trunk, nor those at one of a tower."""
    model, x, _ = workload()
    for linear in (model.before_relu()[0], model.before_relu()[-1]):
        other = copy.deepcopy(model)
        at = model.before_relu().index(linear)
        with torch.no_grad():
            other.before_relu()[at].weight[0] = 0
            other.before_relu()[at].bias[0] = 0
        with pytest.raises(ValueError, match="33 rows without an input of a ReLU near zero are wanted, got 0"):
            step_model.draw(other, shape(), 33, torch.float32, CPU)
    assert len(x) == 33


def test_angles_that_are_not_clear_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(exact_step.CLEAR_ANGLES, torch.float32, 1.5)
    monkeypatch.setattr(exact_step, "MOST_DRAWS", 2)
    with pytest.raises(ValueError, match="the cosine of every angle must be at least 1.5 from zero in one of 2 orders"):
        ExactStep(*workload())


def test_rows_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sizes, and of bfloat16 few rows where the processor has no products of it."""
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    cases = list(pcgrad_step.cases("cpu"))
    sizes = {(*case.size.values(), case.dtype) for case in cases}
    tasks, rows = (2, 4, 8), (64, 1024, 4096)
    assert sizes == {(t, n, b, d) for t in tasks for n in (1, 2) for b in rows for d in pcgrad_step.DTYPES}
    assert len(cases) == 36 and sum(case.quick for case in cases) == 1
    assert {case.workload for case in cases if case.size["B"] == 1024} == {"E"}
    assert {case.workload for case in cases if case.size["B"] != 1024} == {"E-batch"}
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: False)
    assert sorted(case.size["B"] for case in pcgrad_step.cases("cpu") if case.dtype == torch.bfloat16) == [64] * 6
    assert len(list(pcgrad_step.cases("cuda"))) == 36
    assert (pcgrad_step.trunk_shape(2, 1).num_experts, pcgrad_step.trunk_shape(8, 1).num_experts) == (12, 18)


def test_table_and_plots(tmp_path: Path) -> None:
    for module in ("matplotlib", *LIBRARIES.values()):
        pytest.importorskip(module)
    row = run_case(pcgrad_step.case(shape(), 33, torch.float32), CPU, BUDGET)
    assert all(outcome.peak and outcome.timing for outcome in row.outcomes.values())
    row.set_limit(LIMITS)
    found = reports.new_report(["pcgrad-step", "pcgrad"], CPU, BUDGET)
    found.limits = reports.limits_as_json(LIMITS)
    rows = found.rows["pcgrad-step"] = []
    for case in pcgrad_step.cases("cpu"):
        if case.dtype == torch.float32:
            rows.append(replace(row, workload=case.workload, size=dict(case.size)))
    assert reports.load(reports.save(found, tmp_path / "rows.json")) == found
    head, _, first, *rest = readme.TABLES["pcgrad-step"](found)
    assert first.startswith("| 2 | 1 | 64 | float32 | ") and len(rest) == 17
    for word in ("usual", "pytorch-optimizer", "TorchJD", "mk.optim.PCGrad", "floor", "peak memory"):
        assert word in head
    paths = plots.draw(pcgrad_step.SUITE, rows, found, tmp_path)
    kinds = ("speedup", "roofline", "tasks", "tasks-one-level", "rows", "rows-one-level")
    assert [path.name for path in paths] == [f"pcgrad-step-{machine.slug(found.machine)}-{kind}.png" for kind in kinds]
    assert all(path.stat().st_size > 10_000 for path in paths)
