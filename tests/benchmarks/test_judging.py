"""What the harness asks of a result, and what it makes of times and limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import check, report, runner, timing
from benchmarks.harness.case import Bench, Contender
from benchmarks.harness.check import Error
from benchmarks.harness.limits import Limits


@pytest.mark.parametrize("rms, most", [(1e-6, 1e-4), (1e-4, 1e-6), (3e-5, 3e-5)])
def test_either_error_refuses(rms: float, most: float) -> None:
    assert not check.judge({"y": Error(rms, most)}, {"y": Error(1e-6, 1e-6)}, torch.float32).ok


def test_quartiles() -> None:
    found = timing._summary([5e-3, 1e-3, 2e-3, 4e-3, 3e-3], 7)
    assert [found.best, found.lower, found.median, found.upper] == pytest.approx([1, 2, 3, 4])


class Twice:
    """A step whose second result is wrong, if asked for."""

    outputs = ()

    def __init__(self, wrong: bool) -> None:
        self._wrong, self._calls = wrong, 0

    def forget(self) -> None:
        """There is nothing to forget."""

    def __call__(self) -> None:
        self._calls += 1

    def results(self) -> dict[str, Tensor]:
        return {"y": torch.full((3,), 2.0 if self._wrong and self._calls > 1 else 1.0)}


def test_a_second_call_that_is_wrong_is_refused() -> None:
    def contender(name: str, wrong: bool) -> Any:
        return Contender(name, name, lambda: Twice(wrong))

    bench = Bench(
        [contender("eager", False), contender("ours", True)], lambda: {"y": torch.ones(3, dtype=torch.float64)}
    )
    assert list(runner.check(bench, torch.float32)[1]) == ["eager"]


def test_limits_only_rise() -> None:
    """Those of an earlier run may be lower, and higher ones stand."""
    known, lower = (
        Limits(torch.device("cpu"), {"float32": rate}, {"float32": (1, 1, 1)}, 1e10, 2e10, 1e10)
        for rate in (2e11, 1e11)
    )
    report.raise_limits(known, report.limits_as_json(lower))
    assert known.gemm["float32"] == 2e11
    report.raise_limits(lower, report.limits_as_json(known))
    assert lower.gemm["float32"] == pytest.approx(2e11)
