"""Some hundred cases of each op in every run, the same ones each time; and that the fuzzer finds what is planted."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import mtlkernels as mk
from tests.csrc import library
from tests.fuzz import calls, engine, level_cases, mixture_cases, processes
from tests.fuzz.memory import SIDES, guarded
from tests.fuzz.mixture_cases import MixtureCase
from tests.fuzz.routings import Wires
from tests.fuzz.targets import TARGETS, Target
from tests.ops.level import normalized

# `make fuzz` checks thousands, other ones each time.
CASES = {"expert_mixture": 200, "gated_mixture": 100, "snr_trans": 150, "snr_aver": 100, "pcgrad": 100}
SMALL = MixtureCase(2, 3, Wires((0, 0), ((0,), (1, 0))), way=calls.Way("reference"), used=(0, 1))


@pytest.mark.parametrize("name", CASES)
def test_random_cases(name: str) -> None:
    calls.counts.clear()
    finding = engine.run(TARGETS[name], CASES[name], seed=1)
    assert finding is None, f"{finding.error}\n{finding.as_test()}"
    assert calls.too_many_second_trials(calls.counts, CASES[name]) is None
    assert {f"by {way}" for way in calls.implementations(name)} <= {*calls.counts}


def test_what_was_found_before() -> None:
    """A stream that only a gate outside of the level reads, whose output is not used, had a gradient of zeros."""
    routing = Wires(streams=(0, 2), gates=((0,), (0,), (0,)))
    layer = level_cases.Layer(1, "none", False, "batch", False)
    for implementation in calls.implementations("expert_mixture"):
        way = calls.Way(implementation)
        level_cases.check(level_cases.LevelCase(2, 1, (layer,), routing, "layers", way=way, used=(0,)))


def spoiled(spoil: Callable[[Sequence[Tensor]], Any]) -> Any:
    """Within the block what ``gated_mixture`` returns is not right where it has two outputs and three rows."""
    op = mk.gated_mixture

    def wrong(*args: Any, **kwargs: Any) -> Any:
        outputs = op(*args, **kwargs)
        return spoil(outputs) if len(outputs) > 1 and outputs[0].shape[0] > 2 else outputs

    return mock.patch.object(mk, "gated_mixture", wrong)


FAULTS: dict[str, tuple[Callable[[Sequence[Tensor]], Any], str]] = {
    "an output": (lambda ys: (*ys[:-1], ys[-1] * 1.01), "outputs: error .* is over the budget"),
    "a gradient": (lambda ys: [y.detach() + (y - y.detach()) * 1.05 for y in ys], "over the budget"),
    "no gradient": (lambda ys: [ys[0].detach(), *ys[1:]], "over the budget|has one"),
    "NaN": (lambda ys: [torch.where(y > 0, y, torch.nan) for y in ys], "not finite|PyTorch has"),
}


@pytest.mark.parametrize("spoil, message", FAULTS.values(), ids=FAULTS)
def test_wrong_results_are_found_and_made_small(spoil: Callable[[Sequence[Tensor]], Any], message: str) -> None:
    target = TARGETS["gated_mixture"]
    # Of the second trials of cases that are wrong none would end before its last draw.
    with spoiled(spoil), mock.patch.object(calls, "DRAWS", 2):
        finding = engine.run(target, 100, seed=3)
        assert finding is not None
        case = eval(finding.case, vars(mixture_cases))
        assert (case.rows, len(case.routing.gates), case.features) == (3, 2, 1)
        test: dict[str, Any] = {}
        exec(finding.as_test(), test)
        with pytest.raises(AssertionError, match=message):
            test["test_found_by_the_fuzzer"]()
    test["test_found_by_the_fuzzer"]()


def test_a_fault_of_a_few_roundings_shows_in_second_trials() -> None:
    """Of 1% in float16, which is ten roundings: cases pass, but not at once."""
    right, wrong = normalized.fused, lambda **arguments: [y * 1.01 for y in right(**arguments)]

    def check(case: level_cases.LevelCase) -> None:
        own = replace(case, dtype="float16", special="", way=replace(case.way, implementation="reference"))
        with mock.patch.object(normalized, "fused", wrong):
            level_cases.check(own)

    calls.counts.clear()
    finding = engine.run(Target(level_cases.CASES, check), 60, seed=6)
    assert finding is not None or calls.too_many_second_trials(calls.counts, 60)


def test_a_gradient_that_no_loss_reaches_is_found() -> None:
    """Of a gate whose output is not used there is none, not even zeros."""
    case = MixtureCase(**{**vars(SMALL), "used": (0,)})
    mixture_cases.check(case)
    with spoiled(lambda ys: [y + 0 * sum(other.sum() for other in ys) for y in ys]):
        mixture_cases.check(case)  # two rows
        with pytest.raises(AssertionError, match="a gradient, though no loss reaches it"):
            mixture_cases.check(MixtureCase(**{**vars(case), "rows": 3}))


@pytest.mark.parametrize("side, transposed", list(zip(SIDES, [True, False], strict=True)))
def test_an_access_beyond_a_tensor_is_found_though_it_ends_the_process(side: str, transposed: bool) -> None:
    values = torch.arange(6.0).view(2, 3)
    tensor = guarded(values.t() if transposed else values, side)
    assert torch.equal(tensor, values.t() if transposed else values)
    beyond = tensor.data_ptr() + (tensor.nbytes if side == "after" else -1)

    def reads_beyond(case: MixtureCase) -> None:
        ctypes.string_at(tensor.data_ptr(), tensor.nbytes)
        if case.rows > 1:
            ctypes.string_at(beyond, 1)

    finding = engine.run(Target(mixture_cases.CASES, reads_beyond), 20, seed=4, isolate=True)
    assert finding is not None and "the process ended by SIGSEGV" in finding.error
    assert eval(finding.case, vars(mixture_cases)).rows == 2


WRITES = """
import ctypes, sys, torch
library, (side, bytes) = ctypes.CDLL(None), map(int, sys.argv[1:])
library.guard.argtypes = [ctypes.c_bool, ctypes.c_bool]
library.guard(True, side < 0)
made = torch.empty(10)
library.guard(False, False)
ctypes.memset(made.data_ptr() + (-bytes if side < 0 else 40), 0, bytes)
assert library.guarded() == 1
made = None
print("alive")
"""


@library.needs_compiler
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs the GNU C library")
def test_what_pytorch_allocates_lies_between_forbidden_pages_too(tmp_path: Path) -> None:
    preloaded = processes.guarded_memory(tmp_path)
    for side, count, alive in ((1, 0, True), (1, 1, False), (-1, 1, False)):
        command = [sys.executable, "-c", WRITES, str(side), str(count)]
        run = subprocess.run(command, env={**os.environ, "LD_PRELOAD": str(preloaded)}, capture_output=True)
        assert (run.stdout == b"alive\n") == alive and (run.returncode == 0) == alive, run.stderr[-1000:]


def test_a_case_that_ends_its_process_is_printed(tmp_path: Path) -> None:
    """The worker says which case it is at before it runs it."""
    record = tmp_path / "case"

    def check(case: MixtureCase) -> None:
        assert record.read_text() == repr(case)

    assert engine.run(Target(mixture_cases.CASES, check), 30, seed=5, record=record) is None


def test_the_command() -> None:
    command = [sys.executable, "-m", "tests.fuzz", "--cases", "6", "--seed", "1", "--only", "snr_aver", "--jobs", "1"]
    done = subprocess.run([*command, "--without-triton"], cwd=library.ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "snr_aver: 6 cases, nothing found" in done.stdout, done.stdout + done.stderr
