"""snr_trans against its formula, over every implementation, dtype and memory layout."""

from __future__ import annotations

import pytest
import torch

from mtlkernels import _extension
from mtlkernels.testing import LAYOUTS, CaseFactory
from mtlkernels.testing.snr import random_snr_trans, snr_trans
from tests.ops.snr_trans.cases import check

CASES = 10  # for each of four dtypes


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(random_snr_trans(seed, dtype), backend, threads=1 + seed % 2)


@pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_every_instruction_set(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        check(random_snr_trans(seed, dtype), "cpp")


def test_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More rows than a block has, and than are multiplied in one go for the weights' gradients."""
    check(snr_trans(CaseFactory(1, dtype), 2100, [33, 40], [20, 31], share=0.8), backend, threads=2)


def test_wide_sub_networks(dtype: torch.dtype, backend: str) -> None:
    """Sums longer than what is added up in one go, and fewer blocks of rows than threads."""
    check(snr_trans(CaseFactory(2, dtype), 40, [600, 20], [70, 30, 5], share=1.0), backend, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [True, False])
def test_layouts(layout: str, stacked: bool, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(3, dtype, layouts=[layout])
    check(snr_trans(make, 33, [17] * 3, [16] * 2, stacked=stacked, stacked_inputs=stacked, share=0.7), backend)


@pytest.mark.parametrize("rows, in_width, out_width", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_nothing_to_compute(rows: int, in_width: int, out_width: int, backend: str) -> None:
    check(snr_trans(CaseFactory(4, torch.float32), rows, [in_width] * 2, [out_width] * 3, share=1.0), backend)
