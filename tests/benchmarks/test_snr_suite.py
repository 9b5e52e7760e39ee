"""The suite ``snr``: what it compares computes the same."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.harness.runner import check
from benchmarks.suites import SUITES, snr

SMALL = {"rows": 20, "below": 3, "above": 2, "width": 16}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("trans", [True, False])
@pytest.mark.parametrize("open_routes", [1, 3])
def test_contenders_agree(trans: bool, open_routes: int, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shape = snr.RouteShape(**SMALL, trans=trans)
    bench = snr.build(shape, open_routes, torch.float32, training, torch.device("cpu"))
    outcomes, steps = check(bench, torch.float32)
    assert len(steps) == 4, {name: outcome.reason for name, outcome in outcomes.items()}


def test_rows_of_the_table() -> None:
    cases = list(SUITES["snr"].cases("cpu"))
    assert {case.workload for case in cases} == {"D", "D-aver"} and sum(case.quick for case in cases) == 2
    dense = max(case.flop for case in cases)
    assert math.isclose(dense, 3 * 2 * 4096 * 64 * 256**2)
