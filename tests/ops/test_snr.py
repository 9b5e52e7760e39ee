"""snr_trans and snr_aver against their formulas, over every implementation, dtype and memory layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import mtlkernels as mk
from mtlkernels.testing import LAYOUTS, Case, CaseFactory, evaluate
from tests.ops import definition
from tests.ops.definition import assert_agrees, reference_op
from tests.ops.snr_cases import random_snr_aver, random_snr_trans, snr_aver, snr_trans

CASES = 30  # for each of four dtypes


def check(op: Any, case: Case, backend: str, threads: int = 1) -> None:
    """The reference is judged by plain PyTorch, the others by the reference."""
    baseline = None if backend == "reference" else functools.partial(reference_op, op)
    with mk.use_backend(backend):
        assert_agrees(op, case, baseline, threads)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_trans(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(mk.snr_trans, random_snr_trans(seed, dtype), backend, threads=1 + seed % 2)


@pytest.mark.parametrize("seed", range(CASES))
def test_random_aver(seed: int, dtype: torch.dtype, backend: str) -> None:
    check(mk.snr_aver, random_snr_aver(seed, dtype), backend, threads=1 + seed % 2)


def test_many_rows(dtype: torch.dtype, backend: str) -> None:
    """More rows than a block has, and than are multiplied in one go for the weights' gradients."""
    make = CaseFactory(1, dtype)
    check(mk.snr_trans, snr_trans(make, 2100, [33, 40], [20, 31], share=0.8), backend, threads=2)
    check(mk.snr_aver, snr_aver(make, 700, 67, 4, 3, share=0.8), backend, threads=2)


def test_wide_sub_networks(dtype: torch.dtype, backend: str) -> None:
    """Sums longer than what is added up in one go, and fewer blocks of rows than threads."""
    make = CaseFactory(2, dtype)
    check(mk.snr_trans, snr_trans(make, 40, [600, 20], [70, 30, 5], share=1.0), backend, threads=2)
    check(mk.snr_aver, snr_aver(make, 3, 1111, 9, 8), backend, threads=2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stacked", [True, False])
def test_layouts(layout: str, stacked: bool, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(3, dtype, layouts=[layout])
    case = snr_trans(make, 33, [17] * 3, [16] * 2, stacked=stacked, stacked_inputs=stacked, share=0.7)
    check(mk.snr_trans, case, backend)
    check(mk.snr_aver, snr_aver(make, 33, 17, 3, 2), backend)


@pytest.mark.parametrize("rows, in_width, out_width", [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
def test_nothing_to_compute(rows: int, in_width: int, out_width: int, backend: str) -> None:
    make = CaseFactory(4, torch.float32)
    check(mk.snr_trans, snr_trans(make, rows, [in_width] * 2, [out_width] * 3, share=1.0), backend)
    check(mk.snr_aver, snr_aver(make, rows, in_width, 2, 3, share=1.0), backend)


@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_z_of_another_dtype(z_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(5, dtype)
    for op, case in (
        (mk.snr_trans, snr_trans(make, 12, [7, 5], [6, 9, 3], share=0.8)),
        (mk.snr_aver, snr_aver(make, 12, 7, 2, 3, share=0.8)),
    ):
        z = case.arguments["z"].detach().to(z_dtype).requires_grad_()
        case = Case({**case.arguments, "z": z}, dtype)
        with mk.use_backend(backend):
            got = evaluate(op, case)
        assert {t.dtype for t in got["outputs"]} == {dtype}
        assert {t.dtype for t in got["z"]} == {z_dtype}
        exact = evaluate(getattr(definition, op.__name__), case.to(torch.float64))
        worst = max(torch.finfo(dtype).eps, torch.finfo(z_dtype).eps)
        for name in exact:
            for a, b in zip(got[name], exact[name], strict=True):
                torch.testing.assert_close(a.double(), b, rtol=4 * worst, atol=16 * worst)


@pytest.mark.parametrize("closed_grad", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_closed_routes_take_no_part(closed_grad: bool, poison: float, dtype: torch.dtype, backend: str) -> None:
    """A sub-network that nobody reads, and a closed route's weight, may hold anything."""
    make = CaseFactory(6, dtype)
    trans, aver = snr_trans(make, 40, [20, 33, 5], [18, 7], share=1.0), snr_aver(make, 40, 20, 3, 2, share=1.0)
    for op, case in ((mk.snr_trans, trans), (mk.snr_aver, aver)):
        case.arguments["closed_grad"] = closed_grad
        with torch.no_grad():
            case.arguments["z"][:, 1] = 0
            case.arguments["z"][0, 2] = 0
            clean = {"u": case.arguments["u"][1].clone()}
            case.arguments["u"][1].zero_()
        with mk.use_backend(backend):
            expected = evaluate(op, case)
            with torch.no_grad():
                case.arguments["u"][1].copy_(torch.full_like(clean["u"], poison))
                if op is mk.snr_trans:
                    case.arguments["weight"][0][2].fill_(poison)
            got = evaluate(op, case)
        for name in expected:
            for a, b in zip(got[name], expected[name], strict=True):
                if name == "z":  # that of a closed route is what it would be worth, which is not finite
                    is_open = case.arguments["z"] != 0
                    a, b = a[is_open] if closed_grad else a, b[is_open] if closed_grad else b
                assert torch.equal(a, b), name


def test_gradients_of_closed_routes(dtype: torch.dtype, backend: str) -> None:
    """Zero for u and W; for z what opening the route would be worth, or zero if that is not asked for."""
    make = CaseFactory(7, dtype)
    for op, case in (
        (mk.snr_trans, snr_trans(make, 50, [20, 33, 5], [18, 7], share=0.4)),
        (mk.snr_aver, snr_aver(make, 50, 20, 3, 2, share=0.4)),
    ):
        with mk.use_backend(backend):
            full = evaluate(op, case)
            short = evaluate(op, Case({**case.arguments, "closed_grad": False}, dtype))
        closed = case.arguments["z"] == 0
        assert closed.any() and full["z"][0][closed].all() and not short["z"][0][closed].any()
        assert torch.equal(full["z"][0][~closed], short["z"][0][~closed])
        for name in full:
            if name != "z":
                assert all(torch.equal(a, b) for a, b in zip(full[name], short[name], strict=True))
        for i, j in closed.nonzero().tolist() if op is mk.snr_trans else ():
            assert not full[f"weight[{i}]"][j].any()


@pytest.mark.parametrize("wanted", ["u", "weight", "z"])
def test_only_some_gradients(wanted: str, backend: str) -> None:
    make = CaseFactory(8, torch.float32)
    for op, case in (
        (mk.snr_trans, snr_trans(make, 30, [20, 3], [18, 7], share=0.7)),
        (mk.snr_aver, snr_aver(make, 30, 20, 3, 2, share=0.7)),
    ):
        with mk.use_backend(backend):
            every = evaluate(op, case)
            for name, leaves in case.leaves().items():
                for leaf in leaves:
                    leaf.requires_grad_(name.startswith(wanted))
            some = evaluate(op, case)
        assert all(name == "outputs" or name.startswith(wanted) for name in some)
        for name, group in some.items():
            assert all(torch.equal(a, b) for a, b in zip(group, every[name], strict=True))


def test_outputs_are_new_dense_tensors(backend: str) -> None:
    """Also where an output is one sub-network's alone, unscaled."""
    u = [torch.randn(4, 3), torch.randn(4, 3)]
    with mk.use_backend(backend), torch.inference_mode():
        outputs = mk.snr_aver(u, torch.eye(2))
    for v, x in zip(outputs, u, strict=True):
        assert v.is_contiguous() and torch.equal(v, x)
        assert v.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
