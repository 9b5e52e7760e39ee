"""The study of old weights on few flights: what is trained, what is recorded, and how it is shown."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.ablation.model import SharedModel
from benchmarks.demo import flights as data
from benchmarks.demo.flights import Flights
from benchmarks.rarely import results, training
from benchmarks.rarely.training import METHODS, PLAIN, VARIANTS, Settings, Trainer, Variant
from benchmarks.studies.model import Batch, FlightsModel, minibatches

CPU = torch.device("cpu")
SETTINGS = Settings(seeds=(1,), epochs=1, batch=32, rows=400, windows=2, probe=3)
Usual = Callable[[FlightsModel, Batch, Settings], list[float]]


def test_the_plain_sum_is_ordinary_training(flights: Flights, rows: Batch, usual_training: Usual) -> None:
    found = training.train(flights, rows, SETTINGS, PLAIN, 1)
    torch.manual_seed(1)
    assert found.loss == pytest.approx(usual_training(SharedModel(flights), rows, SETTINGS), rel=1e-4)
    assert not found.angles


@pytest.mark.parametrize("method", METHODS)
def test_angles_are_those_of_the_step_that_comes(method: str, flights: Flights, rows: Batch) -> None:
    """Against updates that are flattened: that which the step writes, and those of separate gradients."""
    trainer = Trainer(flights, SETTINGS, Variant(method, 4), 1, CPU)
    ages = []
    for batch in minibatches(rows, 320, 1, 32, 1):
        found = trainer.angles(batch)
        weights = trainer.weights
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.step(batch)
        if found is None:
            assert trainer.age == 0
            continue
        ages.append(found[0])
        assert trainer.weights is weights and trainer.age == found[0]
        written = torch.cat([p.grad.flatten() for p in trainer.shared if p.grad is not None]).double()
        with torch.no_grad():
            for parameter, old in zip(trainer.model.parameters(), before, strict=True):
                parameter.copy_(old)
        losses = trainer.model.losses(batch)
        grads = [
            torch.autograd.grad(loss, trainer.shared, retain_graph=True, materialize_grads=True) for loss in losses
        ]
        matrix = torch.stack([torch.cat([grad.flatten() for grad in row]) for row in grads]).double()
        exact = trainer.method.again(matrix @ matrix.T) @ matrix
        for angle, update in ((found[1], written), (found[2], matrix.sum(0))):
            wanted = torch.rad2deg(torch.acos(torch.cosine_similarity(update, exact, dim=0).clamp(-1, 1)))
            assert angle == pytest.approx(float(wanted), abs=0.05)  # acos turns float32's rounding into hundredths
    assert ages == [1, 2, 3, 1, 2, 3, 1]


def test_what_a_training_records(flights: Flights, rows: Batch) -> None:
    found = {v.name: training.train(flights, rows, SETTINGS, v, 1) for v in VARIANTS}
    assert len(found) == len(VARIANTS)
    for variant in VARIANTS:
        run = found[variant.name]
        assert len(run.auc) == 3 and len(run.loss) == 2
        steps = [number for number in (3, 6, 9) if number % variant.every] if variant.method else []
        assert [age for age, *_ in run.angles] == [number % variant.every for number in steps]
        assert all(0 <= a <= 180 and 0 <= b <= 180 for _, a, b in run.angles)
    for method in METHODS:
        losses = {tuple(found[Variant(method, every).name].loss) for every in training.EVERY}
        assert len(losses) == len(training.EVERY) and tuple(found[PLAIN.name].loss) not in losses
    again = training.train(flights, rows, SETTINGS, VARIANTS[3], 1)
    assert dataclasses.replace(again, seconds=0.0) == dataclasses.replace(found[VARIANTS[3].name], seconds=0.0)


def test_each_is_held_against_its_own() -> None:
    """A method against the plain sum, and k against the method."""
    chosen = [PLAIN, Variant("PCGrad"), Variant("PCGrad", 2)]
    runs: list[dict[str, Any]] = [
        {"variant": v.name, "seed": seed, "auc": [0.6 + seed / 10 + 0.001 * i * seed], "loss": [1.0, 0.5], "angles": a}
        for seed in (1, 2)
        for i, (v, a) in enumerate(zip(chosen, ([], [], [[1, 2.0, 6.0], [1, 4.0, 7.0]]), strict=True))
    ]
    found = {
        "settings": {**dataclasses.asdict(SETTINGS), "seeds": [1, 2]},
        "tasks": ["late"],
        "variants": [dataclasses.asdict(v) | {"name": v.name} for v in chosen],
        "runs": runs,
        "train": 3200,
        "test": 80,
        "shared": 50,
        "threads": 1,
        "milliseconds": {v.name: 1.5 + i for i, v in enumerate(chosen)},
    }
    lines = results.show(found, True).splitlines()
    assert lines[2] == "| plain sum | 1.50 |  |  | 0.5000 ± 0.0000 | 0.7500 ± 0.0707 |  |"
    assert lines[3] == "| PCGrad | 2.50 |  |  | 0.5000 ± 0.0000 | 0.7515 ± 0.0714 | +1.50 ± 0.71 * |"
    assert lines[4] == "| PCGrad, k = 2 | 3.50 | 3.0° | 6.5° | 0.5000 ± 0.0000 | 0.7530 ± 0.0721 | +1.50 ± 0.71 * |"


def test_command_line(
    flights: Flights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(data, "load", lambda rows: {training.QUICK.rows: flights}[rows])
    monkeypatch.setattr(training, "QUICK", dataclasses.replace(training.QUICK, batch=16))
    monkeypatch.setattr(training, "BUDGET", training.QUICK_BUDGET)
    options = ["pcgrad-rarely", "--quick", "--markdown"]
    assert run.main([*options, "--json", str(tmp_path), "--plot", str(tmp_path)]) == 0
    assert "| Aligned-MTL, k = 16 |" in capsys.readouterr().out
    (path,) = tmp_path.glob("pcgrad-rarely-*.json")
    (plot,) = tmp_path.glob("pcgrad-rarely-*.png")
    assert plot.stat().st_size > 10_000
    first = json.loads(path.read_text())["studies"]["pcgrad-rarely"]
    assert [r["variant"] for r in first["runs"]] == 2 * [variant.name for variant in VARIANTS]
    assert all(value > 0 for value in first["milliseconds"].values())
    again = tmp_path / "again.json"
    assert run.main(["--from-json", str(path), "--retime", "--json", str(again)]) == 0
    second = json.loads(again.read_text())["studies"]["pcgrad-rarely"]
    assert second["runs"] == first["runs"] and second["milliseconds"] != first["milliseconds"]
