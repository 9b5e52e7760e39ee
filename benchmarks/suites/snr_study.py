"""A worked example of SNR on the flights of the demo.

SNR-Trans and SNR-Aver are trained beside an MMoE and a PLE with as many parameters in the trunk, on the same batches,
with growing weights of the L0 penalty: how good is each task, how many routes stay open, and what does serving the
compact network take?
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.demo import flights as data
from benchmarks.harness.case import Study
from benchmarks.snr_study import results, serving, training, trunks
from benchmarks.snr_study.training import Settings
from benchmarks.snr_study.trunks import BASELINE, VARIANTS
from benchmarks.studies.model import features, tensors


def compare(device: torch.device, quick: bool) -> dict[str, Any]:
    """Trains every variant with every seed, and times what came out. Progress goes to stderr."""
    settings = training.QUICK if quick else Settings()
    flights = data.load(settings.rows)
    rows = tensors(flights, device)
    width = features(flights)
    runs = []
    for seed in settings.seeds:
        for variant in VARIANTS:
            run = training.train(flights, rows, settings, variant, seed)
            runs.append(asdict(run))
            auc = " ".join(f"{value:.4f}" for value in run.auc)
            state = f"AUC {auc}, {100 * run.open:.0f}% open, {run.seconds:.0f} s"
            print(f"seed {seed} {variant.name}: {state}", file=sys.stderr, flush=True)
    kinds = dict.fromkeys(variant.kind for variant in VARIANTS)
    found = {
        "settings": asdict(settings),
        "tasks": list(data.TASKS),
        "variants": [asdict(variant) | {"name": variant.name} for variant in VARIANTS],
        "baseline": BASELINE.name,
        "features": width,
        "widths": {kind: trunks.width(kind, width) for kind in kinds},
        "parameters": {kind: trunks.parameters(trunks.make(kind, width)) for kind in kinds},
        "train": flights.train,
        "test": len(rows) - flights.train,
        "runs": runs,
    }
    return found | {"serving": serving.measure(device, found, serving.QUICK if quick else serving.BUDGET)}


def serve_again(device: torch.device, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same data, with new serving times."""
    return {**found, "serving": serving.measure(device, found, serving.BUDGET)}


STUDY = Study(
    name="snr-study",
    title="SNR against MMoE and PLE at equal size, and what its L0 penalty buys",
    run=compare,
    show=results.show,
    draw=results.draw,
    retime=serve_again,
)
