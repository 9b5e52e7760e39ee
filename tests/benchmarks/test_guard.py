"""Instruction counts: what callgrind writes is read right, and a regression is told from noise."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from benchmarks.guard import __main__ as command
from benchmarks.guard import baseline, callgrind, calls
from benchmarks.guard.baseline import Counts
from benchmarks.guard.callgrind import Unavailable
from mtlkernels import _extension

SETTINGS = {"torch": "2.13.0", "compiler": "GNU 12"}
DUMP = """# callgrind format
version: 1
creator: callgrind-3.24.0
pid: 7
cmd: python -m benchmarks.guard.calls
part: {part}

desc: Trigger: Client Request
positions: line
events: Ir
summary: {total}

fn=(1)
0 {total}

totals: {total}
"""


def counts(**calls: float) -> Counts:
    return Counts(calls, SETTINGS)


def test_files_are_read_in_the_order_of_the_calls(tmp_path: Path) -> None:
    out = tmp_path / "callgrind.out"
    out.write_text(DUMP.format(part=12, total=0))  # the rest of the process
    for part in range(1, 12):
        out.with_name(f"{out.name}.{part}").write_text(DUMP.format(part=part, total=1000 * part))
    assert callgrind.totals(out) == [1000 * part for part in range(1, 12)]
    assert callgrind.by_call(["a", "b"], 4, [8, 10]) == {"a": 2, "b": 2.5}
    with pytest.raises(Unavailable, match="1 files for 2 calls"):
        callgrind.by_call(["a", "b"], 4, [8])
    out.with_name(f"{out.name}.13").write_text("version: 1\npart: 13\n")
    with pytest.raises(Unavailable, match=r"callgrind.out.13 is not what callgrind writes"):
        callgrind.totals(out)


def test_changes_beyond_the_tolerance() -> None:
    old = counts(same=1000, grown=1000, shrunk=1000, gone=1)
    new = counts(same=1005, grown=1006, shrunk=994, fresh=5)
    found = {change.name: change.verdict for change in baseline.changes(old, new)}
    assert found == {"same": "the same", "grown": "more", "shrunk": "fewer", "gone": "gone", "fresh": "new"}
    assert {str(change) for change in baseline.changes(old, new)} >= {
        "    more  grown: 1,000 -> 1,006 (+0.60%)",
        "     new  fresh: none -> 5",
    }


@pytest.mark.parametrize(
    ("new", "status"),
    [
        (counts(a=100, b=100), 0),
        (counts(a=100.4, b=99.6), 0),
        (counts(a=90, b=100), 0),
        (counts(a=100, b=101), 1),
        (counts(a=50, b=101), 1),
        (counts(a=100, b=100, c=1), 1),
    ],
)
def test_exit_status(new: Counts, status: int) -> None:
    found, text = command.verdict(counts(a=100, b=100), new)
    assert found == status and f"{len(new.calls)} calls" in text
    assert ("--update" in text) == (new.calls != {"a": 100.4, "b": 99.6} and new.calls != {"a": 100, "b": 100})


def test_counts_of_something_else_are_not_compared() -> None:
    other = Counts({"a": 900}, {**SETTINGS, "torch": "2.14.0", "valgrind": "3.25"})
    status, text = command.verdict(counts(a=100), other)
    assert status == 2 and "torch: 2.13.0 there, 2.14.0 here" in text and "valgrind: unknown there, 3.25 here" in text
    assert "compiler" not in text


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "baseline.json"
    options = ["--baseline", str(path)]
    found = {"a": 100.0}
    monkeypatch.setattr(callgrind, "count", lambda folder: (dict(found), SETTINGS))
    assert command.main(options) == 2 and "make it with --update" in capsys.readouterr().out
    assert command.main([*options, "--update"]) == 0 and command.main(options) == 0
    assert baseline.load(path) == counts(a=100)
    found["a"] = 120.0
    assert command.main(options) == 1 and "a: 100 -> 120 (+20.00%)" in capsys.readouterr().out
    assert command.main([*options, "--update"]) == 0 and command.main(options) == 0


def test_what_is_missing_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: "valgrind")
    monkeypatch.setattr(_extension, "loaded", lambda: False)
    assert command.main([]) == 2 and "C++ kernels' instructions" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert command.main([]) == 2 and "apt-get install valgrind" in capsys.readouterr().err


def test_the_baseline_knows_every_call() -> None:
    kept = baseline.load()
    assert list(kept.calls) == list(calls.calls()) and all(count > 10_000 for count in kept.calls.values())
    assert kept.settings.keys() == {"system", "python", "torch", "compiler", "instruction set", "valgrind"}


@pytest.mark.parametrize("name", list(calls.calls()))
def test_calls_can_be_made(name: str) -> None:
    step = calls.calls()[name]()
    step()
    step()
    assert re.search(r" (forward|forward\+backward|update) (float32|bfloat16)$", name)
