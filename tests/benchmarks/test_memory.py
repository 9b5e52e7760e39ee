"""Peak memory of training steps against eager modules, at sizes that are quick: bytes, not times.

An AMX processor takes more rows together than others do, and has its own figures.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.harness.memory import peak_mib
from benchmarks.peers.fused import fused_trunk
from benchmarks.peers.per_expert import PerExpertTrunk
from benchmarks.peers.shape import TrunkShape
from benchmarks.suites import mixture
from mtlkernels import _extension
from tests import requires

CPU = torch.device("cpu")
SETS = [isa for isa in _extension.instruction_sets() if isa != "amx"]

# Without them, eager modules take a minute for a step.
BFLOAT16 = requires.instruction_set("avx512bf16", "amx", what="products of bfloat16")

pytestmark = requires.cpp_kernels


def share_of_eager(shape: TrunkShape, rows: int, dtype: torch.dtype) -> float:
    """The peak of our training step, by that of eager modules."""
    made = mixture.build(shape, rows, dtype, True, CPU)
    steps = {contender.name: contender.build() for contender in made.contenders if contender.name in ("eager", "ours")}
    return peak_mib(steps["ours"], CPU) / peak_mib(steps["eager"], CPU)


@pytest.mark.parametrize("precision, most", [pytest.param(torch.bfloat16, 0.7, marks=BFLOAT16), (torch.float32, 0.65)])
@pytest.mark.parametrize("threads", [1, 2])
def test_two_levels(precision: torch.dtype, most: float, threads: int) -> None:
    torch.set_num_threads(threads)
    with _extension.instruction_set(SETS[-1]):
        assert share_of_eager(mixture.TWO_LEVELS, 4096, precision) < most


@requires.instruction_set("avx512bf16", what="bfloat16 dot products")  # weights in float32 take twice as much
@pytest.mark.parametrize("rows, most", [(16, 1.5), (64, 1.9), (256, 1.9)])
def test_few_rows(rows: int, most: float) -> None:
    """Then most are the parameters' gradients, which eager modules have as well."""
    torch.set_num_threads(2)
    with _extension.instruction_set("avx512bf16"):
        assert share_of_eager(mixture.LEVEL, rows, torch.bfloat16) < most


def test_kept_memory_does_not_grow() -> None:
    """Whatever comes when, a model's steps keep to the same memory; gradients live until the next backward pass."""
    shape = replace(mixture.TWO_LEVELS, in_features=64, units=(128, 32))
    trunk = fused_trunk(shape, PerExpertTrunk(shape))
    kept = []
    for steps in (2, 20):
        _extension.function("release_memory")()
        for step in range(steps):
            outputs = trunk(torch.randn((1024, 512)[step % 2], 64, requires_grad=True))
            trunk.zero_grad()
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
            del outputs
        trunk.zero_grad()
        kept.append(_extension.function("release_memory")())
    assert 0 < kept[1] <= 1.5 * kept[0]
