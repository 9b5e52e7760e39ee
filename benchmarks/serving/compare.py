"""Contenders side by side: their processes are asked for times in turns, so that whatever the machine does hits all."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.serving.contenders import BASELINE, CONTENDERS, Load
from benchmarks.serving.models import MODELS
from benchmarks.serving.worker import rows_of

ROOT = Path(__file__).resolve().parents[2]
# How much further than eager modules from float64 a contender may be, by the root mean square of the error, and what a
# rounding of the outputs may add, in units of the dtype's epsilon.
FACTOR, ROUNDINGS = 3.0, 2.0


class Failed(Exception):
    """What a process could not do."""


class Process:
    """A contender's process."""

    def __init__(self, model: str, contender: str, dtype: str, load: Load) -> None:
        words = [model, contender, dtype, str(load.threads), str(load.clients)]
        environment = os.environ | {"OMP_NUM_THREADS": str(load.threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.serving.worker", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failed("the process ended")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


@contextmanager
def processes(model: str, dtype: str, load: Load, names: Sequence[str]) -> Iterator[dict[str, Process]]:
    with ExitStack() as stack:
        found = {name: Process(model, name, dtype, load) for name in names}
        for process in found.values():
            stack.callback(process.close)
        yield found


def exact(model: str, rows: int) -> list[Tensor]:
    """The outputs of the modules in float64, for the first of a worker's inputs."""
    source = MODELS[model].modules().double()
    x = rows_of(MODELS[model], rows)[0]
    with torch.no_grad():
        found = source(x.double() if MODELS[model].casts else x)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def error_of(file: str, expected: Sequence[Tensor]) -> float:
    """The root mean square of the outputs' errors, relative to that of the outputs."""
    found = torch.load(file)
    if [y.shape for y in found] != [y.shape for y in expected]:
        return float("inf")
    pairs = list(zip(found, expected, strict=True))
    wrong = sum(float((y.double() - z).square().sum()) for y, z in pairs)
    return (wrong / sum(float(z.square().sum()) for z in expected)) ** 0.5


def ready(workers: Mapping[str, Process], model: str, dtype: str, rows: int) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of those that serve so many rows rightly, and why others do not."""
    expected = exact(model, rows)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, process in workers.items():
        try:
            errors[name] = error_of(process.ask(rows=rows)["outputs"], expected)
        except Failed as reason:
            reasons[name] = str(reason)
    allowed = FACTOR * errors.get(BASELINE, 0.0) + ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps
    for name in [name for name, error in errors.items() if not error <= allowed]:
        reasons[name] = f"wrong: off by {errors.pop(name):.1e}, allowed are {allowed:.1e}"
    return errors, reasons


def row(
    workers: Mapping[str, Process], key: Mapping[str, Any], load: Load, rounds: int, seconds: float
) -> dict[str, Any]:
    """The latencies of all in turns, as their median and 99th percentile; with several clients calls a second."""
    errors, reasons = ready(workers, key["model"], key["dtype"], key["rows"])
    found: dict[str, list[float]] = {name: [] for name in errors}
    for turn in range(rounds):
        order = list(found) if turn % 2 else list(reversed(found))
        for name in order:
            answer = workers[name].ask(seconds=seconds)
            found[name] += answer["microseconds"] if load.clients == 1 else [answer["calls_a_second"]]
    result: dict[str, Any] = {"threads": load.threads, "clients": load.clients, "unavailable": reasons, **key}
    if load.clients == 1:
        result["p50"] = {name: statistics.median(times) for name, times in found.items()}
        result["p99"] = {name: statistics.quantiles(times, n=100)[98] for name, times in found.items()}
    else:
        result["calls_a_second"] = {name: statistics.median(rates) for name, rates in found.items()}
    return result


def names_for(model: str, dtype: str, compiled: bool) -> list[str]:
    """Who serves a model in a dtype; without those that compile for each number of rows unless ``compiled``."""
    fit = {name: own for name, own in CONTENDERS.items() if dtype in own.dtypes and model in own.models}
    return [name for name, own in fit.items() if compiled or not own.compiles]
