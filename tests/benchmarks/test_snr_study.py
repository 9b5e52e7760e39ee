"""The study of SNR on few flights: what is trained, what is served, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import run
from benchmarks.demo import flights as data
from benchmarks.demo.flights import Flights
from benchmarks.snr_study import results, serving, training, trunks
from benchmarks.snr_study.training import Settings
from benchmarks.snr_study.trunks import AVER, MMOE, PLE, TRANS, VARIANTS, Variant
from benchmarks.studies.model import Batch, FlightsModel, features, measured_aucs

Usual = Callable[[FlightsModel, Batch, Settings], list[float]]
CPU = torch.device("cpu")
SETTINGS = Settings(seeds=(1,), epochs=1, batch=64, rows=400, windows=3)
KINDS = (MMOE, PLE, TRANS, AVER)


@pytest.mark.parametrize("kind", KINDS)
def test_trunks_are_of_about_the_same_size(kind: str) -> None:
    wanted = trunks.parameters(trunks.make(MMOE, 96))
    trunk = trunks.make(kind, 96)
    assert abs(trunks.parameters(trunk) / wanted - 1) < 0.05
    assert trunk.out_features == trunks.width(kind, 96) and trunk.out_features % 8 == 0
    assert [y.shape for y in trunk(torch.randn(2, 96))] == 3 * [(2, trunk.out_features)]


def test_a_trunk_without_routes_is_trained_as_usual(flights: Flights, rows: Batch, usual_training: Usual) -> None:
    found = training.train(flights, rows, SETTINGS, Variant(PLE), 1)
    torch.manual_seed(1)
    model = FlightsModel(flights, lambda width: trunks.make(PLE, width))
    assert found.loss == pytest.approx(usual_training(model, rows, SETTINGS), rel=1e-4)
    assert found.auc == pytest.approx(measured_aucs(model, rows[slice(320, None)]), abs=2e-3)
    assert found.open == 1 and not found.log_alpha
    assert found.parameters == trunks.parameters(model.trunk)


@pytest.mark.parametrize("kind", [TRANS, AVER])
def test_the_penalty_closes_routes(flights: Flights, rows: Batch, kind: str) -> None:
    settings = replace(SETTINGS, epochs=4, route_rate=0.5)
    free, penalised = (training.train(flights, rows, settings, Variant(kind, weight), 1) for weight in (0.0, 50.0))
    assert free.open > penalised.open == 0  # nothing else weighs as much
    assert penalised.read == [0, 0] and penalised.auc == [0.5, 0.5, 0.5] and penalised.parameters == 0
    small = training.train(flights, rows, replace(settings, route_rate=1e-3), Variant(kind, 50.0), 1)
    moved = np.abs(np.array(small.log_alpha[0]))
    assert 0 < moved.max() < 0.03  # by about the rate in each of 20 steps


def test_sampling_is_what_differs(flights: Flights, rows: Batch) -> None:
    sampled, again, fixed = (
        training.train(flights, rows, SETTINGS, Variant(TRANS, sampled=sampled), 1) for sampled in (True, True, False)
    )
    assert sampled.loss == again.loss and sampled.auc == again.auc and sampled.log_alpha == again.log_alpha
    assert sampled.loss[0] != fixed.loss[0]


def _found(alphas: dict[str, Any]) -> dict[str, Any]:
    """Data of a study with one seed, as far as serving needs them."""
    runs = [{"variant": name, "seed": 1, "log_alpha": alpha} for name, alpha in alphas.items()]
    return {"settings": {"seeds": [1]}, "features": 96, "runs": runs}


def test_what_is_served_has_the_routes_that_were_learnt() -> None:
    name = Variant(TRANS, 0.1).name
    below, above = torch.full((4, 4), -10.0), torch.full((3, 4), -10.0)
    below[1, 2], above[0, 1], above[2, 1] = 1.0, 10.0, 2.0
    models = serving.served(_found({name: [below.tolist(), above.tolist()], MMOE: []}), CPU)
    assert set(models) == {(name, 1, serving.FULL), (name, 1, serving.COMPACT), (MMOE, 1, serving.FULL)}
    full, compact = models[name, 1, serving.FULL], models[name, 1, serving.COMPACT]
    x = torch.randn(5, 96)
    torch.testing.assert_close(full(x), compact(x))
    assert not full.training and full.routes().num_open == 3
    one = 96 * 48 + 48 + 48 * 24 + 24
    two = 24 * 48 + 48 + 48 * 24 + 24
    assert trunks.parameters(compact) == one + two + 3 * 24 * 24


def test_tables() -> None:
    names = [MMOE, Variant(AVER, sampled=False).name, Variant(AVER).name]
    found: dict[str, Any] = {
        "settings": {**vars(SETTINGS), "seeds": [1, 2]},
        "tasks": ["late"],
        "baseline": MMOE,
        "variants": [{"name": n, "kind": n[:8], "weight": 0.0, "sampled": "not" not in n} for n in names],
        "parameters": {MMOE: 7000},
        "widths": {MMOE: 32},
        "train": 3200,
        "test": 80,
        "runs": [
            {"variant": name, "seed": seed, "auc": [auc], "open": seed / 2, "read": [seed, 4], "parameters": 1000}
            for seed in (1, 2)
            for name, auc in zip(names, (0.6, 0.6 + 0.002 * seed, 0.6 - 0.001), strict=True)
        ],
        "serving": {
            "threads": 1,
            "date": "2026-11-25",
            "times": [
                {"variant": name, "seed": 1, "form": form, "rows": rows, "milliseconds": rows * size}
                for name in names
                for rows in serving.BATCHES
                for form, size in ((serving.FULL, 0.002), (serving.COMPACT, 0.001))[: 1 if name == MMOE else 2]
            ],
        },
    }
    lines = results.show(found, True).splitlines()
    assert "| MMoE |  | 0.6000 ± 0.0000 |  |" in lines
    assert "| SNR-Aver, L0 0, not sampled | 75% (50–100) | 0.6030 ± 0.0014 | +3.00 ± 1.41 * |" in lines
    assert "| SNR-Aver, L0 0, not sampled | +4.00 ± 1.41 * |" in lines
    assert "| SNR-Aver, L0 0 | 1,000 | 1.5 + 4.0 | 2.00 | 1.00 | 128 | 64.0 | 2048 | 1024 |" in lines
    assert "| MMoE | 1,000 |  | 2.00 |  | 128 |  | 2048 |  |" in lines


def test_command_line(
    flights: Flights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(data, "load", lambda rows: {training.QUICK.rows: flights}[rows])
    monkeypatch.setattr(serving, "BUDGET", serving.QUICK)
    options = ["snr-study", "--quick", "--markdown"]
    assert run.main([*options, "--json", str(tmp_path), "--plot", str(tmp_path)]) == 0
    assert "| SNR-Trans, L0 0.1 |" in capsys.readouterr().out
    (path,) = tmp_path.glob("snr-study-*.json")
    (plot,) = tmp_path.glob("snr-study-*.png")
    assert plot.stat().st_size > 10_000
    first = json.loads(path.read_text())["studies"]["snr-study"]
    assert [run["variant"] for run in first["runs"]] == 2 * [variant.name for variant in VARIANTS]
    assert first["features"] == features(flights)
    routed = sum(variant.routed for variant in VARIANTS)
    assert len(first["serving"]["times"]) == len(serving.BATCHES) * (2 + 2 * 2 * routed)
    assert run.main(["--from-json", str(path), "--retime", "--json", str(tmp_path)]) == 0
    second = json.loads(path.read_text())["studies"]["snr-study"]
    assert second["serving"]["times"] != first["serving"]["times"] and second["runs"] == first["runs"]


def test_only_earlier_results_are_timed_again(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["snr-study", "--retime"])
    assert "--retime: no earlier results" in capsys.readouterr().err
