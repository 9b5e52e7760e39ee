"""The suite pcgrad at tiny sizes: everybody computes the same, and what is measured beside the time is right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.harness import plots, table, timing, work
from benchmarks.harness import report as reports
from benchmarks.harness.case import Case, amount
from benchmarks.harness.limits import Limits
from benchmarks.harness.memory import MIB, peak_mib
from benchmarks.harness.runner import check, run_case
from benchmarks.peers import task_gradients
from benchmarks.peers.plain_read import WAYS, PlainRead, whole
from benchmarks.peers.usual_pcgrad import Surgery, usual
from benchmarks.suites import pcgrad

CPU = torch.device("cpu")
BUDGET = timing.Budget(seconds=0.02, warmup=0.0, min_rounds=5)
LIMITS = Limits(CPU, {"float32": 1e11, "bfloat16": 1e12}, {}, 1e10, 2e10, 1e10)
LIBRARIES = {pcgrad.OPTIMIZER: "pytorch_optimizer", pcgrad.TORCHJD: "torchjd", pcgrad.READY: "torchjd"}


def tiny(workload: str = "C", num_tasks: int = 4, parameters: int = 20_000, tensors: int = 6) -> Case:
    return pcgrad.case(workload, num_tasks, parameters, tensors)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tasks", [2, 5])
def test_every_contender_agrees_with_float64(num_tasks: int, precision: torch.dtype) -> None:
    for library in sorted(set(LIBRARIES.values())):
        pytest.importorskip(library)
    made = pcgrad.case("C", num_tasks, 20_001, 6, precision).build(CPU)
    outcomes, steps = check(made, precision)
    names = [pcgrad.USUAL, *LIBRARIES, "ours", *pcgrad.READS]
    assert {name: outcome.reason for name, outcome in outcomes.items()} == dict.fromkeys(names, "")
    assert steps.keys() == outcomes.keys()
    assert made.expected()["update"].shape == (20_001,)


def test_the_usual_agrees_with_the_definition() -> None:
    """Without Gram matrix and coefficients, so that ``exact`` is held against something else."""
    order = task_gradients.orders(5)
    grads = task_gradients.dense(5, [3000, 40], order, torch.float64, CPU)
    total = torch.zeros(3040, dtype=torch.float64)
    for i, row in enumerate(order):
        mine = torch.cat(grads[i])
        for other in (torch.cat(grads[j]) for j in row if j != i):
            if (inner := mine.dot(other)) < 0:
                mine = mine - inner / other.dot(other) * other
        total += mine
    plain = torch.stack([torch.cat(task) for task in grads]).sum(0)
    assert not torch.allclose(total, plain, rtol=1e-2)  # there are conflicts
    torch.testing.assert_close(torch.cat(usual(grads, order)), total)
    torch.testing.assert_close(task_gradients.exact(grads, order)["update"], total)


def test_gradients_change_in_no_call() -> None:
    order = task_gradients.orders(4)
    grads = task_gradients.dense(4, [500, 20], order, torch.float32, CPU)
    before = [[grad.clone() for grad in task] for task in grads]
    contenders = pcgrad._contenders(grads, order)
    for contender in contenders:
        if contender.name in LIBRARIES:
            pytest.importorskip(LIBRARIES[contender.name])
        step = contender.build()
        step()
        step()
        assert all(torch.equal(a, b) for x, y in zip(grads, before, strict=True) for a, b in zip(x, y, strict=True))


def test_angles_that_are_not_clear_are_refused() -> None:
    first, second = torch.eye(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="cosine of every angle"):
        task_gradients.exact([[first], [second]], [[0, 1], [1, 0]])


def test_sparse_gradients() -> None:
    """Rows that are touched twice are there, and the usual PCGrad is right both ways. Ours has tests of its own."""
    bench = pcgrad.build_sparse(3, (4000, 16), 1500, CPU)
    usual_step = next(c for c in bench.contenders if c.name == pcgrad.USUAL).build()
    assert isinstance(usual_step, Surgery)
    assert any(task[0].coalesce().values().shape[0] < 1500 for task in usual_step.grads)
    outcomes, _ = check(bench, torch.float32)
    for name in (pcgrad.USUAL, pcgrad.TOUCHED_ROWS):
        assert outcomes[name].status == reports.OK, outcomes[name].reason


class Wrong(Surgery):
    """Forgets the projection."""

    def update(self) -> Sequence[Tensor]:
        return [torch.stack(column).sum(0) for column in zip(*self.grads, strict=True)]


def test_a_sum_without_projection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pcgrad, "Ours", Wrong)
    row = run_case(tiny(), CPU, BUDGET)
    assert row.baseline == pcgrad.USUAL and row.timing(pcgrad.USUAL) is not None
    assert row.outcomes["ours"].status == reports.FAILED and row.timing("ours") is None


def test_peak_memory() -> None:
    x = torch.ones(1 << 18)  # 1 MiB
    pool = torch.ones(1 << 17)

    class Doubled(Surgery):
        def update(self) -> Sequence[Tensor]:
            y = torch.cat([x, x])
            z = y.clone()
            del y
            return z[1:], z[:2], pool

    assert peak_mib(Doubled([], []), CPU) == pytest.approx(4.5, abs=0.01)
    row = run_case(tiny(parameters=200_000), CPU, BUDGET)
    update = 200_000 * 4 / MIB
    peaks = {name: outcome.peak for name, outcome in row.outcomes.items() if outcome.peak is not None}
    # Flattened gradients, their copies and the stack of these; the update alone at least.
    assert 8 * update < peaks[pcgrad.USUAL] < 14 * update
    assert 0.999 * update <= peaks["ours"] < peaks[pcgrad.USUAL]


@pytest.mark.parametrize("way", WAYS)
def test_a_plain_read_reads_as_many_bytes(way: str) -> None:
    """It is a floor: held against what it computes itself, and refused where it has read something else."""
    traffic = work.projection(8, 2_000_000, 4).traffic
    step = PlainRead(traffic, CPU, way)
    assert 2 * step.buffer.nbytes == pytest.approx(traffic, rel=0.01)
    step()
    torch.testing.assert_close(step.results()["update"].double(), whole()["update"])
    step.buffer[3, 5] = 100.0
    step()
    assert not torch.equal(step.results()["update"].double(), whole()["update"])


def test_fast_steps_give_more_samples() -> None:
    assert [timing._samples_a_round(ratio) for ratio in (1.0, 9.9, 10.0, 35.0, 1e6)] == [1, 1, 2, 7, 8]


def test_table_and_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cases = [tiny("C-tasks", 2), tiny("C-tasks", 3), pcgrad.case("C", 8, 20_000, 40), pcgrad.case("C", 8, 40_000, 40)]
    found = reports.new_report(["pcgrad", "mixture"], CPU, BUDGET)
    rows = [run_case(case, CPU, BUDGET) for case in cases]
    assert all(outcome.timing.samples >= 3 for row in rows for outcome in row.outcomes.values() if outcome.timing)
    for row in rows:
        row.set_limit(LIMITS)
        assert row.limited_by == "bandwidth"
    found.rows["pcgrad"] = rows
    found.limits = reports.limits_as_json(LIMITS)
    assert reports.load(reports.save(found, tmp_path / "rows.json")) == found
    assert "usual MiB" in table.text(rows) and "vs usual" in table.markdown(rows)
    paths = plots.draw(pcgrad.SUITE, rows, found, tmp_path)
    assert [path.name.rsplit("-", 1)[1] for path in paths] == [
        "speedup.png",
        "roofline.png",
        "tasks.png",
        "size.png",
    ]
    assert all("mixture" not in path.name and path.stat().st_size > 10_000 for path in paths)


def test_workloads_are_those_of_the_documentation() -> None:
    cases = list(pcgrad.cases("cpu"))
    sizes = {(case.workload, *case.size.values(), case.dtype_name) for case in cases}
    assert {("C", 8, 10_000_000, tensors, "float32") for tensors in (40, 400)} <= sizes
    assert ("C", 8, 10_000_000, 40, "bfloat16") in sizes and ("C-sparse", 8, 32_000_000, 1, "float32") in sizes
    assert {case.size["T"] for case in cases if case.workload == "C-tasks"} == {2, 4, 8, 16}
    assert next(c for c in pcgrad.cases("cuda") if c.workload == "C").size["P"] == 50_000_000
    assert cases[0].traffic == 17 * 10_000_000 * 4
    for total, tensors in ((10_000_000, 400), (999, 4), (1_000_003, 40)):
        lengths = task_gradients.sizes(total, tensors)
        assert sum(lengths) == total and len(lengths) == tensors and min(lengths) > 0
    assert [amount(value) for value in (1, 65536, 10_000_000, 0)] == ["1", "65536", "10M", "0"]
