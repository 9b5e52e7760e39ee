"""What ``make matrix`` makes of interpreters, reports and results; the runs themselves take an hour."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from release import interpreters, matrix
from release.matrix import Result

REPORT = '<testsuites><testsuite tests="9" failures="1" errors="2" skipped="3"/></testsuites>'


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def pyenv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty root of pyenv, and nothing on the PATH but what a shell needs."""
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "pyenv" / "versions"


def test_pairs() -> None:
    assert matrix.pair("3.10:2.13.0") == ("3.10", "2.13.0")
    with pytest.raises(argparse.ArgumentTypeError, match=r"not like '3\.10'"):
        matrix.pair("3.10")


def test_an_interpreter_that_is_missing_is_not_run(pyenv: Path, tmp_path: Path) -> None:
    result = matrix.one("3.99", "2.15", tmp_path / "pair", [])
    assert result.not_run and not result.good and "there is no python3.99" in matrix.table([result])
    assert not (tmp_path / "pair").exists()


def test_the_newest_interpreter_that_can_build(pyenv: Path, tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python3.99", "echo 'there is no Python.h' >&2; exit 1")
    assert interpreters.interpreter("3.99") == "python3.99 cannot build: there is no Python.h"
    executable(pyenv / "3.99.9" / "bin" / "python3.99", "exit 0")
    newest = executable(pyenv / "3.99.10" / "bin" / "python3.99", "exit 0")
    assert interpreters.interpreter("3.99") == newest


def test_nothing_of_this_checkout_reaches_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{matrix.ROOT}/.venv/bin:/usr/bin")
    monkeypatch.setenv("PYTHONPATH", str(matrix.ROOT))
    monkeypatch.setenv("MAKEFLAGS", "ARGS=--pairs")
    found = interpreters.environment(MORE="1")
    assert found["PATH"] == "/usr/bin" and found["MORE"] == "1"
    assert "PYTHONPATH" not in found and "MAKEFLAGS" not in found


def test_counts(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text(REPORT)
    assert matrix.counts(tmp_path / "tests.xml") == {"passed": 3, "failed": 3, "skipped": 3}


def test_a_folder_with_a_space_in_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name passes pip, which splits lists of files, and make and the shell, which read $ and quotes."""
    folder = tmp_path / "it's a $new folder"
    folder.mkdir()
    asked: list[list[str]] = []

    def run(log: Path, *command: str | Path, cwd: Path, **variables: str) -> int:
        assert variables["PIP_CONSTRAINT"].split() == [(folder / "constraints.txt").as_uri()]
        if command[0] == "make":
            (arguments,) = [str(part) for part in command if str(part).startswith("ARGS=")]
            asked.append(shlex.split(arguments.removeprefix("ARGS=").replace("$$", "$")))
            (folder / "tests.xml").write_text(REPORT)
            executable(cwd / ".venv" / "bin" / "python", "exit 1")
        return 0

    monkeypatch.setattr(matrix, "run", run)
    result = Result({})
    matrix.build_and_test(Path("python3.10"), "2.10", folder, ["tests/nn", "tests/a b"], result)
    assert asked == [["-q", f"--junitxml={folder / 'tests.xml'}", "tests/nn", "tests/a b"]]
    assert result.counts == {"passed": 3, "failed": 3, "skipped": 3}


def test_what_is_good() -> None:
    assert Result({}, counts={"passed": 9, "failed": 0, "skipped": 2}).good
    assert not Result({}, counts={"passed": 9, "failed": 1, "skipped": 0}).good
    assert not Result({}, counts={"passed": 0, "failed": 0, "skipped": 9}).good
    assert not Result({}, counts={"passed": 9, "failed": 0}, reason="failed: make test").good
    assert not Result({}).good


@pytest.mark.parametrize(
    "outcomes, status",
    [(("good", "not run"), 0), (("good", "failed"), 1), (("not run",), 1)],
)
def test_exit_status(outcomes: tuple[str, ...], status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is green of which nothing was run."""
    rows = {
        "good": Result({}, counts={"passed": 9, "failed": 0}),
        "failed": Result({}, counts={"passed": 9, "failed": 1}),
        "not run": Result({}, reason="not run", not_run=True),
    }
    left = [rows[name] for name in outcomes]
    monkeypatch.setattr(matrix, "one", lambda *args: left.pop(0))
    monkeypatch.setattr(matrix, "head", lambda: "commit")
    assert matrix.main(["--pairs", *["3.10:2.10"] * len(outcomes)]) == status
