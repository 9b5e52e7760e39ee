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
    assert len(steps) == 6, {name: outcome.reason for name, outcome in outcomes.items()}


@pytest.mark.parametrize("trans", [True, False])
@pytest.mark.parametrize("training", [False, True])
def test_closed_routes_are_left_out(trans: bool, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight and no input of a closed route is read, and routes are read off z at each call."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    bench = snr.build(snr.RouteShape(**SMALL, trans=trans), 1, torch.float32, training, torch.device("cpu"))
    for name in (snr.OPEN_ALONE, snr.OPEN_ALONE_COMPILED):
        step = next(contender.build() for contender in bench.contenders if contender.name == name)
        assert isinstance(step, snr.RouteStep)
        step()
        before = [y.clone() for y in step.outputs]
        read = {int(j) for j in (step.raw > 0).nonzero()[:, 1]}
        with torch.no_grad():
            for j in set(range(SMALL["below"])) - read:
                step.u[j].fill_(math.nan)
            if step.weight is not None:
                step.weight[step.raw <= 0] = math.nan
        step()
        assert all(torch.equal(y, z) for y, z in zip(step.outputs, before, strict=True))
        with torch.no_grad():
            step.raw.fill_(0.5)
        step()
        assert all(y.isnan().all() for y in step.outputs)


def test_rows_of_the_table() -> None:
    cases = list(SUITES["snr"].cases("cpu"))
    assert {case.workload for case in cases} == {"D", "D-aver"} and sum(case.quick for case in cases) == 2
    dense = max(case.flop for case in cases)
    assert math.isclose(dense, 3 * 2 * 4096 * 64 * 256**2)
