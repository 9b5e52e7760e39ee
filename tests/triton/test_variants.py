"""How many kernels are compiled over all numbers of rows, which needs no GPU: each costs whoever meets it seconds."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

pytest.importorskip("triton")
from benchmarks.gpu_model.launches import steps  # noqa: E402
from benchmarks.suites.mixture import TWO_LEVELS  # noqa: E402

# On both sides of powers of two, by which tiles and splits are chosen, and between them.
ROWS = sorted({n + d for n in (2**i for i in range(17)) for d in (-1, 0, 1)} | {33, 48, 100, 1000, 5000, 50000})
# Two tiles each, and a third for gradients where there is much to read, of inputs a kernel of its own; sums that are
# split or not; the last layer of three gates and of two; and input_gradient serves hidden layers and inputs.
MOST = {
    "layer_forward": 2,
    "last_forward": 6,
    "mix_backward": 1,
    "input_gradient": 6,
    "wide_input_gradient": 1,
    "weight_gradient": 3,
}


def test_variants_over_all_numbers_of_rows() -> None:
    """Of a PLE of two levels in training: no size is a constant of a kernel."""
    found: dict[str, set[object]] = defaultdict(set)
    for rows in ROWS:
        if not 1 <= rows <= 65536:
            continue
        for step in steps(TWO_LEVELS, rows, torch.bfloat16, True):
            launch = step.launch
            wide = tuple(isinstance(value, int) and value >= 2**31 for value in launch.arguments.values())
            found[launch.name].add((launch.tile, *map(str, launch.constants.items()), wide))
    assert {name: len(variants) for name, variants in found.items()} == MOST
