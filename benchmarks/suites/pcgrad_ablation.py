"""The ablation that the PCGrad paper lacks, on the flights of the demo.

Does projecting conflicting gradients do more for the tasks than what comes with it, shorter and evener gradients? An
MMoE is trained from the same weights on the same batches with the shared parameters' gradients added up as they are,
clipped, normalised, projected, or both; heads get their ordinary gradients. All of it is options of
``mtlkernels.pcgrad``.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.ablation import results, training
from benchmarks.ablation.model import SharedModel
from benchmarks.ablation.training import PAIRS, PLAIN, VARIANTS, Settings
from benchmarks.demo import flights as data
from benchmarks.harness.case import Study
from benchmarks.studies.model import tensors


def ablate(device: torch.device, settings: Settings) -> dict[str, Any]:
    """Trains every variant with every seed. Progress goes to stderr."""
    flights = data.load(settings.rows)
    rows = tensors(flights, device)
    runs = []
    for seed in settings.seeds:
        max_norm = None
        for variant in VARIANTS:  # the plain sum comes first, and says what max_norm is
            run = training.train(flights, rows, settings, variant, seed, max_norm)
            max_norm = run.max_norm
            runs.append(asdict(run))
            auc = " ".join(f"{value:.4f}" for value in run.auc)
            print(f"seed {seed} {variant.name}: AUC {auc}, {run.seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "settings": asdict(settings),
        "tasks": list(data.TASKS),
        "pairs": [[data.TASKS[i], data.TASKS[j]] for i, j in PAIRS],
        "variants": [variant.name for variant in VARIANTS],
        "baseline": PLAIN.name,
        "train": flights.train,
        "test": len(rows) - flights.train,
        "steps": settings.epochs * -(-flights.train // settings.batch),
        "shared": sum(parameter.numel() for parameter in SharedModel(flights).shared()),
        "runs": runs,
    }


STUDY = Study(
    name="pcgrad-ablation",
    title="PCGrad's ablation: what the projection adds to clipping and scaling",
    run=lambda device, quick: ablate(device, training.QUICK if quick else Settings()),
    show=results.show,
    draw=results.draw,
)
