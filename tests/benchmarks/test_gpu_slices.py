"""The first day on a card: how slices run, and that what they name is there. No GPU is needed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as day
from benchmarks.gpu.slices import ROOT, Slice, every_slice
from benchmarks.suites import STUDIES, SUITES


def saying(words: str, code: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", f"print({words!r}, flush=True); raise SystemExit({code})")


def outcomes(folder: Path) -> dict[str, str]:
    return {name: entry["outcome"] for name, entry in json.loads((folder / "slices.json").read_text()).items()}


def test_slices_pass_fail_and_are_not_run_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waits = (sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)")
    parts = [
        Slice("good", (saying("one"), saying("two"))),
        Slice("bad", (saying("three", 3), saying("never"))),
        Slice("slow", (waits,)),
        Slice("without", (saying("never"),), tool="no-such-program"),
    ]
    assert day.run_all(parts, day.Diary(tmp_path), 5.0, again=False) == 3
    assert outcomes(tmp_path) == {"good": "passed", "bad": "failed", "slow": "timed out", "without": "missing"}
    assert "one\n" in (tmp_path / "good.log").read_text() and "two\n" in (tmp_path / "good.log").read_text()
    assert "never" not in (tmp_path / "bad.log").read_text()
    assert "begun" in (tmp_path / "slow.log").read_text()
    capsys.readouterr()
    mended = [Slice("good", (saying("again", 1),)), Slice("bad", (saying("mended"),))]
    assert day.run_all(mended, day.Diary(tmp_path), 5.0, again=False) == 0
    assert "passed before" in capsys.readouterr().out
    assert day.run_all(mended[:1], day.Diary(tmp_path), 5.0, again=True) == 1


def test_what_slices_name_is_there(tmp_path: Path) -> None:
    parts = every_slice(tmp_path)
    assert len({part.name for part in parts}) == len(parts)
    words = [word for part in parts for command in part.commands for word in command]
    files = {word for word in words if word.startswith(("tests/", "benchmarks/"))}
    assert len(files) == 4 and all((ROOT / name).exists() for name in files)
    suites = {
        command[command.index("benchmarks/run.py") + 1] for p in parts for command in p.commands if "--json" in command
    }
    assert suites == {"mixture", "pcgrad", "pcgrad-step", "snr", "gpu-host"} <= {*SUITES, *STUDIES}


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert day.main(["--list", "--slice", "build", "racecheck"]) == 0
    listed = capsys.readouterr().out
    assert "pip install" in listed and "compute-sanitizer --tool racecheck" in listed and "suite-" not in listed
    with pytest.raises(SystemExit):
        day.main(["--list", "--slice", "nothing"])
    assert "no slice nothing" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        day.main([])
    assert "no GPU" in capsys.readouterr().err
