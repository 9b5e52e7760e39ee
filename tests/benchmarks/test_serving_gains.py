"""What the suite serving holds against the runtimes: each on its better number of threads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from benchmarks import readme
from benchmarks.harness import report
from benchmarks.serving.contenders import OURS, PACKAGED, STATIC
from benchmarks.serving.gains import VS_RUNTIMES, over_runtimes

FILES = sorted((readme.ROOT / "benchmarks" / "results").glob("serving-*.json"))
KEY = {"model": "level", "dtype": "float32", "rows": 1, "clients": 1, "unavailable": {}}


def latency(threads: int, **p50: float) -> dict[str, Any]:
    return KEY | {"threads": threads, "p50": p50}


def test_a_runtime_that_is_faster_on_one_thread_counts_by_it() -> None:
    one, two = latency(1, openvino=2.0, onnxruntime=9.0, ours=1.5), latency(2, openvino=4.0, onnxruntime=5.0, ours=1.0)
    assert over_runtimes(two, [one, two]) == 2.0
    assert over_runtimes(two, [two]) == 4.0
    # A server of one thread has no more; ours counts by the row's alone.
    assert over_runtimes(one, [one, two]) == pytest.approx(2.0 / 1.5)
    assert over_runtimes(latency(2, openvino=4.0, ours=3.0), [one]) == pytest.approx(2.0 / 3.0)


@pytest.mark.parametrize("other", [{"model": "ple"}, {"dtype": "bfloat16"}, {"rows": 16}, {"clients": 2}])
def test_only_the_same_inputs_are_compared(other: dict[str, Any]) -> None:
    two = latency(2, openvino=4.0, ours=1.0)
    assert over_runtimes(two, [latency(1, openvino=2.0) | other, two]) == 4.0


def test_the_better_of_ours_and_calls_a_second() -> None:
    assert over_runtimes(latency(2, onnxruntime=4.0, **{OURS: 2.0, PACKAGED: 1.0}), []) == 4.0
    rates = KEY | {"threads": 1, "clients": 2, "calls_a_second": {"onnxruntime": 10.0, "openvino": 20.0, OURS: 25.0}}
    assert over_runtimes(rates, [rates]) == 1.25


def test_without_a_time_there_is_no_gain() -> None:
    """Nor where the machine was busy on one thread: the gain could only look better."""
    two = latency(2, openvino=4.0, ours=1.0)
    assert over_runtimes(latency(2, ours=1.0), [latency(1, openvino=2.0)]) is None
    assert over_runtimes(latency(2, openvino=4.0), []) is None
    assert over_runtimes(two, [latency(1), two]) is None


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_page_says_how_it_compares(file: Any) -> None:
    """Files from before the runtimes had static shapes are read as they are, and told apart."""
    found = report.load(file)
    study = found.studies["serving"]
    for row in study["rows"]:
        row.pop("runtimes", None)
    heads = readme.TABLES["serving"](found)[2]
    assert f"| {VS_RUNTIMES} |" in heads and STATIC not in heads
    rows = [row | {"runtimes": STATIC} for row in study["rows"]]
    for row in rows:
        if row["threads"] == 1 and "p50" in row:
            row["p50"] |= {"openvino": 1e-3, "onnxruntime": 1e-3}
    told = dataclasses.replace(found, studies={"serving": study | {"rows": rows}})
    heads, _, *lines = readme.TABLES["serving"](told)[2:]
    assert heads.count(f", {STATIC}, ms |") == 2
    assert lines and all("| **0.00×** |" in line for line in lines)
