"""What ``gram_every`` costs and saves, on the flights of the demo.

An MMoE is trained from the same weights on the same batches with the shared gradients added up plainly, by PCGrad, and
by Aligned-MTL, whose weights are far from equal ones; the Gram matrix and the weights are made in every step, or in one
of 2, 4, 8 and 16. What becomes of loss and AUC, and how far is the update by old weights from that by new ones?
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.ablation.model import SharedModel
from benchmarks.demo import flights as data
from benchmarks.harness.case import Study
from benchmarks.harness.timing import Budget
from benchmarks.rarely import results, training
from benchmarks.rarely.training import PLAIN, VARIANTS, Settings
from benchmarks.studies.model import tensors


def compare(device: torch.device, settings: Settings, budget: Budget) -> dict[str, Any]:
    """Trains every variant with every seed, and times their steps. Progress goes to stderr."""
    flights = data.load(settings.rows)
    rows = tensors(flights, device)
    runs = []
    for seed in settings.seeds:
        for variant in VARIANTS:
            run = training.train(flights, rows, settings, variant, seed)
            runs.append(asdict(run))
            auc = " ".join(f"{value:.4f}" for value in run.auc)
            print(f"seed {seed} {variant.name}: AUC {auc}, {run.seconds:.0f} s", file=sys.stderr, flush=True)
    return {
        "settings": asdict(settings),
        "tasks": list(data.TASKS),
        "variants": [asdict(variant) | {"name": variant.name} for variant in VARIANTS],
        "baseline": PLAIN.name,
        "train": flights.train,
        "test": len(rows) - flights.train,
        "steps": settings.epochs * -(-flights.train // settings.batch),
        "shared": sum(parameter.numel() for parameter in training.split(SharedModel(flights))[0]),
        "runs": runs,
        "milliseconds": training.step_times(flights, rows, settings, budget),
        "threads": torch.get_num_threads(),
    }


def time_again(device: torch.device, found: Mapping[str, Any]) -> dict[str, Any]:
    """The same data, with new times of steps."""
    settings = Settings(**found["settings"])
    flights = data.load(settings.rows)
    times = training.step_times(flights, tensors(flights, device), settings, training.BUDGET)
    return {**found, "milliseconds": times, "threads": torch.get_num_threads()}


STUDY = Study(
    name="pcgrad-rarely",
    title="Gram matrices in one step of k: what old weights do to the training",
    run=lambda device, quick: (
        compare(device, training.QUICK, training.QUICK_BUDGET)
        if quick
        else compare(device, Settings(), training.BUDGET)
    ),
    show=results.show,
    draw=results.draw,
    retime=time_again,
)
