"""What holds of both SNR operators: closed routes, coding variables of another dtype, some gradients alone."""

from __future__ import annotations

import pytest
import torch

import mtlkernels as mk
from mtlkernels.testing import Case, CaseFactory, evaluate
from mtlkernels.testing.snr import snr_aver, snr_trans
from tests.ops.agreement import kinds
from tests.ops.snr_aver.cases import check as check_aver
from tests.ops.snr_trans.cases import check as check_trans


@pytest.mark.parametrize("z_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_z_of_another_dtype(z_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    make = CaseFactory(5, dtype)
    for op, check, case in (
        (mk.snr_trans, check_trans, snr_trans(make, 12, [7, 5], [6, 9, 3], share=0.8)),
        (mk.snr_aver, check_aver, snr_aver(make, 12, 7, 2, 3, share=0.8)),
    ):
        z = case.arguments["z"].detach().to(z_dtype).requires_grad_()
        case = Case({**case.arguments, "z": z}, dtype)
        with mk.use_backend(backend):
            got = evaluate(op, case)
        assert {t.dtype for t in got["outputs"]} == {dtype}
        assert {t.dtype for t in got["z"]} == {z_dtype}
        check(case, backend)


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
        torch.testing.assert_close(some, {name: every[name] for name in some}, rtol=0, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_special_values(value: float, backend: str) -> None:
    """Routes that are open; a closed one takes no part, whatever its sub-network and weight hold."""
    z = torch.tensor([[0.5, 1.0, 0.0], [0.25, 0.0, 1.0]])
    for place in (
        "u",
        "weight",
        "upstream",
        *(["z"] if value != value else []),
    ):  # z, which is folded, is never infinite
        u, w = [torch.randn(7, 5) for _ in range(3)], torch.randn(2, 3, 5, 5)
        upstream, open_z = torch.randn(7, 5), z.clone()
        {"u": u[0], "weight": w[0, 0], "upstream": upstream, "z": open_z}[place].view(-1)[0] = value
        leaves = [t.requires_grad_() for t in (*u, w)]
        for op, term in (
            (lambda: mk.snr_trans(u, w, open_z, closed_grad=False), lambda i, j: u[j] @ w[i, j].T),  # noqa: B023
            (lambda: mk.snr_aver(u, open_z, closed_grad=False), lambda i, j: u[j]),  # noqa: B023
        ):
            expected = [sum(open_z[i, j] * term(i, j) for j in range(3) if z[i, j] != 0) for i in range(2)]
            with mk.use_backend(backend):
                got = op()
                grads = torch.autograd.grad(got, leaves, [upstream, upstream], allow_unused=True)
            wanted = torch.autograd.grad(expected, leaves, [upstream, upstream], allow_unused=True)
            for found, right in zip((*got, *grads), (*expected, *wanted), strict=True):
                if found is not None and right is not None:
                    assert torch.equal(kinds(found), kinds(right)), place
