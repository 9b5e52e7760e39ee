"""PCGrad's kernels, compiled and on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
import mtlkernels as mk  # noqa: E402
from tests import requires
from tests.triton.pcgrad_cases import (  # noqa: E402
    CHUNKS,
    SHAPES,
    assert_combined,
    assert_gram,
    check_list,
    check_public,
    check_weights,
    crowded,
    every_option,
    extreme,
    products,
    random_list,
    random_order,
    sized,
)

pytestmark = requires.cuda_gpu
# Float32 products are what other GPUs than those for computing centres take; they run on any.
WIDE = pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])


@WIDE
@pytest.mark.parametrize("num_tasks", [*range(1, 13), 16, 17, 31, 64])
def test_random_lists(num_tasks: int, wide: bool) -> None:
    for seed in range(10):
        check_list(random_list(seed, "cuda", num_tasks, 5, SHAPES + CHUNKS), num_tasks, "cuda", wide)


@WIDE
def test_squares_beyond_float32(wide: bool) -> None:
    flat = extreme("cuda")
    check_list(flat, len(flat), "cuda", wide)


@WIDE
@pytest.mark.parametrize("num_tasks", [1, 3, 8, 10])
def test_against_projecting_the_gradients(num_tasks: int, wide: bool) -> None:
    check_public(sized((300, 41, 100_000), num_tasks, "cuda"), num_tasks, "cuda", wide)
    check_public(random_list(num_tasks, "cuda", num_tasks, 3), num_tasks, "cuda", wide)


@WIDE
@pytest.mark.parametrize("num_tasks", [2, 9])
def test_20_million_elements(num_tasks: int, wide: bool) -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = sized((20_000_000, 1), num_tasks, "cuda")
    with products(wide):
        found = kernels.gram(flat, num_tasks)
        assert torch.equal(found, kernels.gram(flat, num_tasks)), "other bits in the second run"
    assert_gram(found, flat, num_tasks, wide)


def test_one_rounding_direction() -> None:
    """Equal elements: every lane rounds alike, so that errors do not cancel."""
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.full((1_000_003,), value, device="cuda") for value in (0.1, 1 / 3, 1.2345678)]
    with products(False):
        assert_gram(kernels.gram(flat, 3), flat, 3, False)


def test_options() -> None:
    for options in every_option():
        check_weights(*crowded("cuda"), options)
    check_weights(*crowded("cuda"), (False, 1e-30, True, True, 1e-30, True))


@WIDE
def test_what_is_missing_contributes_nothing(wide: bool) -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    infinite, ones = torch.tensor([1.0, float("inf")], device="cuda"), torch.ones(3, device="cuda")
    flat = [infinite, None, ones[:2], ones, ones, None]
    with products(wide):
        found = kernels.gram(flat, 3)
    assert not found[0, 0].isfinite() and not found[0, 2].isfinite()
    assert found[0, 1] == 3 and found[1, 1] == 3 and found[1, 2] == 0 and found[2, 2] == 2
    coefficients = torch.tensor([1.0, float("nan"), 2.0], dtype=torch.float64, device="cuda")
    first, second = kernels.combine(flat, 3, coefficients)
    assert first.tolist() == [3.0, float("inf")] and second.isnan().all()


@pytest.mark.slow
def test_more_elements_than_32_bits_count() -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = [torch.zeros(2**31 + 5000, dtype=torch.float16, device="cuda") for _ in range(2)]
    for i, grad in enumerate(flat):
        grad[-3:] = i + 2
    found = kernels.gram(flat, 2)
    assert found.tolist() == [[12.0, 18.0], [18.0, 27.0]]
    coefficients = torch.tensor([1.0, -1.0], dtype=torch.float64, device="cuda")
    (result,) = kernels.combine(flat, 2, coefficients)
    assert result[-4:].tolist() == [0.0, -1.0, -1.0, -1.0] and not result[:-3].any()


def step(flat: list[Tensor | None], order: Tensor) -> list[Tensor]:
    found: list[Tensor] = mk.pcgrad([flat[t::4] for t in range(4)], order=order, max_norm=1.0, normalize=True)
    return found


def test_nothing_waits_for_the_device() -> None:
    flat, order = sized((5000, 33), 4, "cuda"), random_order(4, "cuda")
    with mk.use_backend("triton"):
        step(flat, order)
        try:
            torch.cuda.set_sync_debug_mode("error")
            step(flat, order)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_graph_can_be_captured_and_replayed() -> None:
    flat, order = sized((5000, 33), 4, "cuda"), random_order(4, "cuda")
    with mk.use_backend("triton"):
        step(flat, order)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step(flat, order)
        for t, grad in enumerate(flat):
            assert grad is not None
            grad.mul_(t - 2.5)
        graph.replay()
        for mine, again in zip(captured, step(flat, order), strict=True):
            assert torch.equal(mine, again)


def test_strided_coefficients() -> None:
    from mtlkernels.ops.pcgrad import triton as kernels

    flat = sized((700,), 2, "cuda")
    coefficients = torch.tensor([1e50, 0.0, -1e-50, 9.0], dtype=torch.float64, device="cuda")[::2]
    assert_combined(kernels.combine(flat, 2, coefficients), flat, 2, coefficients)
