"""The suite ``serving``: its processes, its check and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.serving import compare
from benchmarks.serving.contenders import BASELINE, CONTENDERS, OURS, PREPARED, Load
from benchmarks.suites import serving

KEY = {"model": "level", "dtype": "float32", "rows": 5}


def test_processes_are_checked_and_timed_in_turns() -> None:
    with compare.processes("level", "float32", Load(1), [BASELINE, OURS]) as workers:
        row = compare.row(workers, KEY, Load(1), 2, 0.01)
    assert not row["unavailable"] and set(row["p50"]) == {BASELINE, OURS}
    assert all(0 < row["p50"][name] <= row["p99"][name] for name in row["p50"])


def test_several_clients() -> None:
    with compare.processes("level", "bfloat16", Load(1, 2), [BASELINE, PREPARED]) as workers:
        row = compare.row(workers, KEY | {"dtype": "bfloat16"}, Load(1, 2), 1, 0.05)
    assert set(row["calls_a_second"]) == {BASELINE, PREPARED} and "p50" not in row


class Told:
    """A process that serves what it is told to."""

    def __init__(self, folder: Path, name: str, add: float) -> None:
        self.file = folder / f"{name}.pt"
        torch.save([y.float() + add for y in compare.exact("level", KEY["rows"])], self.file)  # type: ignore[arg-type]

    def ask(self, **command: Any) -> dict[str, Any]:
        return {"outputs": str(self.file)} if "rows" in command else {"microseconds": [1.0, 2.0]}


def test_whoever_is_wrong_gets_no_time(tmp_path: Path) -> None:
    workers: Any = {name: Told(tmp_path, name, add) for name, add in ((BASELINE, 0.0), (OURS, 0.0), ("openvino", 0.01))}
    row = compare.row(workers, KEY, Load(1), 1, 0.01)
    assert set(row["p50"]) == {BASELINE, OURS}
    assert "wrong" in row["unavailable"]["openvino"]


def test_a_process_that_ends_is_no_contender() -> None:
    nobody = compare.processes("level", "float32", Load(1), ["nobody"])
    with nobody as workers, pytest.raises(compare.Failed, match="ended"):
        workers["nobody"].ask(rows=1)


def test_gain_and_table() -> None:
    row: dict[str, Any] = {"model": "level", "dtype": "float32", "rows": 4, "threads": 1, "clients": 1}
    row["unavailable"] = {}
    times = {BASELINE: 9.0, "onnxruntime": 4.0, "openvino": 3.0, OURS: 1.5, PREPARED: 1.0}
    latency = row | {"p50": times, "p99": {name: 2 * value for name, value in times.items()}}
    rates = row | {"clients": 2, "calls_a_second": {"onnxruntime": 10.0, OURS: 25.0}}
    assert serving.gain(latency) == 2.0 and serving.gain(rates) == 2.5
    assert serving.gain(latency | {"p50": {OURS: 1.0}}) is None
    found = {"rows": [latency, rates], "versions": {"openvino": "1"}}
    text = serving.show(found, False)
    assert "2.00×" in text and "2.50×" in text and "2 / 3" in text and "| 25 |" in text
    assert set(CONTENDERS) >= set(serving.RUNTIMES)


def test_plot(tmp_path: Path) -> None:
    row = {"model": "level", "dtype": "float32", "threads": 1, "clients": 1, "unavailable": {}, "p99": {}}
    rows = [row | {"rows": rows, "p50": {"openvino": 3.0, OURS: 2.0}} for rows in (1, 16)]
    serving.draw({"rows": rows, "versions": {}}, "here", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
