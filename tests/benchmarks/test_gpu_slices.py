"""The first day on a card: how slices run, and that what they name is there. No GPU is needed."""

from __future__ import annotations

import json
import signal
import subprocess
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


def test_a_pass_is_of_the_files_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Slice("good", (saying("one"),))
    assert day.run_all([part], day.Diary(tmp_path), 5.0, again=False) == 0
    assert day.Diary(tmp_path).has_passed("good")
    monkeypatch.setattr(day.machine, "sources", lambda: "others")
    assert not day.Diary(tmp_path).has_passed("good")


@pytest.mark.parametrize("name, passed", [("good", False), ("build", True)])
def test_files_that_change_while_a_slice_runs(
    name: str, passed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has not passed with these; but what builds has made them."""
    versions = iter(["before", *["after"] * 5])
    monkeypatch.setattr(day.machine, "sources", lambda: next(versions))
    diary = day.Diary(tmp_path)
    assert day.run(Slice(name, (saying("one"),)), diary, 5.0) == "passed"
    assert diary.has_passed(name) == passed


def test_sources_are_the_files_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    (tmp_path / "mtlkernels" / "ops").mkdir(parents=True)
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(day.machine, "ROOT", tmp_path)
    seen = [day.machine.sources()]
    for change in ("mtlkernels/ops/a.py", "tests/b.py", "mtlkernels/_build.json"):
        (tmp_path / change).write_text("{}")
        seen.append(day.machine.sources())
    assert len(set(seen)) == 4
    (tmp_path / "tests" / "results.json").write_text("{}")
    assert day.machine.sources() == seen[-1]


def test_nothing_runs_after_a_failed_build(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests would skip what was not built, and pass."""
    parts = [Slice("build", (saying("no", 1),)), Slice("tests", (saying("skipped"),))]
    assert day.run_all(parts, day.Diary(tmp_path), 5.0, again=False) == 2
    assert outcomes(tmp_path) == {"build": "failed"} and "nothing else is run" in capsys.readouterr().out


def test_an_interrupted_slice_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not begun:
            begun.append(process)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        day.run(Slice("slow", ((sys.executable, "-c", "import time; time.sleep(60)"),)), day.Diary(tmp_path), 30.0)
    assert begun[0].returncode == -signal.SIGKILL


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
    whole = [command for part in parts for command in part.commands if "mixture" in command and "--json" in command]
    named = [command[command.index("--workload") + 1] for command in whole]
    assert sorted(named) == sorted({case.workload for case in SUITES["mixture"].cases("cuda")})
    assert all("--resume" in command for command in whole)


def test_command_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert day.main(["--list", "--slice", "build", "racecheck"]) == 0
    listed = capsys.readouterr().out
    assert "pip install" in listed and "suite-" not in listed
    assert "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool racecheck" in listed
    with pytest.raises(SystemExit):
        day.main(["--list", "--slice", "nothing"])
    assert "no slice nothing" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit):
        day.main([])
    assert "no GPU" in capsys.readouterr().err
