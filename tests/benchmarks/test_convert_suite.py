"""The suite ``convert``: what it compares computes the same."""

from __future__ import annotations

import importlib.util

import pytest
import torch

MISSING = [name for name in ("deepctr_torch", "torch_rechub") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the suite needs {', '.join(MISSING)}")
if not MISSING:
    from benchmarks.harness.runner import check
    from benchmarks.peers.library_models import MODELS, PARTS
    from benchmarks.suites import SUITES, convert

CPU = torch.device("cpu")
NAMES = ("rechub-PLE", "rechub-MMOE", "rechub-PLE-PReLU", "rechub-PLE-Dice", "deepctr-PLE", "deepctr-PLE-BN")


def assert_agree(name: str, work: str, rows: int, contenders: int = 2, dtype: torch.dtype = torch.float32) -> None:
    bench = convert.build(name, work, rows, dtype, CPU)
    outcomes, steps = check(bench, dtype)
    assert len(steps) == contenders, {key: outcome.reason for key, outcome in outcomes.items()}


WORKS = ("training step", "serving")


@pytest.mark.parametrize("name, work", [(name, WORKS[i % 2]) for i, name in enumerate(NAMES)] + [(NAMES[0], WORKS[1])])
def test_converted_models_agree(name: str, work: str) -> None:
    """tests/convert has each of them in both."""
    assert_agree(name, work, 40)


@pytest.mark.parametrize("name, work", [("rechub-PLE", WORKS[0]), ("deepctr-PLE", WORKS[1])])
def test_converted_models_agree_under_autocast(name: str, work: str) -> None:
    assert_agree(name, work, 40, dtype=torch.bfloat16)


@pytest.mark.parametrize("part", ["embedding", "trunk", "towers", "optimizer"])
def test_parts_agree(part: str) -> None:
    assert_agree("deepctr-PLE-BN" if part in ("towers", "optimizer") else "rechub-PLE", part, 40)


def test_compiled_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    assert_agree("rechub-PLE", "training step", 16, contenders=4)


def test_a_wrong_conversion_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = convert.converted

    def spoilt(module: torch.nn.Module) -> torch.nn.Module:
        other = wrong(module)
        with torch.no_grad():
            next(p for name, p in other.named_parameters() if "experts_shared" in name).add_(0.01)
        return other

    monkeypatch.setattr(convert, "converted", spoilt)
    outcomes, _ = check(convert.build("rechub-PLE", "serving", 20, torch.float32, CPU), torch.float32)
    assert outcomes["ours"].status == "FAILED"


def test_rows_of_the_table() -> None:
    cases = list(SUITES["convert"].cases("cpu"))
    assert {case.workload for case in cases} == set(NAMES) == set(MODELS)
    assert {case.work for case in cases} == {"training step", "serving", "optimizer", *PARTS}
    assert sum(case.quick for case in cases) == 4  # two of them under autocast
    with_norm = [case for case in cases if case.work == "training step" and MODELS[case.workload].batch_norm]
    assert min(case.size["B"] for case in with_norm) > 1
