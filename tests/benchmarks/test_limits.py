"""What the machine could do at best, and what disturbs a measurement."""

from __future__ import annotations

import platform
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.harness import machine, peak, runner
from benchmarks.harness.contention import Others
from benchmarks.harness.limits import Limits
from benchmarks.harness.timing import Budget
from tests.benchmarks.test_pcgrad_suite import tiny
from tests.csrc.library import COMPILER, needs_compiler

CPU = torch.device("cpu")


@needs_compiler
@pytest.mark.skipif(not machine.describe(CPU)["isa"], reason="needs vector instructions that are known here")
def test_no_product_of_pytorchs_outruns_the_registers() -> None:
    """By more than a noisy machine makes of it: both are the best of some tries."""
    limits = Limits(CPU)
    limits._measure_gemm(torch.float32, 0.4)
    assert peak.register_peak("float32", 0.4) > 0.5 * limits.gemm["float32"]


PROCESSORS = ["x86-64", "haswell", "skylake-avx512", "cooperlake", "sapphirerapids"]


@needs_compiler
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="needs a compiler for x86-64")
@pytest.mark.parametrize("processor", PROCESSORS)
def test_the_probes_compile_for_processors_that_this_is_not(processor: str) -> None:
    options = ["-std=c++20", "-O3", "-Wall", "-Werror", f"-march={processor}", "-fsyntax-only"]
    compilation = subprocess.run([str(COMPILER), *options, str(peak.SOURCE)], capture_output=True, text=True)
    assert compilation.returncode == 0, compilation.stderr


def test_the_register_peak_limits_where_it_is_known() -> None:
    known = Limits(CPU, {"float32": 1e11}, {}, 1e10, 2e10, 1e10, {"float32": 2e11})
    assert known.seconds(1e11, 1.0, "float32", False) == (0.5, "register peak")
    unknown = Limits(CPU, {"float32": 1e11}, {}, 1e10, 2e10, 1e10)
    assert unknown.seconds(1e11, 1.0, "float32", False) == (1.0, "GEMM rate")
    assert unknown.seconds(1.0, 1e10, "float32", True) == (0.5, "bandwidth")
    assert peak.register_peak("complex64", 0.01) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/stat")
def test_another_busy_process_is_seen_and_ones_own_is_not() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.3)
        counted = Others()
        time.sleep(1.0)
        assert counted.cores() > 0.2
        own, everybody = Others([busy.pid]), Others()
        time.sleep(1.0)
        assert own.cores() < everybody.cores()
    finally:
        busy.kill()
        busy.wait()


@pytest.mark.parametrize("seconds", [1.0, 0.2])
def test_a_disturbed_row_says_so_instead_of_times(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Once it was tried again; but a smoke test, which measures nothing, shows what it has."""
    monkeypatch.setattr(runner.Others, "cores", lambda self: 0.7)
    calls: list[int] = []
    original = runner.interleaved
    monkeypatch.setattr(runner, "interleaved", lambda *args: (calls.append(1), original(*args))[1])
    row = runner.run_case(tiny(), CPU, Budget(seconds=seconds, warmup=0.001, min_rounds=1))
    timed = [outcome for outcome in row.outcomes.values() if outcome.timing is not None]
    if seconds < 1:
        assert timed and len(calls) == 1
    else:
        assert not timed and len(calls) == 2
        assert any("took 0.7 cores" in outcome.reason for outcome in row.outcomes.values())
