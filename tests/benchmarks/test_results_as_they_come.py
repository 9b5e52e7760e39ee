"""What a run leaves when it is cut off, and what the next one takes up; no benchmark is timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness import machine as dates
from benchmarks.harness import plots, runner, table
from benchmarks.harness import report as reports
from benchmarks.harness.case import Case
from benchmarks.harness.limits import Limits
from benchmarks.harness.machine import ROOT
from benchmarks.suites import mixture


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Where rows take no time, and limits are made up."""
    found = Machine()
    monkeypatch.setattr(runner, "run_case", found.run)
    monkeypatch.setattr(Limits, "measure", lambda self, dtypes, _: _known(self, dtypes))
    return found


class Machine:
    """Says how long calls take, and whether something else keeps it busy."""

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []
        self.cut_off = -1  # after so many rows a run ends
        self.busy = False
        self.ours = 2.0

    def run(self, case: Case, *_: object) -> reports.Row:
        if len(self.asked) == self.cut_off:
            raise KeyboardInterrupt
        self.asked.append(case.key)
        times = {"eager": 4.0, "ours": self.ours}
        outcomes = {name: reports.Outcome(name, reports.OK, timing=_timing(at)) for name, at in times.items()}
        if self.busy:
            outcomes = {name: reports.Outcome(name, reports.BUSY, "others") for name in times}
        of_case = case.workload, case.work, case.dtype_name, dict(case.size), case.flop, case.traffic, case.resident
        return reports.Row(*of_case, outcomes, date=dates.today())


def _timing(median: float) -> reports.Timing:
    return reports.Timing(median, median, median, median, samples=9, calls=1)


def stored(folder: Path) -> tuple[Path, reports.Report]:
    (path,) = folder.glob("mixture-*.json")
    return path, reports.load(path)


def test_rows_are_kept_as_they_come_and_taken_up_again(tmp_path: Path, machine: Machine) -> None:
    """A run that is cut off leaves what it has measured; the next one measures the others, and what was disturbed."""
    command = ["mixture", "--workload", "A", "A2", "--json", str(tmp_path), "--resume"]
    every = [case.key for case in mixture.cases("cpu") if case.workload in ("A", "A2")]
    machine.cut_off = 3
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    path, found = stored(tmp_path)
    assert [row.key for row in found.rows["mixture"]] == every[:3]
    machine.cut_off = -1
    found.rows["mixture"][1].outcomes["ours"].status = reports.BUSY
    reports.save(found, path)
    assert run.main(command) == 0
    assert machine.asked == [*every[:3], every[1], *every[3:]]
    _, found = stored(tmp_path)
    assert [row.key for row in found.rows["mixture"]] == every
    found.versions["torch"] = "another"  # nothing of it is taken
    reports.save(found, path)
    assert run.main(command) == 0
    assert machine.asked[len(every) + 1 :] == every
    with pytest.raises(SystemExit):
        run.main(["mixture", "--resume"])


def test_a_run_is_compared_with_what_it_replaces(
    tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["mixture", "--json", str(tmp_path), "--compare", str(tmp_path)]
    assert run.main(command) == 0
    assert "nothing to compare with: there is no" in capsys.readouterr().out
    machine.ours = 4.0
    assert run.main([*command, "--workload", "A2"]) == 0
    out = capsys.readouterr().out
    assert out.count("  slower  mixture A2 B=4096") == 4
    assert "4 rows compared with" in out  # of 32, as the others were not measured


def test_rows_that_are_not_asked_for_stay(tmp_path: Path, machine: Machine) -> None:
    """With the day and the versions of their own; tables and plots say both days."""
    assert run.main(["mixture", "--json", str(tmp_path)]) == 0
    path, found = stored(tmp_path)
    every = [row.key for row in found.rows["mixture"]]
    found.versions["torch"], found.date = "2.99.0", "2000-01-01"
    for row in found.rows["mixture"]:
        row.date = ""  # as in files of before rows had dates
    reports.save(found, path)
    machine.ours = 1.0
    assert run.main(["mixture", "--workload", "A2", "--json", str(tmp_path)]) == 0
    _, found = stored(tmp_path)
    assert [row.key for row in found.rows["mixture"]] == every
    for row in found.rows["mixture"]:
        fresh = row.workload == "A2"
        assert row.speedup("eager") == (4.0 if fresh else 2.0)
        assert row.date == (dates.today() if fresh else "2000-01-01")
        assert row.versions.get("torch") == (None if fresh else "2.99.0")
    here = torch.__version__
    for place in (plots.where(found), table.machine(found)):
        assert f"2000-01-01 to {dates.today()}" in place and f"torch {here} and 2.99.0" in place
    assert run.main(["mixture", "--json", str(tmp_path)]) == 0
    assert "2000-01-01" not in path.read_text() and "2.99.0" not in path.read_text()


def test_resumed_rows_keep_their_day(tmp_path: Path, machine: Machine) -> None:
    command = ["mixture", "--workload", "A", "--json", str(tmp_path), "--resume"]
    assert run.main(command) == 0
    path, found = stored(tmp_path)
    for row in found.rows["mixture"]:
        row.date = "2000-01-01"
    reports.save(found, path)
    assert run.main(command) == 0
    _, found = stored(tmp_path)
    assert found.dates == "2000-01-01" and len(machine.asked) == 4


def test_rows_of_another_kind_of_run_cannot_stay(tmp_path: Path, machine: Machine) -> None:
    assert run.main(["mixture", "--json", str(tmp_path)]) == 0
    path, found = stored(tmp_path)
    found.threads += 1
    reports.save(found, path)
    asked = len(machine.asked)
    with pytest.raises(SystemExit, match="is of a run with another threads"):
        run.main(["mixture", "--workload", "A", "--json", str(tmp_path)])
    assert len(machine.asked) == asked
    assert run.main(["mixture", "--json", str(tmp_path)]) == 0  # which asks for all of them


def test_a_busy_machine_replaces_nothing(tmp_path: Path, machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["mixture", "--workload", "A", "--json", str(tmp_path)]
    assert run.main(command) == 0
    before = stored(tmp_path)[1].rows
    machine.busy = True
    assert run.main(command) == 1
    assert stored(tmp_path)[1].rows == before
    assert f"the machine was busy: the times of {dates.today()} stay" in capsys.readouterr().err


def test_a_smoke_test_has_a_file_of_its_own(tmp_path: Path, machine: Machine) -> None:
    command = ["mixture", "--workload", "A", "--json", str(tmp_path)]
    assert run.main(command) == 0
    path, found = stored(tmp_path)
    assert run.main([*command, "--quick"]) == 0
    assert sorted(tmp_path.iterdir()) == [path.with_name(f"{path.stem}-quick.json"), path]
    assert reports.load(path) == found
    asked = len(machine.asked)
    with pytest.raises(SystemExit):
        run.main(["mixture", "--quick", "--json", str(path)])
    assert len(machine.asked) == asked


def test_a_file_is_whole_whenever_a_run_ends(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the middle of writing it."""
    command = ["mixture", "--workload", "A", "--json", str(tmp_path)]
    assert run.main(command) == 0
    path, found = stored(tmp_path)

    def half(self: Path, text: str, **_: object) -> int:
        with self.open("w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", half)
        run.main(command)
    assert list(tmp_path.iterdir()) == [path] and reports.load(path) == found
    path.write_text(path.read_text()[:500])
    with pytest.raises(SystemExit, match="is no file of results"):
        run.main([*command, "--resume"])


def test_results_are_there_before_plots(tmp_path: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fonts")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(plots, "draw", broken)
    file = tmp_path / "one.json"
    with pytest.raises(RuntimeError, match="no fonts"):
        run.main(["mixture", "--workload", "A", "--json", str(file), "--plot", str(tmp_path)])
    assert len(reports.load(file).rows["mixture"]) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["mixture", "--plot", "plots"], "--plot: matplotlib is not installed"),
        (["mixture", "--json", "taken/results.json"], "--json: cannot write to taken: File exists"),
        (["mixture", "--json", "taken"], "--json: cannot write to taken: File exists"),
        (["mixture", "--threads", "0"], "--threads: must be 1 or more, got 0"),
        (["serving", "--workload", "nosuch", "--dtype", "int8"], "--workload, --dtype: a study has no rows"),
        (["gpu-host", "--json", ".", "--resume"], "--resume: a study has no rows"),
        (["mixture", "snr-study", "--compare", "."], "--compare: a study has no rows"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_measured(
    options: list[str],
    message: str,
    tmp_path: Path,
    machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").touch()
    with pytest.raises(SystemExit):
        run.main(options)
    assert message in capsys.readouterr().err and not machine.asked


def _known(limits: Limits, dtypes: Sequence[torch.dtype]) -> None:
    limits.gemm |= {str(dtype).removeprefix("torch."): 1e11 for dtype in dtypes}
    limits.gemm_shape |= {str(dtype).removeprefix("torch."): (1, 1, 1) for dtype in dtypes}
    limits.read = limits.resident_read = limits.copy = 1e10


def test_suites_want_no_more_than_they_use() -> None:
    """On a machine with a GPU there may be no pandas, which studies want."""
    program = "import sys; sys.modules['pandas'] = None; from benchmarks import run; run.SUITES['mixture']"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_every_row_of_a_suite_has_a_key_of_its_own() -> None:
    for suite in run.SUITES.values():
        for device in ("cpu", "cuda"):
            keys = [case.key for case in suite.cases(device)]
            assert len(set(keys)) == len(keys)
