"""Calls of snr_trans, and how they are held against the formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

import mtlkernels as mk
from mtlkernels.testing import LAYOUTS, Case, CaseFactory
from tests.ops import agreement
from tests.ops.snr import SHARES, coding
from tests.ops.snr_trans.definition import formula


def snr_trans(
    make: CaseFactory,
    rows: int,
    in_widths: Sequence[int],
    out_widths: Sequence[int],
    *,
    share: float = 0.5,
    stacked: bool = False,
    stacked_inputs: bool = False,
    **options: Any,
) -> Case:
    """A call of :func:`mtlkernels.snr_trans`; ``stacked`` forms want equal widths."""
    inputs, outputs = len(in_widths), len(out_widths)
    scale = max(sum(in_widths), 1) ** -0.5
    weight: Any
    if stacked:
        weight = make.leaf(outputs, inputs, out_widths[0], in_widths[0], scale=scale)
    else:
        weight = [[make.leaf(o, i, scale=scale) for i in in_widths] for o in out_widths]
    u: Any = make.leaf(inputs, rows, in_widths[0]) if stacked_inputs else [make.leaf(rows, i) for i in in_widths]
    return Case({"u": u, "weight": weight, "z": coding(make, outputs, inputs, share), **options}, make.dtype)


def random_snr_trans(
    seed: int, dtype: torch.dtype, *, device: torch.device | str = "cpu", max_rows: int = 130, max_width: int = 70
) -> Case:
    """One to six sub-networks on either side, odd and ragged widths, any layout, any share of open routes."""
    make = CaseFactory(seed, dtype, device=device, layouts=LAYOUTS)
    rng = make.rng
    inputs, outputs = rng.randint(1, 6), rng.randint(1, 6)
    stacked = rng.random() < 0.4
    in_widths = [rng.randint(1, max_width) for _ in range(inputs)]
    out_widths = [rng.randint(1, max_width) for _ in range(outputs)]
    if stacked:
        in_widths, out_widths = [in_widths[0]] * inputs, [out_widths[0]] * outputs
    return snr_trans(
        make,
        rng.randint(0, max_rows),
        in_widths,
        out_widths,
        share=rng.choice(SHARES),
        stacked=stacked,
        stacked_inputs=stacked and rng.random() < 0.5,
    )


def check(case: Case, backend: str, threads: int = 1) -> None:
    agreement.check(mk.snr_trans, formula, case, backend, threads)
