"""The ablation on few flights: what is trained, what is recorded, and how it is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import run
from benchmarks.ablation import results, training
from benchmarks.ablation.model import SharedModel
from benchmarks.ablation.training import PLAIN, VARIANTS, Settings, Variant
from benchmarks.demo import flights as data
from benchmarks.demo.flights import Flights
from benchmarks.harness import plots
from benchmarks.harness import report as reports
from benchmarks.studies.model import Batch, FlightsModel, measured_aucs, tensors
from benchmarks.suites import STUDIES

Usual = Callable[[FlightsModel, Batch, Settings], list[float]]
CPU = torch.device("cpu")
SETTINGS = Settings(seeds=(1,), epochs=1, batch=64, rows=400, norm_steps=2, windows=3)
STUDY = STUDIES["pcgrad-ablation"]


def test_shared_parameters_are_those_that_every_task_reaches(flights: Flights, rows: Batch) -> None:
    model = SharedModel(flights)
    shared = model.shared()
    assert len(shared) == 1 + 6 * 2 * 2  # the embeddings; weights and biases of six experts of two layers
    for loss in model.losses(rows):
        found = torch.autograd.grad(loss, shared, retain_graph=True)
        assert all(bool(grad.count_nonzero()) for grad in found)
    everything = [*shared, *model.heads()]
    assert len(everything) == len(list(model.parameters())) == len({id(p) for p in everything})


def test_codes_of_features_do_not_overlap(flights: Flights, rows: Batch) -> None:
    assert rows.codes[:, 0].max() < flights.vocabulary["carrier"] <= rows.codes[:, 1].min()
    assert rows.codes.max() < sum(flights.vocabulary.values())


def test_unknown_labels_count_for_nothing(flights: Flights, rows: Batch) -> None:
    model = SharedModel(flights)
    known = ~rows.labels[:, 1].isnan()
    alone = model.losses(Batch(rows.codes[known], rows.dense[known], rows.labels[known]))
    torch.testing.assert_close(model.losses(rows)[1], alone[1])


def test_the_plain_sum_is_ordinary_training(flights: Flights, rows: Batch, usual_training: Usual) -> None:
    found = training.train(flights, rows, SETTINGS, PLAIN, 1, None)
    torch.manual_seed(1)
    model = SharedModel(flights)
    assert found.loss == pytest.approx(usual_training(model, rows, SETTINGS), rel=1e-4)
    assert found.auc == pytest.approx(measured_aucs(model, rows[slice(320, None)]), abs=2e-3)


def test_what_a_training_records(flights: Flights, rows: Batch) -> None:
    plain = training.train(flights, rows, SETTINGS, PLAIN, 1, None)
    assert len(plain.auc) == 3 and len(plain.conflicts) == len(plain.cosines) == len(plain.norms) == 3
    assert all(0 <= share <= 1 for window in plain.conflicts for share in window)
    assert all(-1 <= cosine <= 1 for window in plain.cosines for cosine in window)
    assert min(plain.norms[0]) <= plain.max_norm <= max(plain.norms[0]) and 0 < sum(plain.clipped) < 3
    clipped = training.train(flights, rows, SETTINGS, Variant("clip", clip=True), 1, plain.max_norm)
    assert clipped.max_norm == plain.max_norm and clipped.loss != plain.loss


@pytest.mark.parametrize("variant", VARIANTS[1:], ids=lambda variant: variant.name)
def test_variants_differ_and_repeat(flights: Flights, rows: Batch, variant: Variant) -> None:
    plain, first, second = (
        training.train(flights, rows, SETTINGS, chosen, 1, 0.01) for chosen in (PLAIN, variant, variant)
    )
    assert first.loss == second.loss and first.auc == second.auc
    assert first.loss[0] != plain.loss[0]


def test_gains_are_taken_seed_by_seed() -> None:
    runs: list[dict[str, Any]] = [
        {"variant": name, "seed": seed, "auc": [auc], "conflicts": [[0.5], [0.25]], "max_norm": 1.0, "clipped": [0.5]}
        for seed, plain in ((1, 0.6), (2, 0.8))
        for name, auc in (("plain sum", plain), ("clip", plain + 0.001 * seed))
    ]
    found = {
        "settings": {**vars(SETTINGS), "seeds": [1, 2]},
        "tasks": ["late"],
        "variants": ["plain sum", "clip"],
        "runs": runs,
        "train": 3200,
        "test": 80,
        "shared": 50,
    }
    assert results.gains(found, "clip").ravel().tolist() == pytest.approx([1.0, 2.0])
    lines = results.show(found, True).splitlines()
    assert lines[3] == "| clip | 0.7015 ± 0.1421 | +1.50 ± 0.71 * | 50% | 38% | 25% |"
    assert lines[2].startswith("| plain sum | 0.7000 ± 0.1414 |  |") and "3,200 flights to train" in lines[6]


def test_command_line(
    flights: Flights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(data, "load", lambda rows: {training.QUICK.rows: flights}[rows])
    options = ["pcgrad-ablation", "--quick", "--markdown"]
    assert run.main([*options, "--json", str(tmp_path), "--plot", str(tmp_path)]) == 0
    assert "| project + clip |" in capsys.readouterr().out
    (path,) = tmp_path.glob("pcgrad-ablation-*.json")
    (plot,) = tmp_path.glob("pcgrad-ablation-*.png")
    assert plot.stat().st_size > 10_000
    written = json.loads(path.read_text())
    assert written["rows"] == {} and written["limits"] == {}
    runs = written["studies"]["pcgrad-ablation"]["runs"]
    assert [run["variant"] for run in runs] == 2 * [variant.name for variant in VARIANTS]
    plot.unlink()
    assert run.main(["--from-json", str(path), "--plot", str(tmp_path)]) == 0 and plot.exists()
    assert plots.draw_study(STUDY, reports.load(path), tmp_path) == plot


def test_real_flights_fit_the_model() -> None:
    flights = data.load(3000)
    rows = tensors(flights, CPU)
    losses = SharedModel(flights).losses(rows[slice(0, 500)])
    assert losses.shape == (3,) and bool((losses.detach() - torch.log(torch.tensor(2.0))).abs().max() < 0.1)
