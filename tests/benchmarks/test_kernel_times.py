"""What our kernels take of their limits: everything but the profile itself, which needs a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.harness import report as reports
from benchmarks.harness import table
from benchmarks.harness.kernels import KernelTime, by_launch
from benchmarks.harness.limits import Limits
from benchmarks.harness.runner import kernel_times
from benchmarks.harness.timing import QUICK
from benchmarks.suites import mixture

CPU = torch.device("cpu")


@dataclass
class Work:
    kernel: str
    flop: int
    traffic: int


LAUNCHES = [Work("first", 4_000_000_000, 1000), Work("second", 8, 3_000_000), Work("first", 2, 3)]


def row(kernels: list[KernelTime], no_kernels: str = "") -> reports.Row:
    return reports.Row("A", "forward", "float32", {"B": 4}, 1.0, 1.0, False, {}, kernels=kernels, no_kernels=no_kernels)


def test_times_are_medians_of_each_launch() -> None:
    call = [("first", 10.0), ("PyTorch's", 7.0), ("second", 20.0), ("first", 1.0)]
    slow = [(name, 10 * time) for name, time in call]
    found = by_launch([*call, *slow, *call], LAUNCHES)
    assert [(kernel.kernel, kernel.ms) for kernel in found] == [("first", 0.01), ("second", 0.02), ("first", 0.001)]
    assert [(kernel.flop, kernel.traffic) for kernel in found] == [(x.flop, x.traffic) for x in LAUNCHES]


@pytest.mark.parametrize("names", [[], ["first"], ["first", "first", "second"], ["first", "second", "first", "first"]])
def test_other_launches_than_expected_are_refused(names: list[str]) -> None:
    with pytest.raises(ValueError, match="expected launches of first, second, first"):
        by_launch([(name, 1.0) for name in names], LAUNCHES)


def test_shares_of_the_limit(tmp_path: Path) -> None:
    limits = Limits(CPU, {"float32": 1e12}, {}, 1e9, 1e9, 1e9)
    report = reports.new_report(["mixture"], CPU, QUICK)
    times = by_launch([("first", 8000.0), ("second", 3000.0), ("first", 1.0)], LAUNCHES)
    report.rows["mixture"] = [row(times), row([], "nobody knows"), row([])]
    for each in report.rows["mixture"]:
        each.set_limit(limits)
    assert [kernel.limited_by for kernel in times] == ["GEMM rate", "bandwidth", "bandwidth"]
    assert math.isclose(times[0].share_of_limit, 0.5) and math.isclose(times[1].share_of_limit, 1.0)
    again = reports.load(reports.save(report, tmp_path / "found.json"))
    text = table.kernels(again.rows["mixture"])
    assert text == table.kernels(report.rows["mixture"])
    lines = text.splitlines()
    assert len(lines) == 5 and lines[0] == "A B=4 forward float32" and lines[4].endswith("nobody knows")
    assert "50%" in lines[1] and "4.00 GFLOP" in lines[1] and "GEMM rate" in lines[1]
    assert "100%" in lines[2] and "3.0 MB" in lines[2]
    assert table.kernels([row([])]) == ""


def test_no_kernels_on_a_cpu() -> None:
    case = next(iter(mixture.cases("cpu")))
    assert kernel_times(case, {}, CPU) == ([], "")


def test_the_launches_of_a_step_do_the_work_of_a_trunk() -> None:
    """Their products are all of the experts' and gates' arithmetic."""
    pytest.importorskip("triton")
    for training in (False, True):
        case = mixture.case("A2", mixture.TWO_LEVELS, 4096, torch.bfloat16, training, serving=False, quick=False)
        assert case.launches is not None
        launches = case.launches(CPU)
        assert len(launches) == (12 if training else 4)
        assert sum(launch.flop for launch in launches) == case.flop
