"""The suite ``serving``: its processes, its check and its table."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import compare
from benchmarks.serving.contenders import BASELINE, OURS, PREPARED, Load
from benchmarks.serving.gains import over_runtimes
from benchmarks.serving.models import MODELS
from benchmarks.suites import serving

KEY = {"model": "level", "dtype": "float32", "rows": 5}


def test_processes_are_checked_and_timed_in_turns() -> None:
    with compare.processes("level", "float32", Load(1), [BASELINE, OURS]) as workers:
        row = compare.row(workers, KEY, Load(1), 2, 0.01)
    assert not row["unavailable"] and set(row["p50"]) == {BASELINE, OURS}
    assert all(value > 0 for value in row["p50"].values()) and set(row["calls"]) == {BASELINE, OURS}
    assert row["runtimes"] == "static shapes"


def test_several_clients() -> None:
    with compare.processes("level", "bfloat16", Load(1, 2), [BASELINE, PREPARED]) as workers:
        row = compare.row(workers, KEY | {"dtype": "bfloat16"}, Load(1, 2), 1, 0.05)
    assert set(row["calls_a_second"]) == {BASELINE, PREPARED} and "p50" not in row


class Told:
    """A process that serves what it is told to, in one with the test."""

    pid = os.getpid()

    def __init__(self, folder: Path, name: str, add: float, times: tuple[float, ...] = (1.0, 2.0)) -> None:
        self.times = times
        self.file = folder / f"{name}.pt"
        torch.save([y.float() + add for y in compare.exact("level", KEY["rows"])], self.file)  # type: ignore[arg-type]

    def ask(self, **command: Any) -> dict[str, Any]:
        return {"outputs": str(self.file)} if "rows" in command else {"microseconds": list(self.times)}


def test_whoever_is_wrong_gets_no_time(tmp_path: Path) -> None:
    workers: Any = {name: Told(tmp_path, name, add) for name, add in ((BASELINE, 0.0), (OURS, 0.0), ("openvino", 0.01))}
    row = compare.row(workers, KEY, Load(1), 1, 0.01)
    assert set(row["p50"]) == {BASELINE, OURS}
    assert row["unavailable"]["openvino"].startswith("FAILED: wrong, off by")
    assert serving._cell(row, "openvino") == "FAILED" and serving._cell(row, "onnxruntime") == "–"


def test_a_99th_percentile_wants_calls_enough(tmp_path: Path) -> None:
    """Of 199 calls there is none, of 200 one that is not beyond the slowest."""
    slow = (1.0,) * 97 + (2.0, 3.0, 100.0)
    workers: Any = {BASELINE: Told(tmp_path, BASELINE, 0.0, slow[1:]), OURS: Told(tmp_path, OURS, 0.0, slow)}
    row = compare.row(workers, KEY, Load(1), 1, 0.01)
    assert row["calls"] == {BASELINE: 99, OURS: 100} and row["p99"] == {} and set(row["p50"]) == {BASELINE, OURS}
    row = compare.row(workers, KEY, Load(1), 2, 0.01)
    assert row["calls"] == {BASELINE: 198, OURS: 200} and set(row["p99"]) == {OURS}
    assert 3.0 <= row["p99"][OURS] <= 100.0
    assert row["p99"][OURS] == pytest.approx(3.0 + 0.01 * 97.0)


@pytest.mark.parametrize(("taken", "attempts"), [([9.0, 0.1], 2), ([9.0, 9.0], 2), ([0.1], 1)])
def test_a_busy_machine_gives_no_times(
    taken: list[float], attempts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row is timed once more, and then marked; what contenders take themselves is not held against them."""
    own: list[list[int]] = []

    class Others:
        def __init__(self, pids: list[int]) -> None:
            own.append(pids)

        def cores(self) -> float:
            return taken[len(own) - 1]

    monkeypatch.setattr(compare, "Others", Others)
    workers: Any = {name: Told(tmp_path, name, 0.0) for name in (BASELINE, OURS)}
    row = compare.row(workers, KEY, Load(1), 2, 1.0)
    assert own == [[Told.pid] * 2] * attempts
    if taken[-1] < 1:
        assert set(row["p50"]) == {BASELINE, OURS} and not row["unavailable"]
    else:
        assert not row["p50"] and not row["p99"]
        assert row["unavailable"] == dict.fromkeys(
            (BASELINE, OURS), "busy: other processes took 9.0 cores while this was timed, 2 times"
        )
        assert serving._cell(row, OURS) == "busy" and over_runtimes(row, [row]) is None


# A worker's part: it answers with the file of outputs that it was given, and the first of ours runs out of memory when
# it is to be timed.
WORKER = """
import json, os, signal, sys
from pathlib import Path
outputs, contender, folder = Path(sys.argv[1]), sys.argv[3], Path(sys.argv[-1])
assert folder.is_dir()
for line in sys.stdin:
    if "rows" not in json.loads(line) and contender == "ours" and not (outputs.parent / "died").exists():
        (outputs.parent / "died").touch()
        print("much\\nout of memory", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"outputs": str(outputs), "microseconds": [1.0, 2.0]}), flush=True)
"""


def test_a_process_that_dies_while_it_is_timed_fails_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it printed last says why; for the next row there is a new one; nothing stays in the temporary folder."""
    outputs = tmp_path / "outputs.pt"
    torch.save([y.float() for y in compare.exact("level", KEY["rows"])], outputs)  # type: ignore[arg-type]
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(compare, "WORKER", ("-c", WORKER, str(outputs)))
    with compare.processes("level", "float32", Load(1), [BASELINE, OURS]) as workers:
        row = compare.row(workers, KEY, Load(1), 2, 0.01)
        assert set(row["p50"]) == {BASELINE}
        assert row["unavailable"] == {OURS: "FAILED: the process ended by signal 9: out of memory"}
        row = compare.row(workers, KEY, Load(1), 2, 0.01)
        assert set(row["p50"]) == {BASELINE, OURS} and not row["unavailable"]
    assert not list((tmp_path / "temporary").iterdir())


def test_a_process_that_ends_is_no_contender() -> None:
    nobody = compare.processes("level", "float32", Load(1), ["nobody"])
    with nobody as workers, pytest.raises(compare.Failed, match="ended with status 1: KeyError: 'nobody'"):
        workers["nobody"].ask(rows=1)


def test_every_model_is_served_frozen() -> None:
    assert all("frozen" in compare.names_for(model, "float32", True) for model in MODELS)


def test_table() -> None:
    row: dict[str, Any] = {"model": "level", "dtype": "float32", "rows": 4, "threads": 1, "clients": 1}
    row["unavailable"] = {}
    times = {BASELINE: 9.0, "onnxruntime": 4.0, "openvino": 3.0, OURS: 1.5, PREPARED: 1.0}
    latency = row | {"p50": times, "p99": {name: 2 * value for name, value in times.items()}}
    rates = row | {"clients": 2, "calls_a_second": {"onnxruntime": 10.0, OURS: 25.0}}
    two = latency | {"threads": 2, "p50": {"openvino": 6.0, OURS: 1.0}, "p99": {}}
    found = {"rows": [latency, two, rates], "versions": {"openvino": "1"}}
    text = serving.show(found, False)
    assert "2.00×" in text and "2.50×" in text and "| 25 |" in text and "static shapes" not in text
    assert "3.00×" in text  # over 3.0 on one thread
    assert "| 2 / – |" in text and "2 / 3" not in text  # nobody knows of how many calls
    found["rows"] = [row | {"calls": dict.fromkeys(times, 200), "runtimes": "static shapes"} for row in found["rows"]]
    text = serving.show(found, False)
    assert "| 2 / 3 |" in text and "| 1 / – |" in text and "openvino 1, with static shapes." in text


def test_plot(tmp_path: Path) -> None:
    row = {"model": "level", "dtype": "float32", "threads": 1, "clients": 1, "unavailable": {}, "p99": {}}
    rows = [row | {"rows": rows, "p50": {"openvino": 3.0, OURS: 2.0}} for rows in (1, 16)]
    serving.draw({"rows": rows, "versions": {}}, "here", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
