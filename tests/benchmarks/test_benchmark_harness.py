"""The benchmark harness at tiny sizes: it refuses wrong results, keeps its figures, and draws its table and plots."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from benchmarks import readme, run
from benchmarks.harness import check, plots, table, timing
from benchmarks.harness import report as reports
from benchmarks.harness.case import FORWARD, Bench, Case, Curve, Step
from benchmarks.harness.limits import Limits
from benchmarks.harness.memory import MIB, peak_mib
from benchmarks.harness.runner import check as check_bench
from benchmarks.harness.runner import run_case
from benchmarks.peers.exact import rows_at_a_corner
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from benchmarks.suites import mixture

CPU = torch.device("cpu")
SHAPE = TrunkShape(6, num_tasks=2, num_specific=2, num_shared=1, units=(5, 4), num_levels=2)
BUDGET = timing.Budget(seconds=0.02, warmup=0.0, min_rounds=2)


def tiny(training: bool, precision: torch.dtype = torch.float32, rows: int = 7) -> Case:
    return mixture.case("tiny", SHAPE, rows, precision, training, serving=not training, quick=True)


def rebuilt(case: Case, change: Callable[[Bench], Bench]) -> Case:
    """The case with its contenders changed."""
    return replace(case, build=lambda device: change(case.build(device)))


def without_compile(case: Case) -> Case:
    """The case without the contenders that take seconds to build."""
    left_out = readme.COMPILED
    return rebuilt(case, lambda made: replace(made, contenders=[c for c in made.contenders if c.name not in left_out]))


def with_step(case: Case, name: str, build: Callable[[Step], Step]) -> Case:
    """The case with one contender's step replaced by what ``build`` makes of it."""

    def change(made: Bench) -> Bench:
        chosen = next(c for c in made.contenders if c.name == name)
        changed = replace(chosen, build=lambda: build(chosen.build()))
        return replace(made, contenders=[changed if c is chosen else c for c in made.contenders])

    return rebuilt(case, change)


class Altered:
    """A step with one element of its results changed by a share of the largest."""

    def __init__(self, step: Step, name: str, change: float) -> None:
        self.step, self.name, self.change = step, name, change
        self.outputs = step.outputs

    def forget(self) -> None:
        self.outputs = ()
        self.step.forget()

    def __call__(self) -> None:
        self.step()
        self.outputs = self.step.outputs

    def results(self) -> Mapping[str, Tensor]:
        found = {name: tensor.clone() for name, tensor in self.step.results().items()}
        found[self.name].view(-1)[0] += self.change * found[self.name].abs().max()
        return found


@pytest.fixture(scope="module")
def report() -> reports.Report:
    """A report of a few tiny rows, with limits that are made up."""
    limits = Limits(CPU, {"float32": 1e11, "bfloat16": 1e12}, {}, 1e10, 2e10, 1e10)
    cases = [tiny(True), tiny(False), tiny(False, rows=3), tiny(False, torch.bfloat16)]
    found = reports.new_report(["mixture"], CPU, BUDGET)
    found.limits = reports.limits_as_json(limits)
    found.rows["mixture"] = [run_case(without_compile(case), CPU, BUDGET) for case in cases]
    for row in found.rows["mixture"]:
        row.set_limit(limits)
    return found


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_every_contender_agrees_with_float64(precision: torch.dtype, training: bool) -> None:
    made = without_compile(tiny(training, precision, rows=33)).build(CPU)
    outcomes, steps = check_bench(made, precision)
    names = ["eager", "batched", "ours", *([] if training else ["prepared"])]
    assert {name: outcome.reason for name, outcome in outcomes.items()} == dict.fromkeys(names, "")
    assert all(o.status == reports.OK and o.error is not None and o.error <= 1 for o in outcomes.values())
    assert steps.keys() == outcomes.keys()
    assert len(made.expected()) == (2 + 1 + 2 * 2 * 2 + 2 * (3 + 2) if training else 2)


def test_whoever_serves_is_compiled_frozen_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are frozen where the first call compiles, in evaluation and without autograd, and nowhere else."""
    found: list[tuple[object, ...]] = []

    def compile_(module: nn.Module, **options: Any) -> Callable[..., Any]:
        def call(x: Tensor) -> Any:
            state = inductor.freezing, torch.is_inference_mode_enabled(), module.training
            found.append((options.get("mode", "default"), *state))
            return module(x)

        return call

    monkeypatch.setattr(torch, "compile", compile_)
    outcomes, _ = check_bench(tiny(False).build(CPU), torch.float32)
    assert outcomes["frozen"].status == reports.OK, outcomes["frozen"].reason
    assert [call for call in found if call[0] == "max-autotune"] == [
        ("max-autotune", True, True, False),
        *[("max-autotune", False, True, False)] * 2,
    ]
    assert not any(call[1] for call in found if call[0] == "default")

    def names(case: Case) -> list[str]:
        return [contender.name for contender in case.build(CPU).contenders]

    assert names(tiny(False, rows=4096)) == ["eager", "compile", "frozen", "batched", "ours", "prepared"]
    assert "frozen" not in names(tiny(True))


@pytest.mark.parametrize("name", ["outputs: 1", "gradients: input", "gradients: level 1 gate 0 bias"])
@pytest.mark.parametrize("change", [1e-4, float("nan")])
def test_a_wrong_contender_is_refused(name: str, change: float) -> None:
    case = with_step(without_compile(tiny(True)), "ours", lambda step: Altered(step, name, change))
    row = run_case(case, CPU, BUDGET)
    assert row.outcomes["ours"].status == reports.FAILED and name in row.outcomes["ours"].reason
    assert row.timing("ours") is None and row.timing("eager") is not None
    assert row.speedup("eager") is None and row.share_of_limit("ours") is None
    assert "FAILED" in table.text([row]) and "FAILED" in table.markdown([row])
    found = reports.new_report(["mixture"], CPU, BUDGET)
    found.rows["mixture"] = [row]
    assert found.failed


def test_missing_and_misshapen_results_are_refused() -> None:
    expected = {"y": torch.ones(2, 2, dtype=torch.float64)}
    with pytest.raises(ValueError, match="results must be"):
        check.measure_all({}, expected)
    with pytest.raises(ValueError, match=r"y must have shape \[2, 2\], got \[2\]"):
        check.measure_all({"y": torch.ones(2)}, expected)


def test_a_wrong_baseline_stops_the_row() -> None:
    case = with_step(without_compile(tiny(False)), "eager", lambda step: Altered(step, "outputs: 0", 0.1))
    row = run_case(case, CPU, BUDGET)
    assert row.outcomes["eager"].status == reports.FAILED
    assert row.outcomes["ours"].status == reports.UNAVAILABLE and row.timing("ours") is None


@pytest.mark.parametrize(("name", "status"), [("batched", reports.UNAVAILABLE), ("ours", reports.FAILED)])
def test_a_contender_that_cannot_run_is_reported(name: str, status: str) -> None:
    def broken(_: Step) -> Step:
        raise RuntimeError("no compiler here\nand more")

    row = run_case(with_step(without_compile(tiny(False)), name, broken), CPU, BUDGET)
    assert row.outcomes[name].status == status
    assert row.outcomes[name].reason == "RuntimeError: no compiler here"
    assert row.timing(name) is None and row.timing("eager") is not None


def test_peak_memory_of_training() -> None:
    """The same at each call, whatever memory mtlkernels keeps, and no less than what is left in the end."""
    made = tiny(True, rows=512).build(CPU)
    for contender in made.contenders:
        if contender.name not in readme.COMPILED:
            step = contender.build()
            peaks = [peak_mib(step, CPU) for _ in range(3)]
            left = sum(result.nbytes for result in step.results().values()) / MIB
            assert peaks == pytest.approx([peaks[0]] * 3, rel=1e-3) and peaks[0] > left


def test_training_rows_have_a_peak(report: reports.Report) -> None:
    training, *forward = report.rows["mixture"]
    assert all(outcome.peak is not None and outcome.peak > 0 for outcome in training.outcomes.values())
    assert all(outcome.peak is None for row in forward for outcome in row.outcomes.values())


def test_rows_at_a_corner_are_found() -> None:
    trunk = PerExpertTrunk(SHAPE)
    x = torch.randn(5, 6)
    assert not rows_at_a_corner(trunk, x).any()
    level: Any = trunk.levels[0]
    first = level.linears(0)[0]
    with torch.no_grad():
        first.bias[2] -= first(x)[3, 2]
    assert rows_at_a_corner(trunk, x).tolist() == [False, False, False, True, False]


def test_json_holds_everything_and_reads_back(report: reports.Report, tmp_path: Path) -> None:
    path = reports.save(report, tmp_path / "results")
    assert path.name.startswith("mixture-") and path.suffix == ".json"
    data = json.loads(path.read_text())
    assert {"cpu", "cores", "cpu_capability", "isa"} <= data["machine"].keys()
    assert {"python", "torch", "triton", "mtlkernels", "torchjd", "compiler", "commit"} <= data["versions"].keys()
    assert data["threads"] == torch.get_num_threads() and data["date"] and data["device"] == "cpu"
    assert {"gemm_tflops", "read_gb_s", "resident_read_gb_s", "copy_gb_s"} <= data["limits"].keys()
    for row in data["rows"]["mixture"]:
        for outcome in row["outcomes"].values():
            assert outcome["timing"]["lower"] <= outcome["timing"]["median"] <= outcome["timing"]["upper"]
            assert outcome["timing"]["samples"] >= 2
        assert row["derived"]["speedup_of_ours_over"].keys() == row["outcomes"].keys() - {"ours"}
        assert row["limit_ms"] > 0 and row["flop"] > 0
    assert reports.load(path) == report


def test_tables_have_a_line_a_row(report: reports.Report) -> None:
    rows = report.rows["mixture"]
    lines = table.text(rows).splitlines()
    assert len({line.index("float") for line in lines[2:6] if "float32" in line}) == 1
    for word in ("eager ms", "batched ms", "ours ms", "vs eager", "of limit", "GFLOP"):
        assert word in lines[0]
    marked = table.markdown(rows).splitlines()
    assert len({line.count("|") for line in marked[: len(rows) + 2]}) == 1
    assert "GB/s" in table.machine(report)


def test_plots_are_written(report: reports.Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    suite = replace(mixture.SUITE, curves=(Curve("rows", "Time", "B", ("tiny",), FORWARD),))
    paths = plots.draw(suite, report.rows["mixture"], report, tmp_path)
    assert [path.name.rsplit("-", 1)[1] for path in paths] == ["speedup.png", "roofline.png", "rows.png"]
    assert all(path.stat().st_size > 10_000 for path in paths)


def test_command_line(report: reports.Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = reports.save(report, tmp_path / "earlier.json")
    assert run.main(["--from-json", str(path), "--markdown"]) == 0
    assert "| tiny | B=7 | forward+backward | float32 |" in capsys.readouterr().out
    bad = reports.load(path)
    bad.rows["mixture"][0].outcomes["ours"].status = reports.FAILED
    assert run.main(["--from-json", str(reports.save(bad, tmp_path / "bad.json"))]) == 1
    with pytest.raises(SystemExit):
        run.main(["no-such-suite"])
    with pytest.raises(SystemExit, match="no rows left"):
        run.main(["mixture", "--workload", "Z"])


def test_all_suites_by_one_command(
    report: reports.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder gets a file a suite, each as soon as it is measured; a file gets all of them."""
    first, folder = "mixture", tmp_path / "results"

    def measured(cases: list[Case], *_: object) -> list[reports.Row]:
        seen.append(sorted(name for path in folder.glob("*.json") for name in reports.load(path).suites))
        return [replace(row, workload=cases[0].workload) for row in report.rows[first]]

    seen: list[list[str]] = []
    monkeypatch.setattr(run, "run", measured)
    assert run.main(["--json", str(folder)]) == 0
    assert seen == [sorted(list(run.SUITES)[:count]) for count in range(len(run.SUITES))]
    stored = {path: reports.load(path) for path in folder.glob("*.json")}
    assert sorted(name for found in stored.values() for name in found.rows) == sorted(run.SUITES)
    assert all(path.name == found.file_name and found.suites == list(found.rows) for path, found in stored.items())
    capsys.readouterr()
    together = tmp_path / "together.json"
    assert run.main(["--json", str(together), "--compare", str(folder)]) == 0
    assert capsys.readouterr().out.count("rows compared with") == len(run.SUITES)
    assert reports.load(together).rows.keys() == run.SUITES.keys() == set(reports.load(together).suites)
    assert run.main([first, "--workload", "A", "--compare", str(tmp_path)]) == 0
    assert "nothing to compare with: there is no" in capsys.readouterr().out


def test_workloads_are_those_of_the_documentation() -> None:
    def keys(device: str) -> set[tuple[str, int]]:
        return {(case.workload, case.size["B"]) for case in mixture.cases(device)}

    cpu = {("A", 4096), ("A2", 4096), ("A1", 1), ("A1", 16), ("A1", 64), ("A1", 256)}
    cpu |= {("A-batch", rows) for rows in (1, 16, 64, 256, 1024)} | {("A-experts", 1024)}
    assert keys("cpu") == cpu and keys("cuda") == cpu | {("B", 65536)}
    assert mixture.LEVEL.work(4096, 4, training=False).flop == pytest.approx(13.78e9, rel=1e-3)
    assert mixture.LARGE.work(65536, 4, training=False).flop == pytest.approx(2.9e12, rel=0.05)


def test_interleaved_times_each_step() -> None:
    calls = {"a": 0, "b": 0}

    def counted(name: str) -> Callable[[], None]:
        def step() -> None:
            calls[name] += 1

        return step

    timings = timing.interleaved({name: counted(name) for name in calls}, CPU, BUDGET)
    for name, found in timings.items():
        assert found.samples >= 2
        assert calls[name] >= found.samples * (found.calls + 1)  # a short step follows one of its own
        assert found.best <= found.lower <= found.median <= found.upper
    ordered = [1.0, 2.0, 3.0, 4.0]
    assert timing.quantile(ordered, 0.5) == 2.5 and timing.quantile(ordered, 1.0) == 4.0


def test_any_number_of_contenders_can_be_drawn() -> None:
    names = [f"contender {i}" for i in range(20)]
    colours, markers = plots._style(names, names[0])
    assert {*names} <= {*colours} and {*names} <= {*markers}
