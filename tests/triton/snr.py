"""Cases for SNR's Triton kernels; for the interpreter and for GPUs alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops import agreement
from tests.ops.snr_aver.definition import formula as aver_formula
from tests.ops.snr_trans.definition import formula as trans_formula

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
Make = Callable[[str], tuple[Any, Any, Case]]  # the op, its formula, a call


def _factory(dtype: torch.dtype, device: str, layout: str) -> CaseFactory:
    return CaseFactory(0, dtype, device=device, layouts=[layout])


def _trans(
    dtype: torch.dtype, rows: int, ins: list[int], outs: list[int], layout: str = "contiguous", **options: Any
) -> Make:
    def make(device: str) -> tuple[Any, Any, Case]:
        return mk.snr_trans, trans_formula, snr_trans(_factory(dtype, device, layout), rows, ins, outs, **options)

    return make


def _aver(
    dtype: torch.dtype, rows: int, width: int, sizes: tuple[int, int], layout: str = "contiguous", **options: Any
) -> Make:
    def make(device: str) -> tuple[Any, Any, Case]:
        return mk.snr_aver, aver_formula, snr_aver(_factory(dtype, device, layout), rows, width, *sizes, **options)

    return make


def cases(scale: int = 1) -> dict[str, Make]:
    """Small sizes for the interpreter; on a GPU, ``scale`` makes the batches of the larger ones larger."""
    return {
        "aligned": _trans(F32, 70 * scale, [32, 32], [16, 16, 16], stacked=True),
        "aligned_ragged": _trans(F32, 40 * scale, [48, 16], [80, 16], share=0.8),
        "odd": _trans(F32, 37 * scale, [33, 7, 20], [19, 5], share=0.6),
        "one_row": _trans(F32, 1, [7, 8], [5]),
        "no_rows": _trans(F32, 0, [7, 8], [5, 6], share=1.0),
        "no_width": _trans(F32, 9, [4, 0], [5, 6], share=1.0),
        "all_closed": _trans(F32, 20, [9, 9], [4, 4], share=0.0, stacked=True),
        "all_open": _trans(F32, 20, [9, 9], [4, 4], share=1.0, stacked=True, stacked_inputs=True),
        "strided": _trans(F32, 35, [16, 32], [16, 8], "strided", share=0.7),
        "transposed": _trans(F16, 35, [16, 32], [16, 8], "transposed", share=0.7),
        "unaligned": _trans(F32, 35, [16, 32], [16, 16], "offset", share=0.7),
        "without_closed_grad": _trans(F32, 35, [16, 9], [16, 8], closed_grad=False),
        "f16": _trans(F16, 40 * scale, [48, 48], [32, 32, 32], stacked=True),
        "f16_odd": _trans(F16, 37, [19, 21], [9, 30]),
        "bf16": _trans(BF16, 40 * scale, [144, 32], [80, 16], share=0.7),
        "bf16_odd": _trans(BF16, 37, [19, 21], [9, 30]),
        "many_sub_networks": _trans(F32, 3, [3] * 9, [2] * 10, share=0.3),
        "aver_aligned": _aver(F32, 40 * scale, 48, (4, 3)),
        "aver_odd": _aver(F32, 37 * scale, 33, (3, 5)),
        "aver_wide": _aver(F16, 5, 300, (3, 2), share=1.0),
        "aver_closed": _aver(F32, 5, 30, (3, 2), share=0.0),
        "aver_without_closed_grad": _aver(BF16, 20, 32, (4, 3), closed_grad=False),
        "aver_strided": _aver(BF16, 20, 32, (4, 3), "strided"),
        "aver_unaligned": _aver(F32, 20, 32, (4, 3), "offset"),
        "aver_no_rows": _aver(F32, 0, 5, (2, 3)),
        "aver_no_width": _aver(F32, 5, 0, (2, 3)),
        "aver_many_sub_networks": _aver(F32, 3, 5, (18, 19), share=0.3),
    }


def check(name: str, device: str, scale: int = 1) -> None:
    """Outputs and gradients against the definition in float64, judged by the reference's error."""
    agreement.check(*cases(scale)[name](device), "triton")


def check_closed_routes_take_no_part(device: str) -> None:
    """What is not finite stays behind a closed route, forward and backward."""
    for op, make in (
        (mk.snr_trans, _trans(F32, 40, [32, 16], [16, 16], share=1.0, closed_grad=False)),
        (mk.snr_aver, _aver(F32, 40, 32, (2, 2), share=1.0, closed_grad=False)),
    ):
        *_, case = make(device)
        with torch.no_grad():
            case.arguments["z"][:, 1] = 0
            case.arguments["u"][1].fill_(float("nan"))
            if op is mk.snr_trans:
                case.arguments["weight"][0][1].fill_(float("inf"))
        leaves = [leaf for group in case.leaves().values() for leaf in group]
        with mk.use_backend("triton"):
            outputs = op(**case.arguments)
            grads = torch.autograd.grad(sum(v.square().sum() for v in outputs), leaves)
        assert all(torch.isfinite(t).all() for t in (*outputs, *grads))
        assert not grads[1].any() and not grads[-1][:, 1].any() and grads[-1][:, 0].all()
