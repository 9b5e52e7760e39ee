"""snr_aver against its formula, over every implementation, dtype and memory layout."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels import _extension
from mtlkernels.testing import LAYOUTS, CaseFactory
from mtlkernels.testing.snr import random_snr_aver, snr_aver
from tests.ops.snr_aver.cases import check

CASES = 10  # for each of four dtypes


@pytest.mark.parametrize("seed", range(CASES))
def test_random_cases(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(random_snr_aver(seed, dtype), backend, threads=1 + seed % 2)


@pytest.mark.parametrize("isa", _extension.instruction_sets()[:-1])
@pytest.mark.parametrize("seed", range(1000, 1010))
def test_every_instruction_set(seed: int, isa: str, dtype: torch.dtype) -> None:
    with _extension.instruction_set(isa):
        check(random_snr_aver(seed, dtype), "cpp")


@pytest.mark.parametrize("isa", _extension.instruction_sets())
@pytest.mark.parametrize("inputs", [2, 4, 9])
@pytest.mark.parametrize("outputs", [1, 2, 3, 4, 9])
def test_all_routes_open(outputs: int, inputs: int, isa: str, dtype: torch.dtype) -> None:
    """Outputs that sum the same inputs go together, and so do pairs of one block."""
    with _extension.instruction_set(isa):
        check(snr_aver(CaseFactory(outputs, dtype), 70, 77, inputs, outputs, share=1.0), "cpp", threads=2)


@pytest.mark.parametrize("isa", _extension.instruction_sets()[1:])
@pytest.mark.parametrize("width", [256, 250])
def test_more_than_caches_keep(width: int, isa: str) -> None:
    """Outputs of 16 MiB are written past the caches where rows are whole vectors."""
    case = snr_aver(CaseFactory(width, torch.float32), 5600, width, 3, 3, share=1.0)
    assert 3 * case.arguments["u"][0].nbytes >= 2**24
    with _extension.instruction_set(isa):
        check(case, "cpp", threads=2)


def test_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More rows than a block has."""
    check(snr_aver(CaseFactory(1, dtype), 700, 67, 4, 3, share=0.8), backend, threads=2)


def test_wide_sub_networks(dtype: torch.dtype, backend: str) -> None:
    """Fewer blocks of rows than threads."""
    check(snr_aver(CaseFactory(2, dtype), 3, 1111, 9, 8), backend, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype, backend: str) -> None:
    check(snr_aver(CaseFactory(3, dtype, layouts=[layout]), 33, 17, 3, 2), backend)


@pytest.mark.parametrize("rows, width", [(0, 4), (5, 0)])
def test_nothing_to_compute(rows: int, width: int, backend: str) -> None:
    check(snr_aver(CaseFactory(4, torch.float32), rows, width, 2, 3, share=1.0), backend)


def test_outputs_are_new_dense_tensors(backend: str) -> None:
    """Also where an output is one sub-network's alone, unscaled."""
    u = [torch.randn(4, 3), torch.randn(4, 3)]
    with mk.use_backend(backend), torch.inference_mode():
        outputs = mk.snr_aver(u, torch.eye(2))
    for v, x in zip(outputs, u, strict=True):
        assert v.is_contiguous() and torch.equal(v, x)
        assert v.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
