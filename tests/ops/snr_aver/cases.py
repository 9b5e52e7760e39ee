"""Calls of snr_aver, and how they are held against the formula."""

from __future__ import annotations

from typing import Any

import torch

import mtlkernels as mk
from mtlkernels.testing import LAYOUTS, Case, CaseFactory
from tests.ops import agreement
from tests.ops.snr import SHARES, coding
from tests.ops.snr_aver.definition import formula


def snr_aver(
    make: CaseFactory, rows: int, width: int, inputs: int, outputs: int, *, share: float = 0.5, **options: Any
) -> Case:
    """A call of :func:`mtlkernels.snr_aver`."""
    u = [make.leaf(rows, width) for _ in range(inputs)]
    return Case({"u": u, "z": coding(make, outputs, inputs, share), **options}, make.dtype)


def random_snr_aver(
    seed: int, dtype: torch.dtype, *, device: torch.device | str = "cpu", max_rows: int = 130, max_width: int = 70
) -> Case:
    """One to six sub-networks on either side, odd widths, any layout, any share of open routes."""
    make = CaseFactory(seed, dtype, device=device, layouts=LAYOUTS)
    rng = make.rng
    return snr_aver(
        make,
        rng.randint(0, max_rows),
        rng.randint(1, max_width),
        rng.randint(1, 6),
        rng.randint(1, 6),
        share=rng.choice(SHARES),
    )


def check(case: Case, backend: str, threads: int = 1) -> None:
    agreement.check(mk.snr_aver, formula, case, backend, threads)
