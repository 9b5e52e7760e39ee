"""Compiles one configuration of every kernel for sm_90; ``python -m tests.triton.aot`` compiles all of them."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from benchmarks.gpu_model.cubin import TOOLS  # noqa: E402
from mtlkernels._backends import interpreting  # noqa: E402
from tests.triton import aot  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not (TOOLS / "ptxas").exists(), reason="this Triton has no ptxas"),
    pytest.mark.skipif(interpreting(), reason="the interpreter replaces the compiler"),
]
PRODUCTS = (
    "layer_forward",
    "last_forward",
    "layerwise_product",
    "input_gradient",
    "wide_input_gradient",
    "weight_gradient",
    "route_sum",
    "route_products",
)
NORMS = (
    "batch_statistics",
    "layer_statistics",
    "normalize",
    "norm_sums",
    "norm_totals",
    "preactivation_gradient",
    "layer_norm_gradient",
    "slope_totals",
    "dice_rows",
    "dice_gradient_rows",
)
PCGRAD = ("gram_chunks", "gram_sum", "project_tasks", "combine_chunks")
KERNELS = ("mix_forward", "mix_backward", "open_routes", "average_sum", "route_dots", *PRODUCTS, *NORMS, *PCGRAD)


def size(  # noqa: N803
    GROUP: int = 0, GATES: int = 0, LINEAR_GATES: bool = False, SPLIT: bool = False, **others: object
) -> tuple[int, ...]:
    """Of variants with the same tile, those with more of these take more registers."""
    return GROUP, GATES, LINEAR_GATES, SPLIT


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_compiles_without_spilling(kernel: str) -> None:
    found = list(aot.every_variant(aot.FORWARD_CODES, aot.BACKWARD_CODES))
    candidates = [v for v in found if v.kernel == kernel and v.dtype in ("bf16", "")]
    largest = max(candidates, key=lambda v: (v.tile.rows * v.tile.columns, size(**dict(v.constants))))
    usage = aot.compile_variant(largest, 90)
    assert not usage.error
    assert usage.stack == 0
    assert (usage.tensor_core > 0) == (kernel in PRODUCTS)


def test_every_kernel_is_among_the_variants() -> None:
    assert {v.kernel for v in aot.every_variant((0,), (0,))} == set(KERNELS)
