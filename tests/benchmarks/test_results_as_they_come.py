"""What a run leaves when it is cut off, and what the next one takes up; no benchmark is timed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness import report as reports
from benchmarks.harness import runner
from benchmarks.harness.case import Case
from benchmarks.harness.limits import Limits
from benchmarks.harness.machine import ROOT
from benchmarks.suites import mixture


def test_rows_are_kept_as_they_come_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is cut off leaves what it has measured; the next one measures the others, and what was disturbed."""

    def measured(case: Case, *_: object) -> reports.Row:
        if len(asked) == cut_off:
            raise KeyboardInterrupt
        asked.append(case.key)
        outcomes = {"ours": reports.Outcome("ours", reports.OK)}
        of_case = case.workload, case.work, case.dtype_name, dict(case.size), case.flop, case.traffic, case.resident
        return reports.Row(*of_case, outcomes)

    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(runner, "run_case", measured)
    monkeypatch.setattr(Limits, "measure", lambda self, dtypes, _: _known(self, dtypes))
    command = ["mixture", "--workload", "A", "A2", "--json", str(tmp_path), "--resume"]
    every = [case.key for case in mixture.cases("cpu") if case.workload in ("A", "A2")]
    cut_off = 3
    with pytest.raises(KeyboardInterrupt):
        run.main(command)
    (path,) = tmp_path.glob("mixture-*.json")
    assert [row.key for row in reports.load(path).rows["mixture"]] == every[:3]
    cut_off = -1
    found = reports.load(path)
    found.rows["mixture"][1].outcomes["ours"].status = reports.BUSY
    reports.save(found, path)
    assert run.main(command) == 0
    assert asked == [*every[:3], every[1], *every[3:]]
    assert [row.key for row in reports.load(path).rows["mixture"]] == every
    found = reports.load(path)
    found.versions["torch"] = "another"  # nothing of it is taken
    reports.save(found, path)
    assert run.main(command) == 0
    assert asked[len(every) + 1 :] == every
    with pytest.raises(SystemExit):
        run.main(["mixture", "--resume"])


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
