"""A process of the suite serving: its clients' threads, and when it makes a contender anew."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.serving import worker
from benchmarks.serving.contenders import CONTENDERS, Contender, Load, Serve
from benchmarks.serving.models import Model

Start = Callable[[Contender, Load], worker.Worker]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Makes a worker of a contender, on the threads that PyTorch has."""
    started: list[worker.Worker] = []

    def start(contender: Contender, load: Load) -> worker.Worker:
        monkeypatch.setitem(CONTENDERS, "made-up", contender)
        started.append(worker.Worker("level", "made-up", "float32", load, tmp_path))
        return started[-1]

    yield start
    for found in started:
        found.pool.shutdown()


def test_clients_stay_and_have_called_before_they_are_timed(start: Start) -> None:
    """What a thread keeps, OpenVINO's request say, it has before the first round; in each it calls several times."""
    local, lock = threading.local(), threading.Lock()
    first: list[int] = []
    calls: dict[int, int] = {}

    def serve(x: Tensor) -> Tensor:
        with lock:
            if not hasattr(local, "number"):
                local.number = len(first)
                first.append(local.number)
            calls[local.number] = calls.get(local.number, 0) + 1
        return x

    worked = start(Contender("made up", lambda *_: serve), Load(torch.get_num_threads(), 2))
    worked.ready(5)
    clients = set(first)
    assert len(clients) == 3  # and the thread that gave the outputs
    for _ in range(3):
        calls.clear()
        assert worked.calls_a_second(0.0)["calls_a_second"] > 0
        assert set(first) == clients
        assert len(calls) == 2 and all(count == worker.CALLS for count in calls.values())


def test_each_clients_rate_is_by_its_own_clock(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes longer is not held against the other."""
    local, lock = threading.local(), threading.Lock()
    names: list[int] = []

    def clock() -> float:
        return float(getattr(local, "now", 0.0))

    def serve(x: Tensor) -> Tensor:
        if not hasattr(local, "seconds"):
            with lock:
                names.append(0)
                local.seconds = float(len(names))
        local.now = clock() + local.seconds
        return x

    monkeypatch.setattr(time, "perf_counter", clock)
    worked = start(Contender("made up", lambda *_: serve), Load(torch.get_num_threads(), 2))
    worked.ready(5)
    # The thread that gives the outputs takes a second, the clients two and three.
    assert worked.calls_a_second(60.0) == {"calls_a_second": pytest.approx(1 / 2 + 1 / 3)}


@pytest.mark.parametrize(("kind", "made"), [("static", [1, 16]), ("compiles", [1, 16]), ("neither", [1])])
def test_static_shapes_are_made_for_each_number_of_rows(kind: str, made: list[int], start: Start) -> None:
    """For just so many, one row among them."""
    found: list[int] = []

    def make(model: Model, source: nn.Module, x: Tensor, load: Load) -> Serve:
        found.append(len(x))
        return lambda x: x

    contender = Contender("made up", make, static=kind == "static", compiles=kind == "compiles")
    worked = start(contender, Load(torch.get_num_threads()))
    for rows in (1, 16):
        worked.ready(rows)
    assert found == made
