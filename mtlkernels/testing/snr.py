"""Random cases of SNR's ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtlkernels.testing import LAYOUTS, Case, CaseFactory

SHARES = (0.0, 0.3, 0.5, 0.8, 1.0)  # of routes that are open


def coding(make: CaseFactory, outputs: int, inputs: int, share: float, dtype: torch.dtype | None = None) -> Tensor:
    """z [outputs, inputs]: a share of it open, of that a third exactly 1, as hard concrete samples are."""
    drawn = [[make.rng.random() for _ in range(inputs)] for _ in range(outputs)]
    kept = [[make.rng.random() < share for _ in range(inputs)] for _ in range(outputs)]
    values = [
        [(1.0 if x > 2 / 3 else x + 0.1) if k else 0.0 for x, k in zip(xs, ks, strict=True)]
        for xs, ks in zip(drawn, kept, strict=True)
    ]
    return torch.tensor(values, dtype=dtype or make.dtype, device=make.device).requires_grad_()


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
