"""csrc/common on the host: pieces of parameter lists, elements of every dtype."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from mtlkernels.ops.pcgrad import cuda
from tests.csrc import library

pytestmark = library.needs_compiler
HUGE = 2**31 + 5


def sized(sizes: list[int], tasks: int) -> tuple[Tensor, cuda.Arguments]:
    """The table of parameters of these sizes, none of which takes memory."""
    grads = [torch.empty(size, device="meta") for size in sizes for _ in range(tasks)]
    call = cuda.arguments(grads, tasks, with_results=False)
    return call.table.to(torch.device("cpu")), call


@pytest.mark.parametrize("seed", range(20))
def test_chunks_cover_every_element_once(seed: int) -> None:
    rng = random.Random(seed)
    tasks = rng.randint(1, 64)
    sizes = [rng.choice((0, 0, 1, 2, 4095, 4096, 4097, 9000, 50_000)) for _ in range(rng.randint(1, 60))]
    table, call = sized(sizes, tasks)
    covered = [0] * len(sizes)
    for index in range(call.chunks):
        parameter, first, count = library.chunk_at(table, len(sizes), tasks, index, 0)
        assert first == covered[parameter] and 1 <= count <= cuda.CHUNK
        covered[parameter] += count
        for start in {0, parameter, rng.randint(0, parameter)}:
            assert library.chunk_at(table, len(sizes), tasks, index, start) == (parameter, first, count)
    assert covered == sizes


@pytest.mark.parametrize("sizes", [[HUGE], [3, HUGE, 0, 2 * HUGE, 1], [0, 0, 2**40 + 1]], ids=str)
def test_chunks_past_32_bits(sizes: list[int]) -> None:
    table, call = sized(sizes, 2)
    rng = random.Random(0)
    borders = [0]
    for size in sizes:
        borders.append(borders[-1] + -(-size // cuda.CHUNK))
    assert call.chunks == borders[-1]
    near = {border + offset for border in borders for offset in (-2, -1, 0, 1)}
    indices = [i for i in near | {rng.randrange(call.chunks) for _ in range(2000)} if 0 <= i < call.chunks]
    found = {i: library.chunk_at(table, len(sizes), 2, i, 0) for i in sorted(indices)}
    for index, (parameter, first, count) in found.items():
        assert borders[parameter] <= index < borders[parameter + 1]
        assert first == (index - borders[parameter]) * cuda.CHUNK
        assert count == min(cuda.CHUNK, sizes[parameter] - first)
    for index, following in pairwise(found):
        if following == index + 1:  # nothing in between is left out
            parameter, first, count = found[index]
            after = found[following]
            assert after[:2] == (parameter, first + count) or (after[1] == 0 and first + count == sizes[parameter])


@pytest.mark.parametrize("tasks", range(1, 65))
def test_the_sizes_of_scratch_agree(tasks: int) -> None:
    for chunks in (0, 1, 2, 1023, 1024, 1025, 10**9):
        assert library.load().gram_slots(library.integer(chunks), tasks) == cuda.slots(chunks, tasks)


def test_every_half_has_its_value() -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    expected = bits.view(torch.float16).float()
    to_float = library.load().to_float
    found = torch.tensor([to_float(pattern & 0xFFFF) for pattern in bits.tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("name", "target"), [("to_half", torch.float16), ("to_bfloat16", torch.bfloat16)])
def test_rounding_is_pytorchs(name: str, target: torch.dtype) -> None:
    patterns = torch.randint(-(2**31), 2**31, (30_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    near_ties = torch.randn(10_000).to(target).float()
    around = [near_ties, (near_ties * (1 + torch.finfo(target).eps / 2)), near_ties * torch.finfo(target).tiny]
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504.0, 65519.9, 65520.0, 1e38, 2**-25, 1e-8])
    values = torch.cat([patterns, patterns.sign() * patterns.abs().clamp(1e-9, 1e5), *around, special])
    function = getattr(library.load(), name)
    found = torch.tensor([function(value) for value in values.tolist()], dtype=torch.int32).to(torch.int16).view(target)
    torch.testing.assert_close(found, values.to(target), rtol=0, atol=0, equal_nan=True)
