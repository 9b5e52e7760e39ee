"""How long the trunks take to serve, in full and compact.

The time depends on which routes are open, and not on what else was learnt, so that it can be measured again from the
log alphas that a study has recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import date
from typing import Any

import torch
from torch import nn

from benchmarks.harness.timing import Budget, interleaved
from benchmarks.snr_study import trunks
from benchmarks.snr_study.trunks import VARIANTS

BATCHES = (1, 64, 1024)
FULL, COMPACT = "full", "compact"
BUDGET = Budget(seconds=10.0, warmup=0.05, min_rounds=5)
QUICK = Budget(seconds=0.1, warmup=0.001, min_rounds=1)


def served(data: Mapping[str, Any], device: torch.device) -> dict[tuple[str, int, str], nn.Module]:
    """By variant, seed and form: the trunks in evaluation mode, with the routes that were learnt.

    Those without routes are the same for all seeds, and are there once.
    """
    found: dict[tuple[str, int, str], nn.Module] = {}
    variants = {variant.name: variant for variant in VARIANTS}
    for run in data["runs"]:
        variant = variants[run["variant"]]
        if not variant.routed and run["seed"] != data["settings"]["seeds"][0]:
            continue
        trunk = trunks.make(variant.kind, data["features"]).to(device).eval()
        found[variant.name, run["seed"], FULL] = trunk
        if variant.routed:
            for joint, log_alpha in zip(trunk.joints, run["log_alpha"], strict=True):
                joint.log_alpha.data.copy_(torch.tensor(log_alpha))
            found[variant.name, run["seed"], COMPACT] = trunk.compact()
    return found


def measure(device: torch.device, data: Mapping[str, Any], budget: Budget) -> dict[str, Any]:
    """Times all of them by turns, at each number of rows: medians in milliseconds."""
    torch.manual_seed(0)
    chosen = {str(key): (key, trunk) for key, trunk in served(data, device).items()}
    times = []
    for rows in BATCHES:
        x = torch.randn(rows, data["features"], device=device)
        with torch.inference_mode():
            timings = interleaved({name: _step(trunk, x) for name, (_, trunk) in chosen.items()}, device, budget)
        for name, ((variant, seed, form), _) in chosen.items():
            times.append(
                {"variant": variant, "seed": seed, "form": form, "rows": rows, "milliseconds": timings[name].median}
            )
    return {"date": date.today().isoformat(), "threads": torch.get_num_threads(), "times": times}


def _step(trunk: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    def step() -> None:
        trunk(x)

    return step
