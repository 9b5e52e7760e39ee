"""More than 2^31 elements, in an intermediate that the fused forward pass never writes and in an output."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest
import torch

import mtlkernels as mk

GIGABYTE = 2**30
pytestmark = pytest.mark.slow


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024


@pytest.fixture(autouse=True)
def _cpp_on_every_core() -> Iterator[None]:
    if "cpp" not in mk.backends()["expert_mixture"]["cpu"]:
        pytest.skip("only the C++ kernels fuse the forward pass on a CPU")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with mk.use_backend("cpp"), torch.inference_mode():
        yield


def compare_some_rows(x: torch.Tensor, w: torch.Tensor, logits: torch.Tensor, routing: mk.Routing) -> None:
    outputs = mk.expert_mixture(x, [w], None, logits, routing)
    rows = torch.tensor([0, 1, x.shape[0] // 2 + 1, x.shape[0] - 2, x.shape[0] - 1])
    with mk.use_backend("reference"):
        expected = mk.expert_mixture(x[rows], [w], None, logits[rows], routing)
    for y, want in zip(outputs, expected, strict=True):
        torch.testing.assert_close(y[rows], want)


def test_large_intermediate_is_never_allocated() -> None:
    if free_memory() < 3 * GIGABYTE:
        pytest.skip("needs 3 GB of free memory")
    rows, experts, features = 2**20, 32, 128
    assert rows * experts * features > 2**31
    x, w = torch.randn(rows, 4).bfloat16(), torch.randn(experts, features, 4).bfloat16()
    logits = torch.randn(rows, experts).bfloat16()
    before = peak_memory()
    compare_some_rows(x, w, logits, mk.Routing.mmoe(experts, 1))
    assert peak_memory() - before < GIGABYTE


def test_large_output() -> None:
    if free_memory() < 8 * GIGABYTE:
        pytest.skip("needs 8 GB of free memory")
    rows, features = 2**20 + 1, 2**11
    x, w = torch.randn(rows, 2).bfloat16(), torch.randn(1, features, 2).bfloat16()
    compare_some_rows(x, w, torch.zeros(rows, 1).bfloat16(), mk.Routing.mmoe(1, 1))
