"""Comparing two runs: by ratios to the baseline, beyond the spread of both."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import run
from benchmarks.harness import compare
from benchmarks.harness import report as reports
from benchmarks.harness.report import OK, Outcome, Report, Row
from benchmarks.harness.timing import Budget, Timing


def timing(median: float, spread: float = 0.0) -> Timing:
    half = spread * median
    return Timing(median, median - half, median + half, median - half, samples=9, calls=1)


def made(times: dict[int, tuple[float, float]], spread: float = 0.0) -> Report:
    """A report with a row for each B: the baseline's time and ours."""
    found = reports.new_report(["mixture"], torch.device("cpu"), Budget())
    found.rows["mixture"] = [
        Row(
            "A1",
            "forward",
            "float32",
            {"B": rows},
            flop=1.0,
            traffic=1.0,
            resident=True,
            outcomes={
                "eager": Outcome("modules", OK, timing=timing(baseline, spread)),
                "ours": Outcome("mtlkernels", OK, timing=timing(ours, spread)),
            },
        )
        for rows, (baseline, ours) in times.items()
    ]
    return found


def test_slower_and_faster_rows_are_told() -> None:
    old = made({1: (4.0, 2.0), 16: (4.0, 2.0), 64: (4.0, 2.0)})
    new = made({1: (4.0, 2.5), 16: (4.0, 2.05), 64: (4.0, 1.6)})
    verdicts = {change.title: change.verdict for change in compare.changes(old, new)}
    assert [verdicts[f"mixture A1 B={rows} forward float32"] for rows in (1, 16, 64)] == [
        "slower",
        "the same",
        "faster",
    ]
    lines = compare.text(old, new).splitlines()
    assert lines[0].startswith("  slower  mixture A1 B=1 forward float32: 2.00x -> 1.60x over eager (noise 5%)")
    assert lines[-1].endswith("1 slower, 1 faster beyond noise") and len(lines) == 3


def test_a_slower_machine_is_not_a_slower_library() -> None:
    (change,) = compare.changes(made({1: (4.0, 2.0)}), made({1: (8.0, 4.0)}))
    assert change.verdict == "the same"


def test_a_wide_spread_explains_more() -> None:
    old, new = made({1: (4.0, 2.0)}, spread=0.1), made({1: (4.0, 2.5)}, spread=0.1)
    (change,) = compare.changes(old, new)
    assert change.noise == pytest.approx(0.4) and change.verdict == "the same"


def test_rows_that_one_run_lacks_are_left_out() -> None:
    assert not list(compare.changes(made({1: (4.0, 2.0)}), made({2: (4.0, 2.0)})))


def test_what_else_differs_is_told() -> None:
    old, new = made({1: (4.0, 2.0)}), made({1: (4.0, 2.0)})
    new.versions = {**old.versions, "torch": "9.9", "compiler": "another"}
    new.machine = {**old.machine, "cpu": "Some Processor"}
    new.threads = old.threads + 1
    *notes, summary = compare.text(old, new).splitlines()
    assert [note.split(": ")[0] for note in notes] == [
        f"    note  {x}" for x in ("machine", "threads", "torch", "compiler")
    ]
    assert notes[2].endswith("-> 9.9") and summary.startswith("1 rows compared")
    assert len(compare.text(old, old).splitlines()) == 1


def test_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = reports.save(made({1: (4.0, 2.0)}), tmp_path / "old.json")
    new = reports.save(made({1: (4.0, 4.0)}), tmp_path / "new.json")
    assert run.main(["--from-json", str(new), "--compare", str(old)]) == 0
    assert "slower  mixture A1 B=1 forward float32: 2.00x -> 1.00x over eager" in capsys.readouterr().out
