"""Contenders side by side: their processes are asked for times in turns, so that whatever the machine does hits all."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.contention import TOLERATED, Others
from benchmarks.harness.report import BUSY, FAILED
from benchmarks.harness.runner import ATTEMPTS, MEASURES
from benchmarks.serving.contenders import BASELINE, CONTENDERS, STATIC, Load
from benchmarks.serving.models import MODELS
from benchmarks.serving.worker import rows_of

ROOT = Path(__file__).resolve().parents[2]
WORKER = ("-m", "benchmarks.serving.worker")
# How much further than eager modules from float64 a contender may be, by the root mean square of the error, and what a
# rounding of the outputs may add, in units of the dtype's epsilon.
FACTOR, ROUNDINGS = 3.0, 2.0
# Calls without which there is no 99th percentile: of 200 two are beyond it.
CALLS_FOR_P99 = 200
# Characters of what a process printed before it ended.
LAST_WORDS = 300


class Failed(Exception):
    """What a process could not do."""


class Ended(Failed):
    """It is no more."""


class Process:
    """A contender's process. One that has ended is started anew for the next number of rows."""

    def __init__(self, model: str, contender: str, dtype: str, load: Load) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="serving-")
        self._printed = Path(self._folder.name) / "printed"
        words = [model, contender, dtype, str(load.threads), str(load.clients), self._folder.name]
        self._command = [sys.executable, *WORKER, *words]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(load.threads)}
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        with self._printed.open("w") as printed:
            return subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **command: Any) -> dict[str, Any]:
        if "rows" in command and self._process.poll() is not None:
            self._end()
            self._process = self._start()
        assert self._process.stdin and self._process.stdout
        try:
            print(json.dumps(command), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Ended(f"the process ended{self._last_words()}")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise Failed(found["error"])
        return found

    def _last_words(self) -> str:
        """How it ended and the last line that it printed, as far as there is one."""
        status = self._process.wait()
        how = f" by signal {-status}" if status < 0 else f" with status {status}"
        printed = self._printed.read_text(errors="replace").strip().splitlines()
        return f"{how}: {printed[-1][-LAST_WORDS:]}" if printed else how

    def _end(self) -> None:
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def close(self) -> None:
        self._end()
        self._folder.cleanup()


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
    """The errors of those that serve so many rows rightly, and why others do not: they cannot, or are ``FAILED``."""
    expected = exact(model, rows)
    errors: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for name, process in workers.items():
        try:
            errors[name] = error_of(process.ask(rows=rows)["outputs"], expected)
        except Ended as reason:
            reasons[name] = f"{FAILED}: {reason}"
        except Failed as reason:
            reasons[name] = str(reason)
    allowed = FACTOR * errors.get(BASELINE, 0.0) + ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps
    for name in [name for name, error in errors.items() if not error <= allowed]:
        reasons[name] = f"{FAILED}: wrong, off by {errors.pop(name):.1e}, allowed are {allowed:.1e}"
    return errors, reasons


def row(
    workers: Mapping[str, Process], key: Mapping[str, Any], load: Load, rounds: int, seconds: float
) -> dict[str, Any]:
    """The latencies of all in turns, as their median and 99th percentile; with several clients calls a second.

    Whoever made less than ``CALLS_FOR_P99`` calls has no 99th percentile; ``calls`` says how many they were.
    Who ends while it is timed has none, and nobody has where other processes kept the machine busy, twice.
    """
    errors, reasons = ready(workers, key["model"], key["dtype"], key["rows"])
    for _ in range(ATTEMPTS):
        there = [name for name in errors if name not in reasons]
        others = Others([workers[name].pid for name in there])
        found = in_turns({name: workers[name] for name in there}, load, rounds, seconds, reasons)
        taken = others.cores()
        # A smoke test is no measurement.
        quiet = taken <= TOLERATED or rounds * seconds * len(there) < MEASURES
        if quiet:
            break
    if not quiet:
        why = f"other processes took {taken:.1f} cores while this was timed, {ATTEMPTS} times"
        reasons |= dict.fromkeys(found, f"{BUSY}: {why}")
        found = {}
    result: dict[str, Any] = {"threads": load.threads, "clients": load.clients, "unavailable": reasons, **key}
    result["runtimes"] = STATIC
    if load.clients == 1:
        result["p50"] = {name: statistics.median(times) for name, times in found.items()}
        many = {name: times for name, times in found.items() if len(times) >= CALLS_FOR_P99}
        result["p99"] = {
            name: statistics.quantiles(times, n=100, method="inclusive")[98] for name, times in many.items()
        }
        result["calls"] = {name: len(times) for name, times in found.items()}
    else:
        result["calls_a_second"] = {name: statistics.median(rates) for name, rates in found.items()}
    return result


def in_turns(
    workers: Mapping[str, Process], load: Load, rounds: int, seconds: float, reasons: dict[str, str]
) -> dict[str, list[float]]:
    """What each measures in all rounds; of those that end meanwhile, ``reasons`` gets why."""
    found: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(rounds):
        for name in list(found) if turn % 2 else list(reversed(found)):
            try:
                answer = workers[name].ask(seconds=seconds)
            except Failed as reason:
                reasons[name] = f"{FAILED}: {reason}"
                del found[name]
                continue
            found[name] += answer["microseconds"] if load.clients == 1 else [answer["calls_a_second"]]
    return found


def names_for(model: str, dtype: str, compiled: bool) -> list[str]:
    """Who serves a model in a dtype; without those that compile for each number of rows unless ``compiled``."""
    fit = {name: own for name, own in CONTENDERS.items() if dtype in own.dtypes and model in own.models}
    return [name for name, own in fit.items() if compiled or not own.compiles]
